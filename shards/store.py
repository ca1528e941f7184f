"""A shard set as a random-access store of encoded images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.handles import Handles, Mappings
from shards.manifest import Header, Table
from shards.native import library

# Records start on cache lines, so that two threads filling one arena do not share one.
_ALIGN = 64
# Records per native call: bounds the descriptors that one thread holds, however many shards there are.
_CHUNK = 32


class _Memory:
    """Memory as numpy sees it, read-only; arrays made of it keep its owner alive."""

    def __init__(self, address: int, shape: tuple[int, ...], kind: str, owner: object) -> None:
        self._owner = owner
        self.__array_interface__: dict[str, Any] = {
            "version": 3,
            "shape": shape,
            "typestr": kind,
            "data": (address, True),
        }


def owning(span: npt.NDArray[np.int64], *owners: object) -> npt.NDArray[np.int64]:
    """Addresses that keep alive what they point to, as long as anybody holds them or a part of them."""
    return np.asarray(_Memory(span.ctypes.data, span.shape, "<i8", (span, owners)))


@dataclass(frozen=True)
class Records:
    """Encoded images fetched together."""

    span: npt.NDArray[np.int64]
    """(n, 2) int64: address and length in bytes of each record in this process's memory: in the mapped shard where
    its pages were in memory, else in a fresh arena. The memory lives as long as this array or a view of it; a copy
    of it keeps nothing alive."""
    fault: npt.NDArray[np.uint8]
    """(n,) uint8: 0 where the record is sound, else an index into `shards.FAULTS`."""
    errno: npt.NDArray[np.int32]
    """(n,) int32: the system's error number where reading failed, else 0."""

    @cached_property
    def data(self) -> list[npt.NDArray[np.uint8]]:
        """One 1-D read-only uint8 view per record; what was read so far where a record is at fault."""
        return [
            np.asarray(_Memory(address, (length,), "|u1", self.span))
            for address, length in self.span.tolist()
        ]

    @classmethod
    def of(cls, data: Sequence[npt.NDArray[np.uint8]]) -> Records:
        """Records of images in memory, taken to be sound.

        Args:
            data: the encoded bytes of each, 1-D uint8, contiguous.
        """
        nothing = np.zeros((len(data), 2), np.int64)
        sound = cls(nothing, np.zeros(len(data), np.uint8), np.zeros(len(data), np.int32))
        return sound.replaced(dict(enumerate(data)))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles have the bytes: addresses mean nothing in another process."""
        return _with_bytes, ([np.array(data) for data in self.data], self.fault, self.errno)

    def replaced(self, others: Mapping[int, npt.NDArray[np.uint8]]) -> Records:
        """The same records with other bytes in some places; faults stay as they are."""
        span = self.span.copy()
        for place, data in others.items():
            if data.ndim != 1 or data.dtype != np.uint8 or not data.flags.c_contiguous:
                raise ValueError(
                    f"a record is 1-D uint8 and contiguous, got {data.dtype} {data.shape} for record {place}"
                )
            span[place] = data.ctypes.data, data.size
        return replace(self, span=owning(span, self.span, *others.values()))


def _with_bytes(
    data: list[npt.NDArray[np.uint8]], fault: npt.NDArray[np.uint8], errno: npt.NDArray[np.int32]
) -> Records:
    return replace(Records.of(data), fault=fault, errno=errno)


class Store:
    """Random access to the encoded images of a shard set; made by `shards.open`.

    Threads may share a store. It may be pickled and used after a fork: files are opened again there.

    Attributes:
        path: the folder of the shards.
        files: the shard files.
        name: the set's name.
        classes: class names; `label` indexes into them.
        label: (N,) int32, 0 <= label < len(classes).
        width, height: (N,) int32, pixels as stored, before EXIF orientation.
        length: (N,) uint32, bytes of each encoded image.
        checksum: (N,) uint64, xxh3-64 of each encoded image.
        shard: (N,) uint32, index into `files`.
        offset: (N,) uint64, of each encoded image in its file.
        header: the whole manifest header.
    """

    def __init__(
        self,
        files: list[Path],
        header: Header,
        table: Table,
        max_open_files: int,
        reopen: partial[Store],
    ) -> None:
        self.path = files[0].parent if files else Path()
        self.files = files
        self.header = header
        self.name = header.name
        self.classes: list[str] = header.classes
        columns = table.columns
        self.label: npt.NDArray[np.int32] = columns["label"]
        self.width: npt.NDArray[np.int32] = columns["width"]
        self.height: npt.NDArray[np.int32] = columns["height"]
        self.length: npt.NDArray[np.uint32] = columns["length"]
        self.checksum: npt.NDArray[np.uint64] = columns["checksum"]
        self.shard: npt.NDArray[np.uint32] = columns["shard"]
        self.offset: npt.NDArray[np.uint64] = columns["offset"]
        self._table = table
        self._reopen = reopen
        self._handles = Handles(files, header.shards, max_open_files)

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
        begin = int(self.offset[index])
        whole = self._handles.mappings().view(int(self.shard[index]))
        return whole[begin : begin + int(self.length[index])]

    def fetch(self, ids: Sequence[int] | npt.NDArray[Any], check: bool = True, copy: bool = False) -> Records:
        """Get many samples into memory in calls that hold no interpreter lock; from any number of threads.

        What is in the page cache is not copied; the rest is read, all of it announced to the system first.

        Args:
            ids: sample indices, in any order, repeats allowed.
            check: also scan each image's structure and compare its size with the manifest's; what then
                has fault 0 may be handed to a decoder.
            copy: read everything into memory of its own. A file that is cut off while its mapped pages are
                in use ends the process; say True where that may happen.

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
        span = np.zeros((count, 2), dtype=np.int64)
        fault = np.zeros(count, dtype=np.uint8)
        error = np.zeros(count, dtype=np.int32)
        mappings = self._handles.mappings()
        cold = np.arange(count) if copy else self._take_warm(mappings, index, check, span, fault)
        if not len(cold):
            return Records(owning(span, mappings), fault, error)
        arena = self._read_cold(index, cold, check, span, fault, error)
        return Records(owning(span, mappings, arena), fault, error)

    def _take_warm(
        self,
        mappings: Mappings,
        index: npt.NDArray[np.int64],
        check: bool,
        span: npt.NDArray[np.int64],
        fault: npt.NDArray[np.uint8],
    ) -> npt.NDArray[np.int64]:
        """Fill in the records whose pages are in memory; returns the places of the others."""
        length = self.length[index].astype(np.uint64)
        begin = mappings.addresses(self.shard[index])
        address = np.where(begin == 0, np.uint64(0), begin + self.offset[index])
        width, height = self.width[index], self.height[index]
        warm = np.zeros(len(index), dtype=np.uint8)
        library.vqsa_scan_warm(
            len(index),
            address.ctypes.data,
            length.ctypes.data,
            width.ctypes.data if check else None,
            height.ctypes.data if check else None,
            fault.ctypes.data,
            warm.ctypes.data,
        )
        span[:, 0], span[:, 1] = address, length
        return np.flatnonzero(warm == 0)

    def _read_cold(
        self,
        index: npt.NDArray[np.int64],
        cold: npt.NDArray[np.int64],
        check: bool,
        span: npt.NDArray[np.int64],
        fault_all: npt.NDArray[np.uint8],
        error_all: npt.NDArray[np.int32],
    ) -> npt.NDArray[np.uint8]:
        """Read the records at some places into one fresh arena, and return it."""
        index = index[cold]
        shard, offset = self.shard[index], self.offset[index]
        length = self.length[index].astype(np.uint64)
        step = (length + np.uint64(_ALIGN - 1)) & np.uint64(2**64 - _ALIGN)
        place = np.cumsum(step, dtype=np.uint64) - step
        arena = np.empty(int(step.sum()), dtype=np.uint8)
        width, height = self.width[index], self.height[index]
        fault = np.empty(len(cold), dtype=np.uint8)
        error = np.empty(len(cold), dtype=np.int32)
        for begin in range(0, len(cold), _CHUNK):
            part = slice(begin, min(begin + _CHUNK, len(cold)))
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
        span[cold, 0], span[cold, 1] = place + np.uint64(arena.ctypes.data), length
        fault_all[cold], error_all[cold] = fault, error
        return arena

    def key(self, index: int) -> str:
        """The sample's key: its file name in the shard without the extension."""
        return self._table.key(self._index(index))

    def location(self, index: int) -> str:
        """Where a sample is, in words for messages: `imagenet-train-000417.tar, sample n01440764_18`."""
        index = self._index(index)
        return f"{self.header.shards[int(self.shard[index])].name}, sample {self._table.key(index)}"

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
        return self._reopen, ()
