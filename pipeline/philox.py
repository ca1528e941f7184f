"""Philox4x32-10, the counter-based generator behind every random choice of the pipeline, in numpy.

A draw is a pure function of (key, counter): no state, so a sample's randomness does not depend on
which process, batch or restart it is met in. The corruption core has the same function in C++.
Own code rather than numpy.random.Philox, because numpy may change its streams between versions.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import numpy.typing as npt

U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = np.uint64(0xFFFFFFFF)
_ROUNDS = 10


class Purpose(IntEnum):
    """What a draw is for: part of the counter, so that two uses never share a stream."""

    ORDER = 0
    CROP = 1
    FLIP = 2
    CORRUPTION = 3
    NOISE_KEY = 4
    BAG = 5
    EVALUATION = 6
    MIX = 7
    AUGMIX = 8
    MONITOR = 9


def philox4x32(counter_N4: U32, key: tuple[int, int]) -> U32:
    """Return four 32-bit words for each counter.

    Args:
        counter_N4: uint32, shape (N, 4).
        key: two 32-bit words.

    Returns:
        uint32, shape (N, 4).
    """
    c0, c1, c2, c3 = (counter_N4[:, i].astype(np.uint64) for i in range(4))
    k0, k1 = key[0] & 0xFFFFFFFF, key[1] & 0xFFFFFFFF
    for _ in range(_ROUNDS):
        p0, p1 = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = (
            (p1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            p1 & _LOW,
            (p0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            p0 & _LOW,
        )
        k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def draw(
    seed: int, epoch: npt.ArrayLike, index: npt.ArrayLike, purpose: Purpose, block: npt.ArrayLike = 0
) -> U32:
    """Return four 32-bit words for each (epoch, index, block): the pipeline's only source of randomness.

    Args:
        seed: the run's seed, 0 <= seed < 2**64.
        epoch: scalar or (N,), below 2**32.
        index: scalar or (N,): a sample id (or bag number), below 2**48.
        purpose: what the words are for.
        block: scalar or (N,): further blocks of four words for the same purpose, below 2**32.

    Returns:
        uint32, shape (N, 4).
    """
    index_N, epoch_N, block_N = np.broadcast_arrays(
        *(np.atleast_1d(np.asarray(x, np.uint64)) for x in (index, epoch, block))
    )
    counter_N4 = np.empty((len(index_N), 4), np.uint32)
    counter_N4[:, 0] = index_N & _LOW
    counter_N4[:, 1] = (index_N >> np.uint64(32)) | np.uint64(int(purpose) << 16)
    counter_N4[:, 2] = epoch_N
    counter_N4[:, 3] = block_N
    return philox4x32(counter_N4, (seed & 0xFFFFFFFF, seed >> 32))


def as_u64(words_N2: U32) -> U64:
    """Join pairs of words into 64-bit integers, shape (N, 2) to (N,)."""
    return (words_N2[:, 0].astype(np.uint64) << np.uint64(32)) | words_N2[:, 1].astype(np.uint64)


def below(words_N: U32, bound: npt.ArrayLike) -> I64:
    """Map 32-bit words to integers in [0, bound); the bias is below bound / 2**32."""
    return ((words_N.astype(np.uint64) * np.asarray(bound, np.uint64)) >> np.uint64(32)).astype(np.int64)


def unit(words_N: U32) -> npt.NDArray[np.float64]:
    """Map 32-bit words to float64 in [0, 1)."""
    return words_N.astype(np.float64) * 2.0**-32
