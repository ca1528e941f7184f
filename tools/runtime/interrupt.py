"""Stopping a run on request: Ctrl-C or SIGTERM finishes the step; a second Ctrl-C stops at once."""

from __future__ import annotations

import signal
import time
from types import FrameType

import torch
from accelerate import Accelerator


class StopRequest:
    """Remembers that SIGINT or SIGTERM came. Use as a context manager; outside it signals act as before."""

    def __init__(self) -> None:
        self.requested = False
        self._first_s = 0.0
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        # A launcher answers Ctrl-C by sending its processes another signal at once, and only later kills them:
        # that one must not cost the checkpoint. A person's second Ctrl-C comes later and means it.
        now_s = time.monotonic()
        if self.requested and number == signal.SIGINT and now_s - self._first_s > 1:
            raise KeyboardInterrupt
        if not self.requested:
            self.requested, self._first_s = True, now_s

    def agreed(self, accelerator: Accelerator, *, due: bool) -> bool:
        """Whether every process stops after this step.

        One process decides at once. Several must stop at the same step, so they ask one another, which
        waits for the device: only on steps where `due` is true (the same ones everywhere).
        """
        if accelerator.num_processes == 1:
            return self.requested
        if not due:
            return False
        flag = torch.tensor([int(self.requested)], device=accelerator.device)
        return bool(accelerator.reduce(flag, "sum").item())
