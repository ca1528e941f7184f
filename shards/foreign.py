"""Rows of shard files that somebody else made: where each sample lies, its label, size and checksum.

Every byte is read once, so that damage that comes later is found. What these files say is data: sizes
and counts are held against the file before memory is taken, and nothing is executed.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from shards.beton import digest, read_beton
from shards.manifest import MAX_SIDE, ShardFile, Table, make_table
from shards.scan import scan
from shards.tar_index import Member, members

# Members of a sample that may be its image, the first of them that is there.
_IMAGES = ("jpg", "jpeg", "jpe", "jfif", "png")
_LABEL_KEYS = ("label", "cls")
_MAX_IMAGE = 1 << 30
_MAX_LABEL, _MAX_JSON = 1000, 1 << 20
_MAX_NUMBER = 999_999
_CHUNK = 1 << 20


@dataclass(frozen=True)
class ForeignShard:
    """One file and its samples in order."""

    shard: ShardFile
    table: Table
    """Its labels are 0 where `names` has texts."""
    names: list[str] | None
    """Labels as texts, where they are no numbers; one per sample."""
    damaged: dict[int, str]
    """Images that the structural scan finds at fault: number of the sample in the file, and words."""


@dataclass
class _Rows:
    """Columns under construction."""

    where: str
    keys: list[str] = field(default_factory=list)
    labels: list[int | str] = field(default_factory=list)
    numbers: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    damaged: dict[int, str] = field(default_factory=dict)

    def add(self, fd: int, key: str, label: int | str, offset: int, length: int) -> None:
        if length > _MAX_IMAGE:
            raise ValueError(
                f"{self.where}, sample {key}: an image of {length} bytes, at most {_MAX_IMAGE} are read"
            )
        data = read_exactly(fd, length, offset)
        if len(data) < length:
            raise ValueError(f"{self.where}, sample {key}: the file became shorter while it was indexed")
        found = scan(data)
        if found.fault:
            self.damaged[len(self.keys)] = found.words
        # A damaged image keeps its place, so that samples have the numbers that other readers give them.
        width, height = (min(max(side, 1), MAX_SIDE) for side in (found.width, found.height))
        self.keys.append(key)
        self.labels.append(label)
        self.numbers.append((offset, length, xxhash.xxh3_64_intdigest(data), width, height))

    def finish(self, name: str, size: int, xxh3_128: str | None, fd: int) -> ForeignShard:
        texts = any(isinstance(label, str) for label in self.labels)
        columns: dict[str, npt.NDArray[Any]] = {
            column: np.array([row[i] for row in self.numbers], np.uint64)
            for i, column in enumerate(("offset", "length", "checksum", "width", "height"))
        }
        columns["shard"] = np.zeros(len(self.keys), np.uint32)
        columns["label"] = np.array([0 if texts else label for label in self.labels], np.int32)
        shard = ShardFile(
            name=name,
            size=size,
            samples=len(self.keys),
            xxh3_128=xxh3_128 or digest(fd, columns["checksum"]),
        )
        names = [str(label) for label in self.labels] if texts else None
        return ForeignShard(shard, make_table(columns, self.keys), names, self.damaged)


def read_foreign(path: Path) -> ForeignShard:
    """Read one `.tar` or `.beton` from end to end.

    Raises:
        ValueError: its structure is damaged, or a sample has no image or no label; names file and sample.
        OSError: it cannot be read.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        if path.suffix == ".tar":
            return _read_tar(fd, path, size)
        return _read_beton(fd, path, size)
    finally:
        os.close(fd)


def _read_beton(fd: int, path: Path, size: int) -> ForeignShard:
    tables = read_beton(path)
    outside = (tables.label < 0) | (tables.label > _MAX_NUMBER)
    if outside.any():
        first = int(np.argmax(outside))
        raise ValueError(
            f"{path}, sample {first}: label {int(tables.label[first])} is outside 0..{_MAX_NUMBER}; "
            "vqsa reads class numbers"
        )
    rows = _Rows(str(path))
    columns = (tables.label.tolist(), tables.offset.tolist(), tables.length.tolist())
    for number, (label, offset, length) in enumerate(zip(*columns, strict=True)):
        rows.add(fd, f"{number:08d}", label, offset, length)
    return rows.finish(path.name, size, None, fd)


def _read_tar(fd: int, path: Path, size: int) -> ForeignShard:
    rows = _Rows(str(path))
    for key, image, label in tar_samples(fd, path, size):
        rows.add(fd, key, label, image.offset, image.size)
    whole = xxhash.xxh3_128()
    at = 0
    while chunk := os.pread(fd, _CHUNK, at):
        whole.update(chunk)
        at += len(chunk)
    return rows.finish(path.name, size, whole.hexdigest(), fd)


def tar_samples(fd: int, path: Path, size: int) -> Iterator[tuple[str, Member, int | str]]:
    """Key, image and label of each sample of a WebDataset tar; reads the headers and the labels alone.

    Raises:
        ValueError: its structure is damaged, or a sample has no image or no label; names file and sample.
    """
    for key, parts in _samples(fd, path, size):
        image = next((parts[kind] for kind in _IMAGES if kind in parts), None)
        if image is None:
            raise ValueError(
                f"{path}, sample {key}: no image (one of .{', .'.join(_IMAGES)}), only "
                f".{', .'.join(sorted(parts)[:8])}; vqsa reads images with a label"
            )
        yield key, image, _label(fd, f"{path}, sample {key}", parts)


def _samples(fd: int, path: Path, size: int) -> Iterator[tuple[str, dict[str, Member]]]:
    """Samples as webdataset groups them: neighbours that are the same up to the first dot of the base name."""
    key = ""
    parts: dict[str, Member] = {}
    for member in members(fd, 0, size, str(path)):
        folder, slash, base = member.name.rpartition("/")
        stem, dot, kind = base.partition(".")
        if not dot or not stem or (base.startswith("__") and base.endswith("__")):
            continue  # what is not part of a sample; webdataset passes over it too
        here = (folder + slash + stem).encode("utf-8", "replace").decode()
        if here != key and parts:
            yield key, parts
            parts = {}
        key = here
        if kind.lower() in parts:
            raise ValueError(f"{path}, sample {key}: two members .{kind.lower()}; make the archive again")
        parts[kind.lower()] = member
    if parts:
        yield key, parts


def _label(fd: int, where: str, parts: dict[str, Member]) -> int | str:
    if (member := parts.get("cls")) is not None:
        if member.size > _MAX_LABEL:
            raise ValueError(f"{where}: a .cls of {member.size} bytes is no label")
        return _label_of(
            read_exactly(fd, member.size, member.offset).decode("utf-8", "replace"), where, ".cls"
        )
    if (member := parts.get("json")) is None:
        raise ValueError(f"{where}: no label; wanted a .cls, or a .json with {' or '.join(_LABEL_KEYS)!s}")
    if member.size > _MAX_JSON:
        raise ValueError(f"{where}: a .json of {member.size} bytes, at most {_MAX_JSON} are read")
    try:
        found = json.loads(read_exactly(fd, member.size, member.offset))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: its .json cannot be read ({str(error)[:100]})") from None
    for name in _LABEL_KEYS if isinstance(found, dict) else ():
        if isinstance(found.get(name), int | str) and not isinstance(found[name], bool):
            return _label_of(str(found[name]), where, f".json ({name})")
    raise ValueError(f"{where}: its .json has no {' or '.join(_LABEL_KEYS)} that is a number or a name")


def _label_of(text: str, where: str, what: str) -> int | str:
    text = text.strip()
    if re.fullmatch(r"-?[0-9]{1,20}", text):
        if not 0 <= int(text) <= _MAX_NUMBER:
            raise ValueError(f"{where}: label {text} in its {what} is outside 0..{_MAX_NUMBER}")
        return int(text)
    if not text or not text.isprintable() or len(text) > 200:
        raise ValueError(f"{where}: {text[:40]!r} in its {what} is neither a class number nor a class name")
    return text


def read_exactly(fd: int, size: int, offset: int) -> bytes:
    """`size` bytes of a file from `offset`, fewer only at its end."""
    data = os.pread(fd, size, offset)
    while len(data) < size and (more := os.pread(fd, size - len(data), offset + len(data))):
        data += more
    return data
