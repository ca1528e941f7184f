"""Times planning and reading: from the page cache, from the disk, and as this run finds it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from pipeline.config import PipelineConfig
from pipeline.order import Order
from pipeline.philox import I64
from pipeline.plan import Plan, TrainingPlanner
from shards import FAULTS, Store
from tools.profiling.clock import Probe, Reading
from tools.profiling.page_cache import evict, resident_share
from tools.profiling.table import Spread, Stage

_LOOK = 256  # records asked whether they are in the page cache
_WORST_SHARE = 0.1  # of damaged records above which times would say nothing


class Reader:
    """Fetches batches as the loader's threads do: `read_threads` of them at a time.

    Args:
        store: the records.
        config: the run's data settings.
        seed: of the sample order.
        batch: samples of a batch.
    """

    def __init__(self, store: Store, config: PipelineConfig, seed: int, batch: int) -> None:
        self._store, self._batch, self._threads = store, batch, config.read_threads
        self._order = Order(len(store), seed)
        self._planner = TrainingPlanner(config, seed, store.height, store.width)
        self._pool = ThreadPoolExecutor(config.read_threads)
        self._number = 0

    def ids(self) -> I64:
        """Return the sample ids of the next batch of the stream."""
        self._number += 1
        start = self._number * self._batch
        _, sample_B = self._order.at(np.arange(start, start + self._batch, dtype=np.int64))
        return sample_B

    def plan_at(self, number: int) -> Plan:
        """Return the plan of batch `number` of the stream."""
        position_B = np.arange(number * self._batch, (number + 1) * self._batch, dtype=np.int64)
        return self._planner.plan(position_B, *self._order.at(position_B))

    def plan(self) -> int:
        """Plan a batch."""
        self._number += 1
        self.plan_at(self._number)
        return self._batch

    def several(self) -> list[I64]:
        """Return the sample ids of one batch per thread."""
        return [self.ids() for _ in range(self._threads)]

    def fetch(self, parts: list[I64] | None = None) -> int:
        """Fetch one batch per thread, at the same time."""
        parts = parts or self.several()
        for records in self._pool.map(lambda ids: self._store.fetch(ids, check=True), parts):
            del records
        return sum(len(part) for part in parts)

    def cold(self, rounds: int, progress: Callable[[str], None]) -> list[Reading]:
        """Read batches whose pages were dropped before; dropping is not timed."""
        readings = []
        for turn in range(rounds):
            progress(f"read, cold, {turn + 1} of {rounds}")
            parts = self.several()
            for part in parts:
                evict(self._store, part)
            cpu_s, began_s = time.process_time(), time.perf_counter()
            images = self.fetch(parts)
            wall_s, cpu_s = time.perf_counter() - began_s, time.process_time() - cpu_s
            readings.append(Reading(wall_s / images, cpu_s / images, None))
        return readings

    def resident(self) -> float | None:
        """Return the share of the set that is in the page cache, from a sample of it."""
        chosen = np.random.default_rng(0).integers(0, len(self._store), _LOOK)
        return resident_share(self._store, chosen)

    def check(self) -> list[str]:
        """Look at the first batches; returns a warning for damaged records.

        Raises:
            ValueError: so many are damaged that times of what stands in for them would say nothing.
        """
        ids = np.concatenate([self.ids() for _ in range(max(1, -(-_LOOK // self._batch)))])
        records = self._store.fetch(ids, check=True)
        bad = np.flatnonzero(records.fault)
        if not len(bad):
            return []
        first = f"{self._store.location(int(ids[bad[0]]))}: {FAULTS[int(records.fault[bad[0]])]}"
        words = f"{len(bad)} of {len(ids)} records looked at are damaged (first: {first})"
        if len(bad) > _WORST_SHARE * len(ids):
            raise ValueError(
                f"{self._store.path}: {words}; times of the grey images in their place would say nothing. Run "
                "tools/verify_shards.py and rebuild what it names"
            )
        return [f"{words}; grey images stand in for them. Run tools/verify_shards.py"]

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown()


def probes(reader: Reader) -> Iterator[Probe]:
    """What can be measured in turns: planning, and reading what is in the page cache."""
    yield Probe("plan", reader.plan)
    warm = reader.several()
    yield Probe("read, warm", lambda: reader.fetch(warm))


def stages(measured: dict[str, Probe], cold: list[Reading], resident: float | None) -> list[Stage]:
    """Return the stages of the reading lane; what counts is the mixture of warm and cold that the run finds.

    Args:
        resident: share of the set in the page cache; None counts as all of it.
    """
    warm = measured["read, warm"]
    share = 1.0 if resident is None else resident
    cold_wall, cold_cpu = Spread.of([r.wall_s for r in cold]), Spread.of([r.cpu_s for r in cold])

    def mixed(a: Spread, b: Spread) -> Spread:
        return Spread(
            **{q: share * getattr(a, q) + (1 - share) * getattr(b, q) for q in ("p20", "p50", "p80")}
        )

    known = "the system does not tell what is in the page cache; taken as warm"
    note = known if resident is None else f"{100 * share:.0f} % of the set is in the page cache"
    return [
        measured["plan"].stage("read"),
        Stage(
            name="read",
            lane="read",
            wall_s=mixed(warm.wall(), cold_wall),
            cpu_s=mixed(warm.cpu(), cold_cpu),
            note=note,
        ),
        warm.stage("shown", note="from the page cache"),
        Stage(name="read, cold", lane="shown", wall_s=cold_wall, cpu_s=cold_cpu, note="from the disk"),
    ]
