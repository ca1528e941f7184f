"""What every kind of shard file is to the builder: a writer of records, and how its files are named."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol

from shards.manifest import ShardFile, Storage, Table


def joined_mark(piece: Path) -> Path:
    """The file that says that a piece is already in the one file and needs not be there itself."""
    return piece.with_name(f"{piece.name}.joined")


def is_shard_name(name: str, set_name: str, suffix: str) -> bool:
    """Whether a file is named as the builder names a shard of several of the set."""
    return re.fullmatch(rf"{re.escape(set_name)}-\d{{6,}}{re.escape(suffix)}", name, re.ASCII) is not None


@dataclass(frozen=True, slots=True)
class Record:
    """One encoded image on its way into a shard."""

    key: str
    format: Literal["jpeg", "png"]
    data: bytes
    label: int
    width: int
    """Pixels as stored, before EXIF orientation."""
    height: int
    checksum: int
    """xxh3-64 of the data."""


class ShardWriter(Protocol):
    """Writes the records of one shard, used as a context.

    Nothing has the final name before `finish`, and when an exception passes through, what was written
    is removed. The same records give the same bytes.
    """

    def add(self, record: Record) -> int:
        """Append a record; returns the offset of its image's bytes in the file."""

    def finish(self) -> ShardFile:
        """Make the file, and those beside it, durable under their final names, the file itself last."""

    def __enter__(self) -> ShardWriter: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Target(Protocol):
    """A kind of shard file."""

    storage: Storage
    """What the manifest calls it."""
    suffix: str
    """Of a shard's name: `.tar`."""
    beside: tuple[str, ...]
    """Suffixes of the files that lie beside each shard and belong to it: `.idx`."""
    imports: tuple[str, ...]
    """Modules that its writer imports when it starts; worker processes are forked with them."""
    jpeg_only: bool
    """Whether its readers take grey and RGB JPEGs alone."""
    most_bytes: int | None
    """Of one image; None where there is no such bound."""
    joined: bool
    """Whether a set without a bound on its shards is one file, which `join` makes of the plan's shards."""

    def writer(self, path: Path, temporary: Path, most_records: int) -> ShardWriter:
        """Begin a shard.

        Args:
            path: final path.
            temporary: where it is written until then, on the same file system.
            most_records: as planned; fewer come where damaged ones are left out.
        """

    def join(
        self, path: Path, temporary: Path, pieces: Sequence[Path], table: Table
    ) -> tuple[ShardFile, Table]:
        """Make one file of finished shards, durable under its final name, and give its rows.

        Args:
            path: final path.
            temporary: where it is written until then, on the same file system. It survives an interrupted
                run: what the pieces marked as joined (below) gave is in it, and is kept.
            pieces: files that `writer` made, in their order. One that is durably in `temporary` may be
                removed, after the empty file `joined_mark(piece)` was made durable beside it.
            table: the rows of all pieces, `shard` counting the pieces and `offset` from each one's begin.
        """
