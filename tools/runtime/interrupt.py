"""Stopping a run on request, together on every process: signals, a memory limit, a step that went wrong."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from enum import IntEnum
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from tools.runtime.metrics import write_status


class Stop(IntEnum):
    """Why a run stops; where processes have different reasons the highest counts."""

    NO = 0
    INTERRUPTED = 1
    """SIGINT: a person at the keyboard."""
    PREEMPTED = 2
    """SIGTERM or SIGUSR1: a scheduler wants the machine."""
    MEMORY = 3
    """A process holds more host memory than it may."""
    NOT_FINITE = 4
    """Loss or gradients are not finite: the weights are not worth saving."""

    @property
    def exit_code(self) -> int:
        """130 as shells know it for Ctrl-C; 75 (EX_TEMPFAIL of sysexits.h): start again, it will go on; 1: error."""
        return {Stop.INTERRUPTED: 130, Stop.PREEMPTED: 75, Stop.MEMORY: 75}.get(self, 1)


_SIGNALS = {
    signal.SIGINT: Stop.INTERRUPTED,
    signal.SIGTERM: Stop.PREEMPTED,
    signal.SIGUSR1: Stop.PREEMPTED,
}


_write_early_end: Callable[[], None] | None = None  # into status.json, until the loop starts


@contextmanager
def signals_answered() -> Iterator[None]:
    """Answer signals from the start of a process to its very end; inside, StopRequest takes them for the loop.

    Until the loop starts there is nothing to save: a scheduler's signal ends the process with its code. At the end
    a scheduler's are ignored: Python gives its own handlers up before it is done with ending, and a scheduler's next
    signal would then put another code in the place of this one. What is ignored stays ignored.
    """

    schedulers = [number for number, reason in _SIGNALS.items() if reason is Stop.PREEMPTED]
    for number in schedulers:
        signal.signal(number, _end_early)
    try:
        yield
    finally:
        for number in schedulers:
            signal.signal(number, signal.SIG_IGN)


def _end_early(*_: object) -> None:
    if _write_early_end is not None:
        _write_early_end()
    os._exit(Stop.PREEMPTED.exit_code)


def tell_of_early_end(out: Path, *, step: int, total: int, told_within_s: float) -> None:
    """Let an end before the loop stand in the run's status.json: launchers hide its code. For the first process.

    Args:
        out: the run's folder.
        step, total: where the run stands, and its length.
        told_within_s: time in which this process learns of, and ends by, another one's failure. A launcher sends
            SIGTERM then too, and to go on would be the wrong advice.
    """
    global _write_early_end
    why = "asked to stop before the first step; go on with --resume auto"
    status = {"exit_code": Stop.PREEMPTED.exit_code, "step": step, "total": total, "why": why}

    def write() -> None:
        time.sleep(told_within_s)
        write_status(out, status)

    _write_early_end = write


class StopRequest:
    """Collects reasons to stop. A context manager: inside it SIGINT, SIGTERM and SIGUSR1 are requests. After it a
    scheduler's do nothing in a process of `signals_answered`.

    The first signal lets the step finish; a second Ctrl-C stops at once. On several processes all must enter
    together.

    Args:
        patience_s: how long a process waits for the others' answers.
    """

    def __init__(self, *, patience_s: float = 1800) -> None:
        self._patience_s = patience_s
        self.reason = Stop.NO
        self._first_s = 0.0
        self._before: dict[signal.Signals, Any] = {}
        self._group: Any = None
        self._asked: tuple[Any, torch.Tensor] | None = None

    def __enter__(self) -> StopRequest:
        global _write_early_end
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        _write_early_end = None
        if dist.is_initialized() and dist.get_world_size() > 1:
            # On the CPU whatever the model runs on, so that asking never waits for a GPU.
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self._patience_s))
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            if handler is not _end_early:  # the run has its code now, and what is open is to be closed
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # A launcher answers Ctrl-C by sending its processes another signal at once, and only later kills them:
        # that one must not cost the checkpoint. A person's second Ctrl-C comes later and means it.
        now_s = time.monotonic()
        if self.reason and number == signal.SIGINT and now_s - self._first_s > 1:
            raise KeyboardInterrupt
        if not self.reason:
            self._first_s = now_s
            self.request(_SIGNALS[signal.Signals(number)])

    def request(self, reason: Stop) -> None:
        """Ask for a stop; the highest reason so far stays."""
        self.reason = max(self.reason, reason)

    def agreed(self) -> Stop:
        """Return why every process stops after this step; to be called once per step by all of them.

        Processes must stop at the same step, so they ask one another after every step and read the answer after
        the next, when it has long arrived.
        """
        if self._group is None:
            return self.reason
        if self._asked is not None:
            work, answer = self._asked
            work.wait()
            if answer.item():
                self._asked = None
                return Stop(int(answer.item()))
        question = torch.tensor([int(self.reason)])
        work = dist.all_reduce(question, dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._asked = (work, question)
        return Stop.NO

    def agreed_now(self) -> Stop:
        """As `agreed`, but with what every process knows now; waits for all of them."""
        if self._group is None:
            return self.reason
        if self._asked is not None:
            self._asked[0].wait()
            self._asked = None
        answer = torch.tensor([int(self.reason)])
        dist.all_reduce(answer, dist.ReduceOp.MAX, group=self._group)
        return Stop(int(answer.item()))
