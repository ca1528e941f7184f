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

    def _rows(self, *more: float) -> list[list[float]]:
        """What every process has of `_names`, and `more`, in one exchange; waits for the device."""
        values = [*self._sums.values(), self._counts, self._norm]
        plain = torch.tensor([self._parts, self._steps, self._images_timed, *more], dtype=torch.float64)
        packed = torch.cat([*(value.double() for value in values), plain.to(self._accelerator.device)])
        numbers: list[float] = self._accelerator.gather(packed).tolist()
        return [list(row) for row in zip(*[iter(numbers)] * len(packed), strict=True)]

    def _names(self) -> list[str]:
        return [*self._sums, "hits", "images", "norm", "parts", "steps", "timed"]

    def report(self, damaged: int = 0) -> dict[str, float]:
        """Return the interval's numbers over all processes and start a new interval; called on every process.

        Args:
            damaged: images that this process replaced so far.

        Returns:
            the losses by name, `top1_pct`, `gradient_norm`, `damaged`, and `rate_img_s` of all processes together; the
            most of any process in `data_wait_pct` (the others wait for it), `memory_gib` and `host_gib`.
        """
        device_gib = device_memory_gib(self._accelerator.device)
        rows = self._rows(damaged, self._waited_s, device_gib, host_memory_gib())
        *sums, waited_s, memory_gib, host_gib = zip(*rows, strict=True)
        total = dict(zip([*self._names(), "damaged"], map(sum, sums), strict=True))
        elapsed_s = time.perf_counter() - self._start_s
        record = {name: total[name] / total["parts"] for name in self._sums}
        record["top1_pct"] = 100 * total["hits"] / total["images"]
        # With fp16, every step of an interval may have been skipped.
        record["gradient_norm"] = total["norm"] / total["steps"] if total["steps"] else float("nan")
        record["rate_img_s"] = total["timed"] / elapsed_s
        record["data_wait_pct"] = 100 * max(waited_s) / elapsed_s
        record |= {"memory_gib": max(memory_gib), "host_gib": max(host_gib), "damaged": int(total["damaged"])}
        self._reset()
        return record

    def state_dict(self) -> dict[str, Any]:
        """Return the interval's sums so far, process by process; called on every process."""
        return {"losses": list(self._sums), "ranks": self._rows()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue an interval: every process its own sums; the first the sums of all, where there were more or fewer.

        Added up in another order they could differ in the last digit.
        """
        self._reset()
        self._sums = {name: self._zero(1, torch.float32) for name in state["losses"]}
        row = own_row(self._accelerator, torch.tensor(state["ranks"], dtype=torch.float64)).tolist()
        mine = dict(zip(self._names(), row, strict=True))
        for name, value in self._sums.items():
            value += mine[name]
        counts = torch.tensor([mine["hits"], mine["images"]], dtype=torch.int64)
        self._counts += counts.to(self._counts.device)
        self._parts, self._steps = int(mine["parts"]), int(mine["steps"])
        self._norm += mine["norm"]


def own_row(accelerator: Accelerator, saved_RN: Tensor) -> Tensor:
    """Return what this process goes on from, of sums (N,) that R processes saved: its own where as many go on.

    Where others do, the first takes the sums of all, and the rest none.
    """
    if len(saved_RN) == accelerator.num_processes:
        return saved_RN[accelerator.process_index]
    return saved_RN.sum(0) if accelerator.is_main_process else torch.zeros_like(saved_RN[0])


def device_memory_gib(device: torch.device) -> float:
    """Return the peak memory of the device, or of this process where that is the CPU, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def host_memory_gib() -> float:
    """Return the memory this process holds now, in GiB: resident, without pages of files it has mapped."""
    _, resident, shared, *_ = Path("/proc/self/statm").read_text().split()
    return (int(resident) - int(shared)) * _PAGE_B / 2**30
