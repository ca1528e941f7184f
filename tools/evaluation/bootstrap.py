"""Confidence intervals by resampling images. Shapes: C = cells, N = images, R = resamples."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

RESAMPLES = 1000
_AT_ONCE = 50


def resampled_means(
    value_CN: npt.NDArray[np.generic], seed: int, resamples: int = RESAMPLES
) -> npt.NDArray[np.float64]:
    """Return each cell's mean over images drawn with replacement, the same images in all cells: (R, C).

    Cells share their images, so that a difference between cells, or an average over them, keeps their correlation.
    """
    images = value_CN.shape[1]
    rng = np.random.Generator(np.random.PCG64(seed))
    value_NC = np.ascontiguousarray(value_CN.T, np.float32)
    parts = []
    for begin in range(0, resamples, _AT_ONCE):
        rows = min(_AT_ONCE, resamples - begin)
        drawn = rng.integers(0, images, (rows, images))
        times = np.stack([np.bincount(row, minlength=images) for row in drawn]).astype(np.float32)
        parts.append((times @ value_NC).astype(np.float64) / images)
    return np.concatenate(parts)


def interval(
    means_RC: npt.NDArray[np.float64],
    statistic: Callable[[npt.NDArray[np.float64]], float],
    level: float = 0.95,
) -> tuple[float, float]:
    """Return the percentile interval of a statistic of the cells' means."""
    values_R = np.array([statistic(row) for row in means_RC])
    low, high = np.quantile(values_R, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
