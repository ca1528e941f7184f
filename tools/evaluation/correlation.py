"""How well one quantity follows another: rank correlation, and linear correlation after a logistic fit."""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import optimize, stats

F64 = npt.NDArray[np.float64]


class Correlation(NamedTuple):
    """srcc: Spearman's coefficient, ties at their average rank. plcc: Pearson's, after `logistic` was fitted to take
    x to y. Both -1 to 1; None where x or y does not vary, or the fit did not converge. n: pairs."""

    srcc: float | None
    plcc: float | None
    n: int


def logistic(x: F64, upper: float, lower: float, middle: float, width: float) -> F64:
    """(upper - lower) / (1 + exp(-(x - middle) / |width|)) + lower: the monotone curve of image-quality studies."""
    scaled: F64 = stats.logistic.cdf((x - middle) / max(abs(width), 1e-12))
    return (upper - lower) * scaled + lower


def correlation(x: npt.ArrayLike, y: npt.ArrayLike) -> Correlation:
    """Return how well x predicts y.

    Args:
        x: predictions, 1-D; pairs with NaN are left out.
        y: what is predicted, of the same length.

    Raises:
        ValueError: different shapes.
    """
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"correlation needs two 1-D arrays of one length, got {a.shape} and {b.shape}")
    there = ~(np.isnan(a) | np.isnan(b))
    a, b = a[there], b[there]
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return Correlation(None, None, len(a))
    srcc = float(stats.spearmanr(a, b).statistic)
    return Correlation(srcc, _plcc(a, b, srcc), len(a))


def _plcc(x: F64, y: F64, srcc: float) -> float | None:
    if len(x) < 5:  # four parameters fit four points exactly
        return None
    ends = (y.max(), y.min()) if srcc >= 0 else (y.min(), y.max())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy warns of fits that say little
        try:
            fitted: Any = optimize.curve_fit(logistic, x, y, (*ends, x.mean(), x.std() / 4), maxfev=20_000)[0]
        except RuntimeError:  # not converged
            return None
        predicted = logistic(x, *fitted)
        if np.ptp(predicted) == 0:
            return None
        value = float(stats.pearsonr(predicted, y).statistic)
    return None if math.isnan(value) else value
