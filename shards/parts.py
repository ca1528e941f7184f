"""Part files: what is known of each finished shard while the build as a whole is unfinished.

A part holds one line of JSON and the shard's rows as a manifest table. It is written after its shard is
durable, so a shard without a part is written again, and one with a part never is.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from shards.manifest import ShardFile, Table, decode_table, encode_table, write_file
from shards.plan import Task
from shards.target import joined_mark

Oddity = tuple[str, str, list[str], bool]
"""Path in the source, key, kinds, and whether the image was encoded again."""


@dataclass(frozen=True)
class Part:
    """A finished shard."""

    shard: ShardFile
    counts: dict[str, int]
    """Oddities by kind, and images encoded again."""
    oddities: list[Oddity]
    rejected: list[tuple[str, str]]
    """Path in the source, and reason."""
    table: Table
    """The shard's rows, in which its own number is 0."""


def save_part(task: Task, part: Part) -> None:
    """Say durably that a shard is finished."""
    facts = {
        "fingerprint": task.fingerprint(),
        "shard": part.shard.model_dump(),
        "counts": part.counts,
        "oddities": part.oddities,
        "rejected": part.rejected,
    }
    write_file(task.part, json.dumps(facts).encode() + b"\n" + encode_table(part.table))


def finished_part(task: Task) -> Part | None:
    """The part of a shard that an earlier run finished from the same samples, if there is one."""
    try:
        text, _, table_bytes = task.part.read_bytes().partition(b"\n")
        facts = json.loads(text)
        shard = ShardFile.model_validate(facts["shard"])
        table = decode_table(table_bytes, str(task.part))
        rejected = [(path, why) for path, why in facts["rejected"]]
        oddities: list[Oddity] = [(path, key, kinds, again) for path, key, kinds, again in facts["oddities"]]
        same = facts["fingerprint"] == task.fingerprint() and shard.name == task.path.name
        beside = (task.path.with_suffix(suffix) for suffix in task.target.beside)
        whole = joined_mark(task.path).is_file() or (
            task.path.stat().st_size == shard.size and all(path.is_file() for path in beside)
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not there, or not ours: the shard is written again
    if not (same and whole) or (rejected and task.options.on_error == "stop"):
        return None
    return Part(shard, facts["counts"], oddities, rejected, table)


def forget_stale_join(tasks: list[Task], joining: Path) -> None:
    """Where a piece is another one now, begin the one file anew: later pieces and the tables move with it."""
    joined = [task for task in tasks if joined_mark(task.path).is_file()]
    if not joined or all(finished_part(task) is not None for task in tasks):
        return
    joining.unlink(missing_ok=True)
    for task in joined:
        joined_mark(task.path).unlink()
