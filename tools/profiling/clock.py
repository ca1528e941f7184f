"""Repeated measurements in turns, so that a machine that slows down slows everything alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from tools.profiling.table import Lane, Spread, Stage


def settle(limit_s: float = 2.0) -> None:
    """Wait until this process's own threads rest, so that none of their work falls into a measurement."""
    end_s = time.perf_counter() + limit_s
    while time.perf_counter() < end_s:
        began_s = time.process_time()
        time.sleep(0.02)
        if time.process_time() - began_s < 0.002:
            return


def nothing() -> None:
    """Do nothing."""


@dataclass(frozen=True)
class Reading:
    """One measurement: seconds per image of this process."""

    wall_s: float
    cpu_s: float
    device_s: float | None


@dataclass
class Probe:
    """Something to measure.

    step: does it once and returns the images it did it for.
    device: whether its work is queued on torch's stream, so that CUDA events can time it.
    prepare: brings what it measures into the state of a long run; called before each measurement.
    finish: takes down what the steps left behind; called after each measurement, once the device is done.
    """

    name: str
    step: Callable[[], int]
    device: bool = False
    prepare: Callable[[], None] = settle
    finish: Callable[[], None] = nothing
    readings: list[Reading] = field(default_factory=list)

    def wall(self) -> Spread:
        """Seconds per image."""
        return Spread.of([reading.wall_s for reading in self.readings])

    def cpu(self) -> Spread:
        """CPU seconds per image."""
        return Spread.of([reading.cpu_s for reading in self.readings])

    def on_device(self) -> Spread | None:
        """GPU seconds per image; None on a CPU."""
        values = [reading.device_s for reading in self.readings if reading.device_s is not None]
        return Spread.of(values) if values else None

    def stage(self, lane: Lane, name: str = "", note: str = "") -> Stage:
        """Return what was measured as a stage."""
        return Stage(
            name=name or self.name,
            lane=lane,
            wall_s=self.wall(),
            cpu_s=self.cpu(),
            device_s=self.on_device(),
            note=note,
        )

    def of_rounds(self, turns: Sequence[int]) -> Probe:
        """Return the probe with the readings of these rounds only."""
        return replace(self, readings=[self.readings[turn] for turn in turns])


WARM_UP = 3  # calls of each probe before the first that counts


def _once(probe: Probe, steps: int) -> Reading:
    cuda = torch.cuda.is_available()
    timed = cuda and probe.device
    images = 0
    if cuda:
        torch.cuda.synchronize()
    events: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if timed else []  # type: ignore[no-untyped-call]
    cpu_s, began_s = time.process_time(), time.perf_counter()
    if timed:
        events[0].record()
    for _ in range(steps):
        images += probe.step()
    if timed:
        events[1].record()
        # Only what queueing took: waiting for the device keeps a core busy with nothing.
        cpu_s = time.process_time() - cpu_s
    if cuda:
        torch.cuda.synchronize()
    wall_s = time.perf_counter() - began_s
    if not timed:
        cpu_s = time.process_time() - cpu_s
    device_s = events[0].elapsed_time(events[1]) / 1000 / images if timed else None
    return Reading(wall_s / images, cpu_s / images, device_s)


def measure(
    probes: Sequence[Probe],
    *,
    rounds: int,
    seconds: float,
    agree: Callable[[int], int] = lambda steps: steps,
    progress: Callable[[str], None] = lambda name: None,
) -> None:
    """Fill the probes' readings: each is warmed up, then all take turns for `rounds` rounds.

    Every other round goes backwards, so that a machine that gets steadily slower or faster does so for all.

    Args:
        seconds: least length of one measurement.
        agree: makes all processes take the same number of steps.
        progress: called with the name of what is measured next.
    """
    steps: dict[str, int] = {}
    for probe in probes:
        progress(probe.name)
        settle()
        for _ in range(WARM_UP - 1):
            images = probe.step()
        probe.prepare()
        one_s = _once(probe, 1).wall_s * images
        probe.finish()
        steps[probe.name] = agree(max(1, math.ceil(seconds / max(one_s, 1e-6))))
    for turn in range(rounds):
        for probe in reversed(probes) if turn % 2 else probes:
            progress(f"{probe.name}, {turn + 1} of {rounds}")
            probe.prepare()
            probe.readings.append(_once(probe, steps[probe.name]))
            probe.finish()
