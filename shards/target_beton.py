"""Writes FFCV `.beton` files, version 2, that keep the original JPEG bytes; ffcv itself is not needed.

ffcv's own writer decodes and encodes every image again. Here a record is the source's bytes. The same
records give the same file: allocation table and records are in the order of the samples.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from shards.beton import (
    ALLOCATION,
    DESCRIPTOR,
    HEADER,
    IMAGE_FIELD,
    INT_FIELD,
    JPEG_MODE,
    SUFFIX,
    VERSION,
    digest,
    metadata_type,
)
from shards.manifest import ShardFile, Storage, Table, sync_folder, write_file
from shards.target import Record, joined_mark

PAGE = 8 << 20  # ffcv's default
_FLUSH = 4 << 20
_MAX_VECTORS = 512  # below every system's limit for one writev
_COPY = 64 << 20
_ROW = metadata_type()
_TABLES_AT = HEADER.itemsize + 2 * DESCRIPTOR.itemsize


def data_begin(samples: int, page_size: int) -> int:
    """Where the records of a file with room for so many samples begin."""
    return -(-(_TABLES_AT + samples * _ROW.itemsize) // page_size) * page_size


def _front(samples: int, page_size: int, alloc_ptr: int) -> bytes:
    header = np.array((VERSION, 2, page_size, samples, alloc_ptr), HEADER)
    descriptors = np.zeros(2, DESCRIPTOR)
    descriptors["type"] = IMAGE_FIELD, INT_FIELD
    descriptors["name"] = b"image", b"label"
    return header.tobytes() + descriptors.tobytes()


class _Tables:
    """The two tables of a file, and what is written before and after the records."""

    def __init__(
        self,
        page_size: int,
        *,
        label: npt.ArrayLike,
        offset: npt.ArrayLike,
        length: npt.ArrayLike,
        width: npt.ArrayLike,
        height: npt.ArrayLike,
    ) -> None:
        offset = np.asarray(offset, np.uint64)
        length = np.asarray(length, np.uint64)
        samples = len(offset)
        self.rows = np.zeros(samples, _ROW)
        self.rows["label"] = label
        image = self.rows["image"]
        image["mode"], image["width"], image["height"], image["ptr"] = JPEG_MODE, width, height, offset
        self.allocations = np.zeros(samples, ALLOCATION)
        self.allocations["sample"] = np.arange(samples)
        self.allocations["ptr"], self.allocations["size"] = offset, length
        self.alloc_ptr = int(offset[-1] + length[-1]) if samples else _TABLES_AT
        self.front = _front(samples, page_size, self.alloc_ptr)
        self.size = self.alloc_ptr + self.allocations.nbytes

    def write(self, fd: int) -> None:
        _write_at(fd, [self.allocations.tobytes()], self.alloc_ptr)
        _write_at(fd, [self.front, self.rows.tobytes()], 0)


def _write_at(fd: int, parts: Sequence[bytes | memoryview], offset: int) -> None:
    left = [memoryview(part) for part in parts if len(part)]
    while left:
        written = os.pwritev(fd, left[:_MAX_VECTORS], offset)
        offset += written
        while left and written >= len(left[0]):
            written -= len(left.pop(0))
        if written:
            left[0] = left[0][written:]


def _check_record(record: Record, page_size: int) -> None:
    if record.format != "jpeg":
        raise ValueError(
            f"sample {record.key}: a .beton holds JPEGs alone, this one is a {record.format.upper()}; "
            "convert it, or build tars"
        )
    if len(record.data) > page_size:
        raise ValueError(
            f"sample {record.key}: {len(record.data)} bytes do not fit into a page of {page_size}; "
            "make the image smaller, or build tars"
        )


class BetonWriter:
    """Writes one `.beton`; see `shards.target.ShardWriter`.

    Args:
        path: final path.
        temporary: where it is written until then, on the same file system.
        most_records: the tables before the records get room for so many.
        page_size: a power of two, at least 2 MiB.
    """

    def __init__(self, path: Path, temporary: Path, most_records: int, page_size: int = PAGE) -> None:
        self._path, self._temporary = path, temporary
        self._most, self._page_size = most_records, page_size
        self._fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        self._end = self._flushed = data_begin(most_records, page_size)
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self._rows: list[tuple[int, int, int, int, int, int]] = []

    def add(self, record: Record) -> int:
        """Append a record; returns the offset of its bytes in the file.

        Raises:
            ValueError: not a JPEG, or larger than a page.
        """
        _check_record(record, self._page_size)
        size = len(record.data)
        if len(self._rows) == self._most:
            raise ValueError(f"{self._path}: more than the {self._most} records that were announced")
        if self._end % self._page_size + size > self._page_size:
            self._flush()
            # What stays between is never written and reads as zeros.
            self._end = self._flushed = -(-self._end // self._page_size) * self._page_size
        offset = self._end
        self._waiting.append(record.data)
        self._waiting_bytes += size
        self._end += size
        if self._waiting_bytes >= _FLUSH:
            self._flush()
        self._rows.append((record.label, offset, size, record.width, record.height, record.checksum))
        return offset

    def _flush(self) -> None:
        _write_at(self._fd, self._waiting, self._flushed)
        self._flushed += self._waiting_bytes
        self._waiting, self._waiting_bytes = [], 0

    def finish(self) -> ShardFile:
        """Make the file durable under its final name."""
        self._flush()
        names = ("label", "offset", "length", "width", "height")
        columns = {name: [row[i] for row in self._rows] for i, name in enumerate(names)}
        checksum = np.array([row[5] for row in self._rows], np.uint64)
        tables = _Tables(self._page_size, **columns)
        tables.write(self._fd)
        xxh3_128 = digest(self._fd, checksum)
        os.fsync(self._fd)
        os.close(self._fd)
        self._fd = -1
        self._temporary.replace(self._path)
        sync_folder(self._path.parent)
        return ShardFile(name=self._path.name, size=tables.size, samples=len(self._rows), xxh3_128=xxh3_128)

    def __enter__(self) -> BetonWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if kind is not None:
            self._temporary.unlink(missing_ok=True)


class BetonTarget:
    """One FFCV `.beton`, or several; see `shards.target.Target`."""

    storage: Storage = "ffcv"
    suffix = SUFFIX
    beside: tuple[str, ...] = ()
    imports: tuple[str, ...] = ()
    jpeg_only = True
    joined = True

    def __init__(self, page_size: int = PAGE) -> None:
        self._page_size = page_size
        self.most_bytes: int | None = page_size  # no record crosses a page

    def writer(self, path: Path, temporary: Path, most_records: int) -> BetonWriter:
        return BetonWriter(path, temporary, most_records, self._page_size)

    def join(
        self, path: Path, temporary: Path, pieces: Sequence[Path], table: Table
    ) -> tuple[ShardFile, Table]:
        """Put the records of the pieces behind each other, and tables for all of them around; see `Target`.

        A piece goes as soon as the one file durably has it, so the disk holds one piece twice, not the set.
        """
        names = ("label", "offset", "length", "width", "height")
        moves, offset = _moves(len(pieces), table, self._page_size)
        columns = {**table.columns, "offset": offset, "shard": np.zeros(len(table), "<u4")}
        tables = _Tables(self._page_size, **{name: columns[name] for name in names})
        joined = [joined_mark(piece).is_file() for piece in pieces]
        if all(joined) and path.is_file() and not temporary.is_file():
            # Stopped between the final name and the manifest: the tables are written again.
            path.replace(temporary)
        if any(joined) and not temporary.is_file():
            for piece in pieces:
                joined_mark(piece).unlink(missing_ok=True)
            raise ValueError(
                f"{temporary}: gone, with the pieces of {path.name} that were in it; run the same command again, "
                "which writes them again"
            )
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            for piece, is_joined, (begin, size, at) in zip(pieces, joined, moves, strict=True):
                if is_joined:
                    continue
                os.ftruncate(fd, at)  # what an interrupted copy left behind must not show between records
                _copy_piece(piece, begin, fd, at, size)
                os.fsync(fd)
                write_file(joined_mark(piece), b"")
                piece.unlink()
            os.ftruncate(fd, tables.alloc_ptr)
            tables.write(fd)
            xxh3_128 = digest(fd, columns["checksum"])
            os.fsync(fd)
        finally:
            os.close(fd)
        temporary.replace(path)
        sync_folder(path.parent)
        shard = ShardFile(name=path.name, size=tables.size, samples=len(table), xxh3_128=xxh3_128)
        return shard, Table(columns, table.keys_u8)


def _moves(
    pieces: int, table: Table, page_size: int
) -> tuple[list[tuple[int, int, int]], npt.NDArray[np.uint64]]:
    """For each piece where its records begin, how long they are, where they go; and the rows' new offsets."""
    offset, length = (table.columns[name].astype(np.uint64) for name in ("offset", "length"))
    ends = np.cumsum(np.bincount(table.columns["shard"], minlength=pieces)).tolist()
    moves, at = [], data_begin(len(table), page_size)
    for first, end in zip([0, *ends[:-1]], ends, strict=True):
        if first == end:  # every image of it was rejected
            moves.append((0, 0, at))
            continue
        begin, stop = int(offset[first]), int(offset[end - 1] + length[end - 1])
        moves.append((begin, stop - begin, at))
        offset[first:end] += np.uint64(at) - np.uint64(begin)
        at = -(-(at + stop - begin) // page_size) * page_size
    return moves, offset.astype("<u8")


def _copy_piece(piece: Path, begin: int, to: int, at: int, size: int) -> None:
    source = os.open(piece, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _copy_range(source, begin, to, at, size)
    finally:
        os.close(source)


def _copy_range(source: int, begin: int, to: int, at: int, size: int) -> None:
    """Copy bytes between files without taking them into this process, where the kernel can."""
    while size:
        try:
            done = os.copy_file_range(source, to, min(size, _COPY), begin, at)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            data = os.pread(source, min(size, _FLUSH), begin)
            _write_at(to, [data], at)
            done = len(data)
        if not done:
            raise ValueError(
                "a finished piece of the .beton is shorter than when it was written; build again"
            )
        begin, at, size = begin + done, at + done, size - done
