"""From what was found on each image to one row per cell, and to intervals. C = cells, N = images, K = codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.corruptions import HELD_OUT_KINDS, TRAINING_KINDS
from tools.evaluation.bootstrap import interval, resampled_means
from tools.evaluation.calibration import expected_calibration_error
from tools.evaluation.correlation import Correlation, correlation
from tools.evaluation.outcomes import Outcomes
from tools.runtime.alexnet import ALEXNET_ERROR
from tools.runtime.results import CLEAN, SEVERITIES, Cell, CellName

_CORRELATED = 2000


def cells_from_outcomes(names: Sequence[CellName], found: Outcomes) -> list[Cell]:
    """Average over the sound images of each cell.

    Raises:
        ValueError: if no sound image was scored.
    """
    sound_N = ~found.damaged_N
    if not sound_N.any():
        raise ValueError(
            f"no sound image was scored for {names[0][0]} severity {names[0][1]}; verify the data"
        )
    paired = len(names) > 1 and names[0] == (CLEAN, 0)
    cells = []
    for c, (kind, severity) in enumerate(names):
        same_N = found.prediction_CN[c] == found.prediction_CN[0]
        cells.append(
            Cell(
                kind,
                severity,
                _mean(found.top1_CN[c, sound_N]) or 0.0,
                _mean(found.top5_CN[c, sound_N]) or 0.0,
                int(sound_N.sum()),
                ece=expected_calibration_error(
                    found.value("confidence")[c, sound_N], found.top1_CN[c, sound_N]
                ),
                nll=_mean(found.value("nll")[c, sound_N]),
                brier=_mean(found.value("brier")[c, sound_N]),
                consistency=_mean(same_N[sound_N]) if paired else None,
                agreement=_mean(found.value("agreement")[c, sound_N]) if paired else None,
                drift_before=_mean(found.value("drift_before")[c, sound_N]) if paired else None,
                drift_after=_mean(found.value("drift_after")[c, sound_N]) if paired else None,
                residual=_mean(found.value("residual")[c, sound_N]),
                perplexity=perplexity(found.usage_CK[c]),
            )
        )
    return cells


def _mean(value_N: npt.NDArray[Any]) -> float | None:
    """Mean in float64; None where nothing was measured."""
    value = float(value_N.astype(np.float64).mean())
    return None if np.isnan(value) else value


def perplexity(usage_K: npt.NDArray[np.int64]) -> float | None:
    """Return 2 to the entropy (in bits) of how often each code was used; None without a codebook."""
    if not usage_K.sum():
        return None
    share_K = usage_K[usage_K > 0] / usage_K.sum()
    return float(np.exp(-(share_K * np.log(share_K)).sum()))


def severity_correlations(names: Sequence[CellName], found: Outcomes) -> dict[str, dict[str, Correlation]]:
    """Return, per corruption, how well confidence, drift and residual of single images follow the severity.

    A quality-independent model has coefficients near 0: what it says does not tell how bad the image is. Of the first
    2,000 images, which settle a coefficient to about 0.01.
    """
    sound_N = ~found.damaged_N & (np.arange(len(found.damaged_N)) < _CORRELATED)
    place = {name: i for i, name in enumerate(names)}
    results: dict[str, dict[str, Correlation]] = {}
    for kind in dict.fromkeys(kind for kind, severity in names if severity):
        severities = [s for s in SEVERITIES if (kind, s) in place]
        severity_P = np.repeat(severities, int(sound_N.sum()))
        rows = [place[kind, s] for s in severities]
        results[kind] = {
            value: correlation(found.value(value)[rows][:, sound_N].ravel(), severity_P)
            for value in ("confidence", "drift_before", "drift_after", "residual")
            if not np.isnan(found.value(value)[rows]).all()
        }
    return results


def intervals(
    names: Sequence[CellName], top1_CN: npt.NDArray[np.bool_], seed: int
) -> dict[str, tuple[float, float]]:
    """Return 95 % bootstrap intervals over images of what the cells allow: clean, known, unknown, mce.

    Fractions, but mce in percent. The images are resampled together for all cells.
    """
    means_RC = resampled_means(top1_CN, seed)
    place = {name: i for i, name in enumerate(names)}

    def of(kinds: Sequence[str]) -> list[int]:
        return [place[k, s] for k in kinds for s in SEVERITIES if (k, s) in place]

    known, unknown = of(TRAINING_KINDS), of(HELD_OUT_KINDS)
    found = {}
    if (CLEAN, 0) in place:
        found["clean_top1"] = interval(means_RC, lambda row: float(row[place[CLEAN, 0]]))
    if known:
        found["known_top1"] = interval(means_RC, lambda row: float(row[known].mean()))
    if unknown:
        found["unknown_top1"] = interval(means_RC, lambda row: float(row[unknown].mean()))
    if len(known) == len(TRAINING_KINDS) * len(SEVERITIES):
        weight = np.repeat([1 / ALEXNET_ERROR[k] for k in TRAINING_KINDS], len(SEVERITIES))
        found["mce"] = interval(means_RC, lambda row: float(100 * ((1 - row[known]) * weight).mean()))
    return found
