"""Check one tar that somebody else made against its index: read it from end to end and compare."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from shards.faults import Fault, decode_problem
from shards.foreign import ForeignShard, read_foreign
from shards.manifest import ShardFile, Table
from shards.scan import scan

_COPY = "copy it again from where it is whole; if it was changed on purpose, delete the index"


def foreign_tar_faults(
    path: Path, info: ShardFile, table: Table, rows: range, classes: list[str], decode: bool
) -> Iterator[Fault]:
    """All faults of one tar; see `shards.verify`."""
    try:
        found = read_foreign(path)
    except FileNotFoundError:
        yield Fault(info.name, None, "shard file missing, its index lists it", _COPY)
        return
    except OSError as error:
        yield Fault(info.name, None, f"cannot be read: {error.strerror}", "make it readable")
        return
    except ValueError as error:
        problem, _, remedy = str(error).removeprefix(f"{path}").lstrip(":, ").partition("; ")
        yield Fault(info.name, None, problem, remedy or _COPY)
        return
    if found.shard.samples != len(rows):
        yield Fault(info.name, None, f"{found.shard.samples} samples, its index lists {len(rows)}", _COPY)
        return
    differing = False
    for here, row in enumerate(rows):
        problem_here = _sample_problem(found, here, table, row, classes)
        if problem_here is None and decode and here not in found.damaged:
            with path.open("rb") as file:
                file.seek(int(table.columns["offset"][row]))
                data = file.read(int(table.columns["length"][row]))
            problem_here = decode_problem(data, scan(data))
        if problem_here is not None:
            differing = True
            yield Fault(info.name, table.key(row), problem_here, _COPY)
    for here, words in found.damaged.items():
        yield Fault(info.name, table.key(rows[here]), words, "make the archive again without this image")
    if not differing and found.shard.xxh3_128 != info.xxh3_128:
        problem = "the file's checksum differs from its index's, though its samples are whole"
        yield Fault(info.name, None, problem, _COPY)


def _sample_problem(found: ForeignShard, here: int, table: Table, row: int, classes: list[str]) -> str | None:
    if found.table.key(here) != table.key(row):
        return f"the tar has {found.table.key(here)!r} in its place"
    label = classes[int(table.columns["label"][row])]
    if found.names is not None and found.names[here] != label:
        return f"its label is {found.names[here]!r} in the tar, {label!r} in the index"
    compared = ("offset", "length", "checksum", *(() if found.names is not None else ("label",)))
    for column in compared:
        if found.table.columns[column][here] != table.columns[column][row]:
            return (
                "the image's checksum differs from the index's"
                if column == "checksum"
                else f"its {column} is {int(found.table.columns[column][here])} in the tar, "
                f"{int(table.columns[column][row])} in the index"
            )
    return None
