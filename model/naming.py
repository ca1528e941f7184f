"""Says in words how a set of named tensors differs from the wanted one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def mismatch(wanted: Mapping[str, torch.Size], found: Mapping[str, Tensor]) -> str:
    """Return "missing …; unexpected …; other shapes …", or nothing where names and shapes agree."""
    missing = sorted(wanted.keys() - found.keys())
    unexpected = sorted(found.keys() - wanted.keys())
    shapes = sorted(
        f"{name} {tuple(found[name].shape)} instead of {tuple(wanted[name])}"
        for name in wanted.keys() & found.keys()
        if found[name].shape != wanted[name]
    )
    if not (missing or unexpected or shapes):
        return ""
    return f"missing {some(missing)}; unexpected {some(unexpected)}; other shapes {some(shapes)}"


def some(names: Iterable[str], most: int = 5) -> str:
    """Return the first few names and how many more there are; "none" without any."""
    names = list(names)
    if not names:
        return "none"
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
