"""Which sample stands at which position of the stream.

Training is one endless stream of positions. Global batch k is positions [k*B, (k+1)*B), and
position p is visit number p % N of epoch p // N, so a batch may span two epochs and none is ever
partial or dropped. The order is a pure function of (seed, epoch): any rank, batch size or restart
sees the same stream.
"""

from __future__ import annotations

import threading

import numpy as np

from pipeline.philox import I64, Purpose, as_u64, draw


def permutation(samples: int, seed: int, epoch: int) -> I64:
    """Return the order of one epoch: int64, shape (samples,), each id once.

    Every sample gets a 64-bit Philox key and the samples are sorted by it; equal keys (about one
    pair in 2e7 epochs of ImageNet) fall back to the id, so the result is the same everywhere.
    """
    key_N = as_u64(draw(seed, epoch, np.arange(samples, dtype=np.uint64), Purpose.ORDER)[:, :2])
    return np.argsort(key_N, kind="stable").astype(np.int64)


class Order:
    """The stream of sample ids of one data set, position by position. Thread-safe.

    Args:
        samples: N, at least 1.
        seed: the run's seed.
    """

    def __init__(self, samples: int, seed: int) -> None:
        if samples < 1:
            raise ValueError(f"an order needs at least one sample, got {samples}")
        self.samples = samples
        self.seed = seed
        self._epochs: dict[int, I64] = {}
        self._lock = threading.Lock()

    def _epoch(self, epoch: int) -> I64:
        with self._lock:
            if epoch not in self._epochs:
                # A batch looks at two neighbouring epochs at most, unless it is larger than the set.
                while len(self._epochs) > 1:
                    del self._epochs[min(self._epochs)]
                self._epochs[epoch] = permutation(self.samples, self.seed, epoch)
            return self._epochs[epoch]

    def at(self, position_B: I64) -> tuple[I64, I64]:
        """Return (epoch, sample id) of each position, both int64 of shape (B,)."""
        epoch_B, visit_B = np.divmod(position_B, self.samples)
        sample_B = np.empty_like(position_B)
        for epoch in np.unique(epoch_B):
            here = epoch_B == epoch
            sample_B[here] = self._epoch(int(epoch))[visit_B[here]]
        return epoch_B, sample_B


def batch_positions(step: int, micro: int, rank: int, *, batch: int, ranks: int, micros: int) -> I64:
    """Return the stream positions of one rank's micro-batch of global batch `step`.

    Args:
        step: number of the global batch, from 0.
        micro: which of the `micros` gradient-accumulation parts.
        rank: global rank of the process, in [0, ranks).
        batch: global batch size; must be a multiple of ranks * micros.

    The union over ranks and micro-batches is [step*batch, (step+1)*batch) whatever their numbers.
    """
    if batch % (ranks * micros):
        raise ValueError(
            f"the global batch ({batch}) must divide evenly over {ranks} processes x {micros} accumulation "
            f"steps; choose a multiple of {ranks * micros}"
        )
    size = batch // (ranks * micros)
    start = step * batch + (micro * ranks + rank) * size
    return np.arange(start, start + size, dtype=np.int64)
