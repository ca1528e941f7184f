"""Which device the loaders run on."""

from __future__ import annotations

import torch


def loader_device_id(device: torch.device) -> int | None:
    """Return the CUDA device number for the DALI graph, or None for the CPU graph.

    A process that is alone gets "cuda" without a number from Accelerate: the current device is meant.
    """
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index
