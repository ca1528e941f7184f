"""A shard set as a random-access store of encoded images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.handles import Handles, check_file
from shards.manifest import Header, Table, read_header, read_table
from shards.native import library

# Records start on cache lines, so that two threads filling one arena do not share one.
_ALIGN = 64
# Records per native call: bounds the descriptors that one thread holds, however many shards there are.
_CHUNK = 32


@dataclass(frozen=True, slots=True)
class Records:
    """Encoded images fetched together."""

    data: list[npt.NDArray[np.uint8]]
    """One 1-D view per record into one fresh arena; what was read so far where a record is at fault."""
    fault: npt.NDArray[np.uint8]
    """(n,) uint8: 0 where the record is sound, else an index into `shards.FAULTS`."""
    errno: npt.NDArray[np.int32]
    """(n,) int32: the system's error number where reading failed, else 0."""


class Store:
    """Random access to the encoded images of a shard set; made by `shards.open`.

    Threads may share a store. It may be pickled and used after a fork: files are opened again there.

    Attributes:
        name: the set's name.
        classes: class names; `label` indexes into them.
        label: (N,) int32, 0 <= label < len(classes).
        width, height: (N,) int32, pixels as stored, before EXIF orientation.
        length: (N,) uint32, bytes of each encoded image.
        checksum: (N,) uint64, xxh3-64 of each encoded image.
        header: the whole manifest header.
    """

    def __init__(self, path: Path, header: Header, table: Table, max_open_files: int) -> None:
        self.path = path
        self.header = header
        self.name = header.name
        self.classes: list[str] = header.classes
        columns = table.columns
        self.label: npt.NDArray[np.int32] = columns["label"]
        self.width: npt.NDArray[np.int32] = columns["width"]
        self.height: npt.NDArray[np.int32] = columns["height"]
        self.length: npt.NDArray[np.uint32] = columns["length"]
        self.checksum: npt.NDArray[np.uint64] = columns["checksum"]
        self._shard: npt.NDArray[np.uint32] = columns["shard"]
        self._offset: npt.NDArray[np.uint64] = columns["offset"]
        self._table = table
        self._max_open_files = max_open_files
        self._handles = Handles(path, header.shards, max_open_files)

    def __len__(self) -> int:
        return self.header.samples

    def __repr__(self) -> str:
        return (
            f"<shards.Store {self.name}: {len(self)} samples, {len(self.classes)} classes, "
            f"{len(self.header.shards)} shards in {self.path}>"
        )

    def _index(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} is outside 0..{len(self) - 1} of {self.name} ({self.path})")
        return int(index)

    def read(self, index: int) -> npt.NDArray[np.uint8]:
        """The encoded bytes of one sample: 1-D uint8, read-only, a view into the mapped shard.

        The view stays valid after `close`. A page that is not in memory is read while the interpreter
        lock is held; use `fetch` for samples that may be cold.

        Raises:
            IndexError: index outside 0..N-1.
            FileNotFoundError, ValueError: the shard file is gone or of another size.
        """
        index = self._index(index)
        begin = int(self._offset[index])
        return self._handles.mapped(int(self._shard[index]))[begin : begin + int(self.length[index])]

    def fetch(self, ids: Sequence[int] | npt.NDArray[Any], check: bool = True) -> Records:
        """Read many samples in one call that holds no interpreter lock; from any number of threads.

        Args:
            ids: sample indices, in any order, repeats allowed.
            check: also scan each image's structure and compare its size with the manifest's; what then
                has fault 0 may be handed to a decoder.

        Returns:
            The records in the order of `ids`; damaged ones are marked, not raised.

        Raises:
            IndexError: an id outside 0..N-1.
            FileNotFoundError, ValueError: a shard file is gone or of another size.
        """
        index = np.asarray(ids)
        if index.ndim != 1 or (index.size and not np.issubdtype(index.dtype, np.integer)):
            raise TypeError(f"fetch needs a 1-D sequence of integers, got {index.dtype} {index.shape}")
        index = index.astype(np.int64, copy=False)
        count = len(index)
        outside = (index < 0) | (index >= len(self))
        if outside.any():
            self._index(int(index[np.argmax(outside)]))
        shard = self._shard[index]
        offset = self._offset[index]
        length = self.length[index].astype(np.uint64)
        step = (length + np.uint64(_ALIGN - 1)) & np.uint64(2**64 - _ALIGN)
        place = np.cumsum(step, dtype=np.uint64) - step
        arena = np.empty(int(step.sum()), dtype=np.uint8)
        width, height = self.width[index], self.height[index]
        fault = np.empty(count, dtype=np.uint8)
        error = np.empty(count, dtype=np.int32)

        for begin in range(0, count, _CHUNK):
            part = slice(begin, min(begin + _CHUNK, count))
            used = set(shard[part].tolist())
            open_fds = self._handles.acquire(used)
            try:
                fd = np.array([open_fds[s] for s in shard[part].tolist()], dtype=np.int32)
                library.vqsa_read_records(
                    len(fd),
                    fd.ctypes.data,
                    offset[part].ctypes.data,
                    length[part].ctypes.data,
                    arena.ctypes.data,
                    arena.size,
                    place[part].ctypes.data,
                    width[part].ctypes.data if check else None,
                    height[part].ctypes.data if check else None,
                    fault[part].ctypes.data,
                    error[part].ctypes.data,
                )
            finally:
                self._handles.release(used)
        data = [arena[a : a + n] for a, n in zip(place.tolist(), length.tolist(), strict=True)]
        return Records(data, fault, error)

    def key(self, index: int) -> str:
        """The sample's key: its file name in the shard without the extension."""
        return self._table.key(self._index(index))

    def location(self, index: int) -> str:
        """Where a sample is, in words for messages: `imagenet-train-000417.tar, sample n01440764_18`."""
        index = self._index(index)
        return f"{self.header.shards[int(self._shard[index])].name}, sample {self._table.key(index)}"

    def close(self) -> None:
        """Close what is open; a later read opens it again."""
        self._handles.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # Only a store whose constructor finished has handles.
        if hasattr(self, "_handles"):
            self._handles.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path, self.header.table.xxh3_128, self._max_open_files)


def open(path: str | os.PathLike[str], max_open_files: int = 128) -> Store:
    """Open a shard set.

    Args:
        path: the folder that tools/build_shards.py wrote.
        max_open_files: descriptors kept open for `Store.fetch`; mappings of `Store.read` hold none.

    Raises:
        FileNotFoundError: no such folder, no manifest (the build is unfinished), or a shard missing.
        ValueError: a manifest of another version, damaged, or not matching its shard files.
    """
    folder = Path(path).absolute()
    header = read_header(folder)
    table = read_table(folder, header)
    for shard in header.shards:
        check_file(folder / shard.name, shard)
    return Store(folder, header, table, max_open_files)


def _reopen(path: Path, table_xxh3_128: str, max_open_files: int) -> Store:
    store = open(path, max_open_files)
    if store.header.table.xxh3_128 != table_xxh3_128:
        raise ValueError(f"{path}: the shard set was built again since this store was opened; open it anew")
    return store
