"""How much a model's inside moves with image quality, and which codes it uses; from the cells and the code counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean

import numpy as np
import numpy.typing as npt

from tools.figures.style import COLOURS, figure, png
from tools.runtime.results import SEVERITIES, Cell

MEASURES = {
    "agreement": "same codes as clean",
    "consistency": "same prediction as clean",
    "drift_before": "feature drift before VQ + SA",
    "drift_after": "feature drift after VQ + SA",
}


def stability(cells: Sequence[Cell]) -> bytes | None:
    """Return a PNG of code agreement, consistency and feature drift over severity, means over corruptions; or None."""
    drawn, axis = figure(3)
    lines = 0
    for i, (measure, words) in enumerate(MEASURES.items()):
        x, y = [], []
        for severity in SEVERITIES:
            values = [v for c in cells if c.severity == severity and (v := getattr(c, measure)) is not None]
            if values:
                x.append(severity)
                y.append(mean(values))
        if x:
            lines += 1
            dashed = "--" if measure.startswith("drift") else "-"
            axis.plot(x, y, color=COLOURS[i], ls=dashed, marker="o", ms=4, label=words)
    axis.set_ylim(0, 1.02)
    axis.set_xticks(SEVERITIES)
    axis.set_xlabel("severity, mean over corruptions", fontsize=8)
    axis.set_ylabel("share of images, codes; 1 - cosine", fontsize=8)
    axis.legend(fontsize=7.5, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncol=2)
    picture = png(drawn)
    return picture if lines else None


def code_usage(usage: Mapping[str, npt.NDArray[np.int64]], clean: str) -> bytes:
    """Return a PNG of how often each code was used, most used first, on clean and on all corrupted images.

    Args:
        usage: per cell, uses of each code (K,).
        clean: key of the clean cell in it.
    """
    drawn, axis = figure(3)
    corrupted = [counts for cell, counts in usage.items() if cell != clean]
    curves = {"clean": usage.get(clean), "corrupted": np.sum(corrupted, axis=0) if corrupted else None}
    for i, (words, counts_K) in enumerate(curves.items()):
        if counts_K is None or not counts_K.sum():
            continue
        share_K = np.sort(counts_K / counts_K.sum())[::-1]
        used = int((share_K > 0).sum())
        label = f"{words}: {used} of {len(share_K)} codes"
        marker = "o" if used < 30 else None
        axis.plot(
            np.arange(1, used + 1), 100 * share_K[:used], color=COLOURS[i], marker=marker, lw=1.6, label=label
        )
    axis.set_yscale("log")
    axis.set_xlabel("codes, most used first", fontsize=8)
    axis.set_ylabel("share of uses, %", fontsize=8)
    axis.legend(fontsize=8, frameon=False)
    return png(drawn)
