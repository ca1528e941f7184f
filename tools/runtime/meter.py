"""Sums what a run reports between two log lines, on the device, without waiting for it."""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

_PAGE_B = resource.getpagesize()


class Meter:
    """Means of named losses, accuracy, gradient norm, rate and data wait over an interval.

    Its sums are part of a checkpoint, so that the interval in which a run is resumed is reported as a whole.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts = self._zero(2, torch.int64)  # right answers, images
        self._parts = 0
        self._norm, self._steps = self._zero(1, torch.float32), 0
        self._restart_clock()

    def _zero(self, length: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(length, dtype=dtype, device=self._accelerator.device)

    def _restart_clock(self) -> None:
        self._images_timed = 0
        self._waited_s = 0.0
        self._start_s = time.perf_counter()

    def add(self, losses: Mapping[str, Tensor], logits_BC: Tensor, labels_B: Tensor) -> None:
        """Take in one micro-batch."""
        for name, value in losses.items():
            if name not in self._sums:
                self._sums[name] = self._zero(1, torch.float32)
            self._sums[name] += value.detach().float()
        self._counts[0] += (logits_BC.detach().argmax(dim=1) == labels_B).sum()
        self._counts[1] += len(labels_B)
        self._images_timed += len(labels_B)
        self._parts += 1

    def add_step(self, gradient_norm: Tensor) -> None:
        """Take in an optimiser step."""
        self._norm += gradient_norm.detach().float()
        self._steps += 1

    def wait(self, seconds: float) -> None:
        """Count time spent waiting for data."""
        self._waited_s += seconds

    def exclude(self, seconds: float) -> None:
        """Leave time spent on something else, such as validation, out of the interval."""
        self._start_s += seconds

    def _totals(self) -> dict[str, float]:
        """Sums over all processes, by name; waits for the device."""
        values = {**self._sums, "counts": self._counts, "norm": self._norm}
        plain = torch.tensor([self._parts, self._steps, self._images_timed], dtype=torch.float64)
        plain = plain.to(self._accelerator.device)
        packed = torch.cat([*(value.double() for value in values.values()), plain])
        numbers = self._accelerator.reduce(packed, "sum").tolist()
        names = [*self._sums, "hits", "images", "norm", "parts", "steps", "timed"]
        return dict(zip(names, numbers, strict=True))

    def report(self) -> dict[str, float]:
        """Return the interval's numbers over all processes and start a new interval; called on every process.

        Loss names as given, `top1_pct`, `gradient_norm`, `rate_img_s` (all processes together), `data_wait_pct`
        of this process.
        """
        total = self._totals()
        elapsed_s = time.perf_counter() - self._start_s
        record = {name: total[name] / total["parts"] for name in self._sums}
        record["top1_pct"] = 100 * total["hits"] / total["images"]
        # With fp16, every step of an interval may have been skipped.
        record["gradient_norm"] = total["norm"] / total["steps"] if total["steps"] else float("nan")
        record["rate_img_s"] = total["timed"] / elapsed_s
        record["data_wait_pct"] = 100 * self._waited_s / elapsed_s
        self._reset()
        return record

    def state_dict(self) -> dict[str, Any]:
        """Return the interval's sums so far over all processes; called on every process."""
        return {"losses": list(self._sums), "totals": self._totals()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue an interval: the first process takes the sums of all."""
        self._reset()
        self._sums = {name: self._zero(1, torch.float32) for name in state["losses"]}
        if not self._accelerator.is_main_process:
            return
        total = state["totals"]
        for name, value in self._sums.items():
            value += total[name]
        self._counts += torch.tensor([total["hits"], total["images"]], dtype=torch.int64).to(
            self._counts.device
        )
        self._parts, self._steps = int(total["parts"]), int(total["steps"])
        self._norm += total["norm"]


def device_memory_gib(device: torch.device) -> float:
    """Return the peak memory of the device, or of this process where that is the CPU, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def host_memory_gib() -> float:
    """Return the memory this process holds now, in GiB: resident, without pages of files it has mapped."""
    _, resident, shared, *_ = Path("/proc/self/statm").read_text().split()
    return (int(resident) - int(shared)) * _PAGE_B / 2**30
