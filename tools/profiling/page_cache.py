"""Which records lie in the system's page cache, and how to take them out, so that cold reading can be measured."""

from __future__ import annotations

import ctypes
import os
from collections import defaultdict

import numpy as np
import numpy.typing as npt

from pipeline.philox import I64
from shards import Store

_BUNDLE = 2 << 20  # bytes of the largest bundle of pages
_MADV_DONTNEED = 4
_libc = ctypes.CDLL(None, use_errno=True)


def _extents(store: Store, sample_B: I64) -> dict[int, list[tuple[int, int]]]:
    """Return shard number to (offset, bytes) of the samples."""
    found: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for sample in sample_B.tolist():
        found[int(store.shard[sample])].append((int(store.offset[sample]), int(store.length[sample])))
    return found


def _open(store: Store, shard: int) -> int:
    return os.open(store.files[shard], os.O_RDONLY)


def evict(store: Store, sample_B: I64) -> None:
    """Take these records out of the page cache, with up to 2 MiB of neighbours on either side."""
    for shard, pieces in _extents(store, sample_B).items():
        # Pages that a process has mapped are not dropped: out of this process's page table with them first.
        sample = int(sample_B[np.argmax(store.shard[sample_B] == shard)])
        view = store.read(sample)
        _let_go(view.base if isinstance(view.base, np.ndarray) else view)
        descriptor = _open(store, shard)
        try:
            os.fdatasync(descriptor)  # pages that wait to be written are not dropped either
            for offset, length in pieces:
                # The cache holds pages in bundles, which go as a whole or not at all.
                first = offset // _BUNDLE * _BUNDLE
                end = -(-(offset + length) // _BUNDLE) * _BUNDLE
                os.posix_fadvise(descriptor, first, end - first, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _let_go(mapping: npt.NDArray[np.uint8]) -> None:
    """Take the pages of a file's mapping out of this process; the next look at them finds them again."""
    if _libc.madvise(ctypes.c_void_p(mapping.ctypes.data), ctypes.c_size_t(mapping.nbytes), _MADV_DONTNEED):
        error = ctypes.get_errno()
        raise OSError(error, f"madvise: {os.strerror(error)}")


def resident_share(store: Store, sample_B: I64) -> float | None:
    """Return the share of these records whose first page is in the page cache; None where the system cannot tell."""
    there = 0
    for shard, pieces in _extents(store, sample_B).items():
        descriptor = _open(store, shard)
        try:
            for offset, _ in pieces:
                try:
                    there += bool(os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT))
                except BlockingIOError:
                    pass  # not there: the answer
                except OSError:
                    return None  # this file system knows no such question
        finally:
            os.close(descriptor)
    return there / max(1, len(sample_B))
