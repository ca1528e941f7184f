"""Times the steps of a training run from the outside, by hooks: `train.py --profile N`.

A step is cut at the model's forward pass and at the optimiser's step; what lies between is the backward pass.
On a GPU the cuts are CUDA events on torch's stream, read when the profile is done, so that nothing waits for the
device. Time spent waiting for data is the loader's own count and is taken out of the piece it fell into.
"""

from __future__ import annotations

import itertools
import json
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from tools.profiling.table import Span, Spread

log = logging.getLogger(__name__)

PIECES = ("data wait", "forward", "backward", "optimiser", "rest")


class Waited(Protocol):
    """A loader that counts the seconds its caller waited."""

    waited_s: float


@dataclass
class _Mark:
    begins: str
    wall_s: float
    cpu_s: float
    waited_s: float
    event: Any


@dataclass
class Step:
    """One training step: seconds by piece; `device_s` on GPUs (from the host's point of view work is only queued)."""

    wall_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PIECES, 0.0))
    cpu_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PIECES, 0.0))
    device_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PIECES, 0.0))


class StepProfile:
    """Watches training steps.

    Args:
        net: the model as the loop calls it.
        optimizer: torch's, or Accelerate's wrapper of one.
        loader: counts the wait.
        steps: steps to watch.
        skip: steps before them that are not counted: first ones start threads, tune kernels and fill queues.
    """

    def __init__(self, net: nn.Module, optimizer: Any, loader: Waited, *, steps: int, skip: int = 3) -> None:
        self._loader = loader
        self._wanted, self._skip = steps, skip
        self._cuda = next(net.parameters()).is_cuda
        self._marks: list[_Mark] = []
        self._all: list[list[_Mark]] = []
        inner = getattr(optimizer, "optimizer", optimizer)
        self._handles = [
            net.register_forward_pre_hook(lambda module, _: self._mark("forward", module)),
            net.register_forward_hook(lambda module, *_: self._mark("backward", module)),
            inner.register_step_pre_hook(lambda *_: self._mark("optimiser")),
            inner.register_step_post_hook(lambda *_: self._mark("rest")),
        ]
        self._mark("rest")

    def _mark(self, begins: str, module: nn.Module | None = None) -> None:
        if module is not None and not module.training:
            return  # validation
        event = None
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
        self._marks.append(
            _Mark(begins, time.perf_counter(), time.process_time(), self._loader.waited_s, event)
        )

    def restart(self) -> None:
        """Begin a step here: what passed since the last one belongs to none."""
        self._marks = []
        self._mark("rest")

    def watch(self, loader: Waited) -> None:
        """Take the wait from another loader from now on."""
        self._loader = loader
        self.restart()

    def step(self) -> bool:
        """End a step; returns whether all wanted ones have been watched, and then lets go of the model."""
        self._mark("rest")
        if self._skip:
            self._skip -= 1
        else:
            self._all.append(self._marks)
        self._marks = [self._marks[-1]]
        if len(self._all) >= self._wanted:
            self.detach()
            return True
        return False

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def take(self) -> list[Step]:
        """Return the steps watched since the last call; waits for the device."""
        if self._cuda:
            torch.cuda.synchronize()
        steps = [_cut(marks) for marks in self._all]
        self._all = []
        return steps

    def report(self, images: int, path: Path | None) -> str:
        """Write the summary of the steps watched as JSON, where a path is given, and return it in a line.

        Args:
            images: images of one step of all processes.
        """
        found = summary(self.take(), images)
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(found, indent=1) + "\n")
            except OSError as error:  # of a training, which is worth more than its profile
                log.error("%s not written: %s", path, error)
        return line(found)

    def spans(self) -> tuple[float, list[Span]]:
        """Return (start on the clock of time.perf_counter, pieces as the host saw them) of the steps not yet taken."""
        if not self._all:
            return 0.0, []
        start_s = self._all[0][0].wall_s
        found = []
        for marks in self._all:
            for a, b in itertools.pairwise(marks):
                wait_s = b.waited_s - a.waited_s
                at_s, length_s = a.wall_s - start_s, b.wall_s - a.wall_s
                # The wait comes last in its piece: a batch is asked for just before it is used.
                if length_s - wait_s > 0:
                    found.append(
                        Span(lane="training", name=a.begins, start_s=at_s, seconds=length_s - wait_s)
                    )
                if wait_s > 0:
                    found.append(
                        Span(
                            lane="training",
                            name="data wait",
                            start_s=at_s + length_s - wait_s,
                            seconds=wait_s,
                        )
                    )
        return start_s, found


def _cut(marks: list[_Mark]) -> Step:
    step = Step()
    for a, b in itertools.pairwise(marks):
        wait_s = b.waited_s - a.waited_s
        step.wall_s["data wait"] += wait_s
        step.wall_s[a.begins] += b.wall_s - a.wall_s - wait_s
        step.cpu_s[a.begins] += b.cpu_s - a.cpu_s
        if a.event is not None:
            step.device_s[a.begins] += a.event.elapsed_time(b.event) / 1000
    return step


def summary(steps: list[Step], images: int) -> dict[str, Any]:
    """Return medians over the steps: images per second and the share of each piece of a step's time, in percent.

    On a GPU the shares of forward, backward and optimiser are of GPU time between the cuts, which includes what
    the GPU waited for.

    Args:
        images: images of one step of all processes.
    """
    total_s = Spread.of([sum(step.wall_s.values()) for step in steps])
    on_device = any(step.device_s["forward"] for step in steps)

    def share_pct(piece: str) -> float:
        side = "device_s" if on_device and piece != "data wait" else "wall_s"
        return 100 * Spread.of([getattr(step, side)[piece] for step in steps]).p50 / total_s.p50

    return {
        "steps": len(steps),
        "step_s": total_s.model_dump(),
        "rate_img_s": images / total_s.p50,
        "share_pct": {piece: share_pct(piece) for piece in PIECES},
        "clock": "CUDA events" if on_device else "host",
    }


def line(found: dict[str, Any]) -> str:
    """Return a summary in one line."""
    shares = "  ".join(f"{piece} {share:.1f}%" for piece, share in found["share_pct"].items())
    return f"profile of {found['steps']} steps: {found['rate_img_s']:.0f} img/s  {shares}"
