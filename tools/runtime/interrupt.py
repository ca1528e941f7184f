"""Stopping a run on request: Ctrl-C or SIGTERM finishes the step; a second Ctrl-C stops at once."""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist


class StopRequest:
    """Remembers that SIGINT or SIGTERM came. Use as a context manager; outside it signals act as before.

    On several processes all must enter it together.
    """

    def __init__(self) -> None:
        self.requested = False
        self._first_s = 0.0
        self._before: dict[signal.Signals, Any] = {}
        self._group: Any = None
        self._asked: tuple[Any, torch.Tensor] | None = None

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        if dist.is_initialized() and dist.get_world_size() > 1:
            # On the CPU whatever the model runs on, so that asking never waits for a GPU.
            self._group = dist.new_group(backend="gloo")
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # A launcher answers Ctrl-C by sending its processes another signal at once, and only later kills them:
        # that one must not cost the checkpoint. A person's second Ctrl-C comes later and means it.
        now_s = time.monotonic()
        if self.requested and number == signal.SIGINT and now_s - self._first_s > 1:
            raise KeyboardInterrupt
        if not self.requested:
            self.requested, self._first_s = True, now_s

    def agreed(self) -> bool:
        """Whether every process stops after this step; to be called once per step by all of them.

        Processes must stop at the same step, so they ask one another after every step and read the answer after
        the next, when it has long arrived.
        """
        if self._group is None:
            return self.requested
        if self._asked is not None:
            work, answer = self._asked
            work.wait()
            if answer.item():
                return True
        question = torch.tensor([int(self.requested)])
        self._asked = (dist.all_reduce(question, group=self._group, async_op=True), question)
        return False
