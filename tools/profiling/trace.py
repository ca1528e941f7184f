"""A few training steps under torch's profiler, with named ranges that Nsight Systems sees too (NVTX)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from tools.profiling.workload import Workload

_STEPS = 4


class _Ranges:
    """Names the pieces of a step by hooks, as StepProfile cuts them."""

    def __init__(self, net: nn.Module, optimizer: Any, cuda: bool) -> None:
        self._cuda = cuda
        self._open: Any = None
        inner = getattr(optimizer, "optimizer", optimizer)
        self._handles = [
            net.register_forward_pre_hook(lambda *_: self.begin("forward")),
            net.register_forward_hook(lambda *_: self.begin("backward")),
            inner.register_step_pre_hook(lambda *_: self.begin("optimiser")),
            inner.register_step_post_hook(lambda *_: self.begin("data wait and loop")),
        ]

    def begin(self, name: str) -> None:
        self.end()
        self._open = record_function(name)
        self._open.__enter__()
        if self._cuda:
            torch.cuda.nvtx.range_push(name)  # type: ignore[no-untyped-call, unused-ignore]

    def end(self) -> None:
        if self._open is not None:
            self._open.__exit__(None, None, None)
            self._open = None
            if self._cuda:
                torch.cuda.nvtx.range_pop()  # type: ignore[no-untyped-call, unused-ignore]

    def close(self) -> None:
        self.end()
        for handle in self._handles:
            handle.remove()


def write(work: Workload, path: Path) -> None:
    """Write the trace of a few training steps in Chrome's format (chrome://tracing, Perfetto).

    Called on every process, since steps need all of them; the main one writes.
    """
    cuda = work.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as recorded:
        ranges = _Ranges(work.net, work.optimizer, cuda)
        try:
            ranges.begin("data wait and loop")
            for _ in range(_STEPS):
                work.train_step(work.loader)
        finally:
            ranges.close()
    if work.accelerator.is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        recorded.export_chrome_trace(str(path))
