"""Open shard files: a bounded set of descriptors for `pread`, and mappings that hold none."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.manifest import ShardFile
from shards.native import library

_UNKNOWN = 2**64 - 1


def _wrong_size(path: Path, wanted: int, found: int) -> ValueError:
    return ValueError(
        f"{path}: {found} bytes, the manifest says {wanted}; the shard is cut off or from another build: "
        "copy or build the set again"
    )


def _missing(path: Path) -> FileNotFoundError:
    return FileNotFoundError(
        f"{path}: shard file missing, the manifest lists it; copy or build the set again"
    )


def check_file(path: Path, shard: ShardFile) -> None:
    """Raise FileNotFoundError or ValueError unless the shard file is there and of its size."""
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        raise _missing(path) from None
    if found != shard.size:
        raise _wrong_size(path, shard.size, found)


class _Mapping:
    """A read-only mapping of one file; numpy arrays made from it keep it alive."""

    def __init__(self, path: Path, size: int) -> None:
        found, address = ctypes.c_uint64(size), ctypes.c_void_p()
        error = library.vqsa_map_file(os.fsencode(path), ctypes.byref(found), ctypes.byref(address))
        if error == errno.ESTALE:
            raise _wrong_size(path, size, found.value)
        if error == errno.ENOENT:
            raise _missing(path)
        if error:
            raise OSError(error, f"{os.strerror(error)}: cannot map the shard", str(path))
        self._address, self._size = address, size
        self.__array_interface__: dict[str, Any] = {
            "version": 3,
            "shape": (size,),
            "typestr": "|u1",
            "data": (address.value, True),
        }

    def __del__(self) -> None:
        if hasattr(self, "_address"):
            library.vqsa_unmap_file(self._address, self._size)


class Mappings:
    """Shard files mapped so far. Whoever holds this object may use the addresses it gave. Thread-safe."""

    def __init__(self, files: list[Path], shards: list[ShardFile]) -> None:
        self._files, self._shards = files, shards
        self._lock = threading.Lock()
        self._views: dict[int, npt.NDArray[np.uint8]] = {}
        self._begin = np.full(len(files), _UNKNOWN, np.uint64)

    def view(self, shard: int) -> npt.NDArray[np.uint8]:
        """The bytes of a whole shard file, read-only."""
        view = self._views.get(shard)
        if view is None:
            with self._lock:
                view = self._views.get(shard)
                if view is None:
                    view = np.asarray(_Mapping(self._files[shard], self._shards[shard].size))
                    self._views[shard] = view
        return view

    def addresses(self, shard: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint64]:
        """Where the files of some shards are mapped; 0 where it cannot be told which pages are in memory."""
        for number in set(shard[self._begin[shard] == _UNKNOWN].tolist()):
            self._begin[number] = self._address(number)
        return self._begin[shard]

    def _address(self, shard: int) -> int:
        try:
            begin: int = self.view(shard).ctypes.data
        except OSError as error:
            if error.errno == errno.ENOMEM:  # more shards than a process may map
                return 0
            raise
        # The kernel tells the owner of a file, and those who may write it, which pages are in memory;
        # everybody else is told that all of them are.
        path = self._files[shard]
        return begin if os.access(path, os.W_OK) or path.stat().st_uid == os.geteuid() else 0


class Handles:
    """Descriptors and mappings of a set's shard files, opened when first needed. Thread-safe.

    Args:
        files: the shard files.
        shards: the manifest's list of them; a file of another size is refused when it is opened.
        max_open: descriptors kept open at a time, beyond those in use.
    """

    def __init__(self, files: list[Path], shards: list[ShardFile], max_open: int) -> None:
        self._files, self._shards, self._max_open = files, shards, max_open
        self._start()
        _all.add(self)

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._fds: OrderedDict[int, int] = OrderedDict()
        self._users: dict[int, int] = {}
        self._mappings = Mappings(self._files, self._shards)

    def mappings(self) -> Mappings:
        """The mappings in use; `close` replaces them, and they go when nobody holds them any more."""
        return self._mappings

    def acquire(self, shards: Iterable[int]) -> dict[int, int]:
        """Descriptors of some shards, open until `release` of the same shards."""
        fds: dict[int, int] = {}
        with self._lock:
            try:
                for shard in shards:
                    if shard not in self._fds:
                        self._close_surplus(self._max_open - 1)
                        self._fds[shard] = self._open(shard)
                    self._fds.move_to_end(shard)
                    self._users[shard] = self._users.get(shard, 0) + 1
                    fds[shard] = self._fds[shard]
            except BaseException:
                self._release(fds)
                raise
        return fds

    def release(self, shards: Iterable[int]) -> None:
        """Give back what `acquire` returned; unused descriptors beyond the bound are closed."""
        with self._lock:
            self._release(shards)

    def _release(self, shards: Iterable[int]) -> None:
        for shard in shards:
            self._users[shard] -= 1
            if not self._users[shard]:
                del self._users[shard]
        self._close_surplus(self._max_open)

    def _close_surplus(self, keep: int) -> None:
        surplus = len(self._fds) - keep
        if surplus > 0:  # the least recently used come first
            for shard in [shard for shard in self._fds if shard not in self._users][:surplus]:
                os.close(self._fds.pop(shard))

    def _open(self, shard: int) -> int:
        info, path = self._shards[shard], self._files[shard]
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise _missing(path) from None
        found = os.fstat(fd).st_size
        if found != info.size:
            os.close(fd)
            raise _wrong_size(path, info.size, found)
        return fd

    def close(self) -> None:
        """Close the descriptors nobody reads through and let go of the mappings; views stay valid."""
        with self._lock:
            for shard in [s for s in self._fds if s not in self._users]:
                os.close(self._fds.pop(shard))
            self._mappings = Mappings(self._files, self._shards)


_all: weakref.WeakSet[Handles] = weakref.WeakSet()


def _start_over() -> None:
    # After a fork the locks may be held by threads that do not exist here. The descriptors that came along stay the
    # parent's business and are not closed.
    for handles in _all:
        handles._start()


os.register_at_fork(after_in_child=_start_over)
