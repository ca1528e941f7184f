"""Sums what a run reports between two log lines, on the device, without waiting for it."""

from __future__ import annotations

import time

import torch
from accelerate import Accelerator
from torch import Tensor


class Meter:
    """Means of named losses, accuracy, rate and data wait over an interval.

    Args:
        device: where the values live.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._hits = torch.zeros((), dtype=torch.int64, device=self._device)
        self._images = 0
        self._parts = 0
        self._waited_s = 0.0
        self._start_s = time.perf_counter()

    def add(self, losses: dict[str, Tensor], logits_BC: Tensor, labels_B: Tensor) -> None:
        """Take in one micro-batch."""
        for name, value in losses.items():
            self._sums[name] = (
                self._sums.get(name, torch.zeros((), device=self._device)) + value.detach().float()
            )
        self._hits += (logits_BC.detach().argmax(dim=1) == labels_B).sum()
        self._images += len(labels_B)
        self._parts += 1

    def wait(self, seconds: float) -> None:
        """Count time spent waiting for data."""
        self._waited_s += seconds

    def exclude(self, seconds: float) -> None:
        """Leave time spent on something else, such as validation, out of the interval."""
        self._start_s += seconds

    def report(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the interval's numbers over all processes and start a new interval; waits for the device.

        Loss names as given, `top1_pct`, `rate_img_s` (all processes together), `data_wait_pct` of this process.
        """
        names = list(self._sums)
        packed = torch.stack(
            [*(self._sums[name].double() for name in names), self._hits.double()]
            + [
                torch.tensor(float(x), dtype=torch.float64, device=self._device)
                for x in (self._images, self._parts)
            ]
        )
        *sums, hits, images, parts = accelerator.reduce(packed, "sum").tolist()
        elapsed_s = time.perf_counter() - self._start_s
        record = {name: value / parts for name, value in zip(names, sums, strict=True)}
        record["top1_pct"] = 100 * hits / images
        record["rate_img_s"] = images / elapsed_s
        record["data_wait_pct"] = 100 * self._waited_s / elapsed_s
        self._reset()
        return record
