"""Which output of a model is which class of the data, and which outputs take part."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor


@cache
def imagenet_classes() -> list[str]:
    """Return ImageNet's 1,000 synsets, sorted: the order of the outputs of torchvision's and timm's models."""
    return (Path(__file__).parent / "imagenet_classes.txt").read_text().split()


def outputs_of(data: Sequence[str], model: Sequence[str], where: str, whose: str, *, fewer: bool) -> Tensor:
    """Return the model's output for each class of the data: int64 (classes of the data,).

    Folder names that are plain numbers below the number of outputs are outputs (ImageNet-V2 is laid out so).

    Args:
        data, model: class names of the data and of the model's outputs.
        where, whose: the data and the model, for messages.
        fewer: accept data of fewer classes than the model's.

    Raises:
        ValueError: a class of the data is none of the model's, or some are absent without `fewer`.
    """
    numbers = [int(name) for name in data if name.isdecimal()]
    if len(numbers) == len(data) and not set(data) & set(model) and max(numbers) < len(model):
        index = numbers
    else:
        place = {name: i for i, name in enumerate(model)}
        unknown = [name for name in data if name not in place]
        if unknown:
            raise ValueError(
                f"{where} has {len(data)} classes ({_some(data)}), {whose} {len(model)} ({_some(model)}); "
                f"{len(unknown)} of the data are none of the model's, the first is {unknown[0]!r}: evaluate on "
                "images of the same classes"
            )
        index = [place[name] for name in data]
    if len(index) < len(model) and not fewer:
        raise ValueError(
            f"{where} has {len(data)} classes ({_some(data)}), {whose} {len(model)} ({_some(model)}); "
            "evaluate on images of the same classes, or say --fewer-classes mask to score among the data's only, or "
            "keep to score among the model's"
        )
    return torch.tensor(index, dtype=torch.int64)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
