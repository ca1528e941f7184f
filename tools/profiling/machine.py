"""What the machine really gives this process: CPU cores, and the rate of a matrix product."""

from __future__ import annotations

import hashlib
import os
import threading
import time

import torch

from tools.profiling.clock import Probe
from tools.profiling.table import Spread


def spin(seconds: float = 0.2) -> int:
    """Keep every CPU core busy; returns 1, so that it can be measured by a probe."""
    stop_s = time.perf_counter() + seconds
    block = bytes(1 << 20)

    def work() -> None:
        while time.perf_counter() < stop_s:
            hashlib.sha256(block)  # without the interpreter lock

    threads = [threading.Thread(target=work) for _ in range(len(os.sched_getaffinity(0)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return 1


def cores_of(spinning: Probe) -> float:
    """Return how many CPU cores this process gets when it asks for all: CPU seconds per second of `spin`.

    Counts what affinity, quotas, other programs and other ranks leave, which no setting tells.
    """
    return Spread.of([reading.cpu_s / reading.wall_s for reading in spinning.readings]).p50


def matmul_peak_tflops(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Return the best rate of a square matrix product in this process, in TFLOP/s."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best_s = float("inf")
    end_s = time.perf_counter() + seconds

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    torch.mm(a, b)
    finish()
    while True:
        began_s = time.perf_counter()
        torch.mm(a, b)
        finish()
        best_s = min(best_s, time.perf_counter() - began_s)
        if time.perf_counter() > end_s:
            return 2 * side**3 / best_s / 1e12


def available_bytes() -> int:
    """Return the memory this machine, or the control group this process is in, still has."""
    found = []
    with open("/proc/meminfo") as file:
        found += [int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable")]
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            with open(limit) as most, open(used) as now:
                found.append(int(most.read()) - int(now.read()))
        except (OSError, ValueError):
            continue  # no such control group, or it says "max"
    return min(found)
