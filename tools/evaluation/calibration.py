"""Calibration of a model on one set of images, from what was found on each of them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

BINS = 15


def expected_calibration_error(
    confidence_N: npt.NDArray[np.floating], right_N: npt.NDArray[np.bool_], bins: int = BINS
) -> float:
    """Return the mean gap between confidence and accuracy, weighted by how many images are in each bin.

    Args:
        confidence_N: largest softmax probability, 0-1; N >= 1.
        right_N: whether the prediction was right.
        bins: of equal width; a bin has its lower end, not its upper one, so that a confidence of exactly 1 has a
            bin of its own (torchmetrics counts so).

    Source: arXiv:1706.04599, eq. 3.
    """
    index_N = np.minimum((confidence_N.astype(np.float64) * bins).astype(np.int64), bins)
    gap_K = np.bincount(index_N, confidence_N.astype(np.float64) - right_N, minlength=bins + 1)
    return float(np.abs(gap_K).sum() / len(confidence_N))
