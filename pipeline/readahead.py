"""Plans and reads batches several steps ahead, in threads that spend their time outside the GIL.

DALI touches the bytes it is given while holding the GIL, so pages of a cold file would stall every
Python thread; here they are in memory, and checked, before DALI is asked to look at them.
"""

from __future__ import annotations

import functools
import io
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.plan import Plan
from shards import FAULTS, Records, Store

log = logging.getLogger(__name__)

U8 = npt.NDArray[np.uint8]

UNDECODABLE = "passes the structural check, but the decoder rejects it"


class DamagedSampleError(ValueError):
    """A damaged record was met and the policy is to stop."""


@dataclass(frozen=True)
class ReadBatch:
    """A planned batch and its encoded images; damaged ones are replaced."""

    number: int
    plan: Plan
    records: Records
    damaged_B: npt.NDArray[np.bool_]


@functools.lru_cache(maxsize=64)
def grey_jpeg(height: int, width: int) -> U8:
    """Return a mid-grey JPEG of the given size: what stands in for a damaged record."""
    encoded = io.BytesIO()
    Image.new("RGB", (width, height), (128, 128, 128)).save(encoded, "JPEG")
    return np.frombuffer(encoded.getvalue(), np.uint8)


class Damage:
    """The damaged samples met so far: named once in the log, counted, replaced or fatal by policy.

    Args:
        store: for the names in messages.
        policy: "replace" or "stop".
    """

    def __init__(self, store: Store, policy: str) -> None:
        self._store = store
        self._policy = policy
        self._lock = threading.Lock()
        self.reasons: dict[int, str] = {}
        # (epoch, sample) whose window the decoder rejected. Another epoch's window may decode, so that what is
        # replaced stays a function of seed, epoch and sample id.
        self.rejected: set[tuple[int, int]] = set()

    def reject(self, epoch: int, sample: int) -> None:
        """Note that the decoder fails on a sample's window of one epoch."""
        self.rejected.add((epoch, sample))
        self.record(sample, UNDECODABLE)

    def record(self, sample: int, reason: str) -> None:
        """Note that a sample is damaged; raises DamagedSampleError under the policy "stop"."""
        with self._lock:
            new = sample not in self.reasons
            self.reasons[sample] = reason
        message = f"{self._store.location(sample)}: {reason}"
        if self._policy == "stop":
            raise DamagedSampleError(
                f"{message}; repair the source and rebuild the shard, or say on_damaged = 'replace' to go on "
                "with a grey image in its place"
            )
        if new:
            log.warning("damaged sample replaced by a grey image: %s (%d so far)", message, len(self.reasons))


class ReadAhead:
    """Hands out batches in order while later ones are planned and read by a thread pool.

    Args:
        store: the records.
        plan_at: batch number to its plan; called from pool threads.
        damage: where damaged samples are noted.
        threads: pool size.
        depth: batches read ahead.
    """

    def __init__(
        self, store: Store, plan_at: Callable[[int], Plan], damage: Damage, *, threads: int, depth: int
    ) -> None:
        self._store = store
        self._plan_at = plan_at
        self._damage = damage
        self._depth = depth
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="vqsa-read")
        self._ahead: deque[Future[ReadBatch]] = deque()
        self._next = 0
        self._reading: dict[int, tuple[float, list[int]]] = {}  # batch number: since when, which samples

    def seek(self, number: int) -> None:
        """Make `number` the next batch handed out; what was read ahead is dropped."""
        for future in self._ahead:
            future.cancel()
        self._ahead.clear()
        self._next = number

    def read(self, number: int) -> ReadBatch:
        """Plan and read one batch now, in the calling thread."""
        plan = self._plan_at(number)
        self._reading[number] = (time.monotonic(), plan.sample_B.tolist())
        try:
            records = self._store.fetch(plan.sample_B, check=True)
        finally:
            self._reading.pop(number, None)
        grey: dict[int, U8] = {}
        damaged_B = records.fault != 0
        for i in np.flatnonzero(damaged_B).tolist():
            if records.errno[i]:
                # A disk or a network that fails says nothing about the image: never train on grey because of it.
                number = int(records.errno[i])
                where = self._store.location(int(plan.sample_B[i]))
                raise OSError(number, f"reading {where} failed: {os.strerror(number)}")
            self._damage.record(int(plan.sample_B[i]), FAULTS[int(records.fault[i])])
        for i, (epoch, sample) in enumerate(zip(plan.epoch_B.tolist(), plan.sample_B.tolist(), strict=True)):
            damaged_B[i] |= (epoch, sample) in self._damage.rejected
            if damaged_B[i]:
                grey[i] = grey_jpeg(int(self._store.height[sample]), int(self._store.width[sample]))
        return ReadBatch(number, plan, records.replaced(grey) if grey else records, damaged_B)

    def reading(self) -> str:
        """Say which reads are going on, longest first, for a message about a stuck source."""
        now_s = time.monotonic()
        going = sorted(self._reading.copy().items(), key=lambda item: item[1][0])
        if not going:
            return "no record is being read: the decoder or the corruptions are at work"
        lines = []
        for number, (since_s, samples) in going:
            files = sorted({self._store.location(sample).split(",")[0] for sample in samples})
            lines.append(
                f"batch {number} ({len(samples)} records from {', '.join(files[:4])}"
                f"{', …' if len(files) > 4 else ''}; first {self._store.location(samples[0])}) "
                f"for {now_s - since_s:.0f} s"
            )
        return "reading " + "; ".join(lines)

    def next(self) -> ReadBatch:
        """Return the next batch, waiting for it if need be; raises what planning or reading raised."""
        while len(self._ahead) < self._depth:
            self._ahead.append(self._pool.submit(self.read, self._next))
            self._next += 1
        return self._ahead.popleft().result()

    def close(self) -> None:
        """Stop the threads; what they still read is dropped."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._ahead.clear()
