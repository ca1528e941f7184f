"""Names, dtypes and shapes of every kind's fields and raw noise, in the core's order.

Shapes: H = height, W = width.
"""

from __future__ import annotations

import torch

Parts = tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]


def field_parts(kind: str, height: int, width: int) -> Parts:
    """Return (name, dtype, shape) of each part of a kind's fields; empty where nothing is drawn."""
    if kind in ("gaussian_noise", "speckle_noise"):
        return (("normal_HWC", torch.float32, (height, width, 3)),)
    if kind in ("shot_noise", "impulse_noise"):
        # The bits of a uint32, uniform: torch's own uint32 supports few operations.
        return (("uniform_bits_HWC", torch.int32, (height, width, 3)),)
    return ()


def noise_parts(kind: str, height: int, width: int) -> Parts:
    """Return the parts of the raw noise that a kind's fields are shaped from; ValueError if it has none."""
    raise ValueError(f"{kind} has no raw noise apart from its fields; pass fields to apply instead")
