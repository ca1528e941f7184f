"""The paper's rows (VQSA, CVPR 2023), to stand beside ours. Accuracies and mCE in percent, as printed there."""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """One line of table 3: clean top-1, Known, Unknown, mCE."""

    method: str
    clean: float
    known: float
    unknown: float
    mce: float


TABLE_3 = (
    Row("ResNet-50 vanilla", 76.1, 39.1, 46.7, 76.7),
    Row("ResNet-50 DDP", 72.1, 48.2, 50.7, 62.78),
    Row("ResNet-50 URIE", 73.8, 55.1, 56.5, 55.7),
    Row("ResNet-50 QualNet", 75.4, 61.1, 58.1, 50.3),
    Row("ResNet-50 VQSA", 76.6, 65.6, 60.2, 43.1),
    Row("ResNeXt-101 vanilla", 79.6, 47.1, 55.5, 69.7),
    Row("ResNeXt-101 QualNet", 77.8, 65.5, 63.3, 42.6),
    Row("ResNeXt-101 VQSA", 80.3, 68.6, 64.5, 37.9),
)
"""Trained on the 15 corruptions of Known, but for the vanilla models; ImageNet, 1,000 classes."""
