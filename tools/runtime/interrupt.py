"""Stopping a run on request: the first Ctrl-C or SIGTERM finishes the step, the second stops at once."""

from __future__ import annotations

import signal
from types import FrameType

import torch
from accelerate import Accelerator


class StopRequest:
    """Remembers that SIGINT or SIGTERM came. Use as a context manager; outside it signals act as before."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

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
