"""Measurements that take turns, by the clock and in CPU time."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable


def _cpu_s() -> float:
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)


class Rows:
    """Measurements by row; the rows of one call take turns, so that a busy moment disturbs all of them."""

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats
        self.rows: dict[str, dict[str, float]] = {}

    def measure(self, images: int, jobs: dict[str, Callable[[], object]], *, cpu_too: bool = True) -> None:
        cpu: dict[str, list[float]] = {name: [] for name in jobs}
        wall: dict[str, list[float]] = {name: [] for name in jobs}
        for turn in range(self.repeats + 1):
            for name, job in jobs.items():
                began_s, cpu_s = time.perf_counter(), _cpu_s()
                job()
                if turn:  # the first turn warms up
                    cpu[name].append(_cpu_s() - cpu_s)
                    wall[name].append(time.perf_counter() - began_s)
        for name in jobs:
            self.rows[name] = {"img_per_s": images / statistics.median(wall[name])}
            if cpu_too:
                self.rows[name]["img_per_cpu_s"] = images / max(statistics.median(cpu[name]), 1e-9)
