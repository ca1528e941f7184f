"""ImageNet-C's corruptions: batched, mixed per sample, seeded, on CPU and CUDA.

    from pipeline.corruptions import corrupt
    noisy_BHWC = corrupt(images_u8_BHWC, kind="gaussian_noise", severity=3, key=42)

Names and numbers of the kinds come without loading anything else; the core, torch and DALI are
loaded when they are first used. The DALI operator is in `pipeline.corruptions.dali_operator`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from pipeline.corruptions.kinds import (
    CONSTANT_SETS,
    FLAVOURS,
    HELD_OUT_KINDS,
    KINDS,
    SEVERITIES,
    TRAINING_KINDS,
)

if TYPE_CHECKING:
    from pipeline.corruptions.core import available_kinds, kind_id
    from pipeline.corruptions.torch_operator import apply, corrupt, draw, jpeg_pass

__all__ = [
    "CONSTANT_SETS",
    "FLAVOURS",
    "HELD_OUT_KINDS",
    "KINDS",
    "SEVERITIES",
    "TRAINING_KINDS",
    "apply",
    "available_kinds",
    "corrupt",
    "draw",
    "jpeg_pass",
    "kind_id",
]

_LAZY = {
    "available_kinds": "core",
    "kind_id": "core",
    "apply": "torch_operator",
    "corrupt": "torch_operator",
    "draw": "torch_operator",
    "jpeg_pass": "torch_operator",
}


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(importlib.import_module(f"pipeline.corruptions.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
