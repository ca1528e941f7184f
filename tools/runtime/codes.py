"""What a codebook was used for since the last log line, over all processes: the part of it that a checkpoint keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tools.runtime.meter import own_row


class CodeUsage:
    """The codebook's counts of an interval that is not reported yet, so that a resumed run reports all of it."""

    def __init__(self, accelerator: Accelerator, net: nn.Module) -> None:
        self._accelerator = accelerator
        book: Any = accelerator.unwrap_model(net).codebook
        self._usage = None if book is None else book.usage
        self._upkeep = None if book is None else book.upkeep

    def total(self) -> Tensor | None:
        """Return the counts of each code over all processes, int64 (K,), or None without a codebook.

        Called on every process.
        """
        return None if self._usage is None else self._accelerator.reduce(self._usage.usage_K, "sum")

    def state_dict(self) -> dict[str, Any]:
        """Return the counts and distances so far; called on every process."""
        if self._usage is None:
            return {}
        reduce, gather, usage = self._accelerator.reduce, self._accelerator.gather, self._usage
        return {
            "usage_K": reduce(usage.usage_K, "sum").cpu(),
            "moments_R3": gather(usage.moments_3).cpu().view(-1, 3),
            "farthest_R": gather(usage.farthest).cpu(),
            "revived": 0 if self._upkeep is None else self._upkeep.revived,
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue: the first process takes the counts of all; sums of distances are each its own, as the meter's.

        Revived codes are the same ones on every process.
        """
        if self._usage is None:
            return
        if self._upkeep is not None:
            self._upkeep.revived = state.get("revived", 0)
        self._usage.reset()
        self._usage.moments_3.copy_(own_row(self._accelerator, state["moments_R3"]))
        if self._accelerator.is_main_process:
            self._usage.usage_K.copy_(state["usage_K"])
            self._usage.farthest.copy_(state["farthest_R"].max())
