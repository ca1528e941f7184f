"""Results of an evaluation: accuracy per cell, and what follows from the cells by arithmetic alone."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from pipeline.corruptions import HELD_OUT_KINDS, KINDS, TRAINING_KINDS
from tools.runtime.alexnet import ALEXNET_ERROR

CLEAN = "clean"
SEVERITIES = (1, 2, 3, 4, 5)


@dataclass(frozen=True)
class Cell:
    """Accuracy on one corruption at one severity; clean images are ("clean", 0). Accuracies are 0-1."""

    corruption: str
    severity: int
    top1: float
    top5: float
    images: int


@dataclass(frozen=True)
class Summary:
    """Aggregates over the kinds that were evaluated at all five severities.

    clean_top1, known_top1, unknown_top1: fractions; known and unknown mean the 15 benchmark kinds and the
        4 held-out ones, over severities; None where not evaluated.
    mean_error: unnormalised mean corruption error over the benchmark kinds, a fraction.
    mce_pct: mean over benchmark kinds of error / AlexNet's error, in percent (paper, eq. 11).
    top1: kind to mean top-1 over the severities, a fraction.
    """

    clean_top1: float | None
    clean_top5: float | None
    known_top1: float | None
    unknown_top1: float | None
    mean_error: float | None
    mce_pct: float | None
    mce_kinds: int
    top1: dict[str, float]

    @property
    def mce_label(self) -> str:
        """How many kinds the mCE is over, and what it is normalised by."""
        return (
            f"mCE over {self.mce_kinds} of {len(TRAINING_KINDS)} kinds, normalised by AlexNet on ImageNet-C"
        )


def summarise(cells: Iterable[Cell]) -> Summary:
    """Compute the aggregates of a set of cells.

    Raises:
        ValueError: if a kind lacks a severity, or a cell stands there twice.
    """
    by_kind: dict[str, dict[int, Cell]] = {}
    for cell in cells:
        severities = by_kind.setdefault(cell.corruption, {})
        if cell.severity in severities:
            raise ValueError(f"{cell.corruption} severity {cell.severity} stands twice in the results")
        severities[cell.severity] = cell
    clean = by_kind.pop(CLEAN, {}).get(0)
    top1 = {}
    for kind in sorted(by_kind, key=KINDS.index):
        missing = [s for s in SEVERITIES if s not in by_kind[kind]]
        if missing:
            raise ValueError(f"{kind} lacks severities {missing}; evaluate all five before averaging")
        top1[kind] = mean(by_kind[kind][s].top1 for s in SEVERITIES)
    known = [kind for kind in TRAINING_KINDS if kind in top1]
    unknown = [kind for kind in HELD_OUT_KINDS if kind in top1]
    return Summary(
        clean_top1=clean.top1 if clean else None,
        clean_top5=clean.top5 if clean else None,
        known_top1=mean(top1[k] for k in known) if known else None,
        unknown_top1=mean(top1[k] for k in unknown) if unknown else None,
        mean_error=mean(1 - top1[k] for k in known) if known else None,
        mce_pct=100 * mean((1 - top1[k]) / ALEXNET_ERROR[k] for k in known) if known else None,
        mce_kinds=len(known),
        top1=top1,
    )


def as_json(summary: Summary) -> dict[str, Any]:
    """Return the aggregates under the names the JSON file uses."""
    return {
        "clean_top1": summary.clean_top1,
        "clean_top5": summary.clean_top5,
        "known_top1": summary.known_top1,
        "unknown_top1": summary.unknown_top1,
        "mean_corruption_error": summary.mean_error,
        "mce": summary.mce_pct,
        "mce_label": summary.mce_label,
        "top1_per_corruption": summary.top1,
    }


def write_csv(path: Path, model: str, cells: Iterable[Cell]) -> None:
    """Write one row per cell: model, corruption, severity, top1, top5, images."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["model", "corruption", "severity", "top1", "top5", "images"])
        for c in cells:
            writer.writerow([model, c.corruption, c.severity, f"{c.top1:.6f}", f"{c.top5:.6f}", c.images])


def table(cells: Sequence[Cell], classes: int) -> str:
    """Return the results as the table `tools/evaluate.py` prints: top-1 in percent."""
    summary = summarise(cells)
    at = {(c.corruption, c.severity): c for c in cells}
    lines = []
    clean = at.get((CLEAN, 0))
    if clean:
        lines.append(
            f"clean  top-1 {100 * clean.top1:.2f} %  top-5 {100 * clean.top5:.2f} %  ({clean.images} images, "
            f"{classes} classes)"
        )
    if summary.top1:
        lines.append(f"{'top-1 %':20s}" + "".join(f"{f's{s}':>7s}" for s in SEVERITIES) + f"{'mean':>8s}")
    for kind, value in summary.top1.items():
        row = "".join(f"{100 * at[kind, s].top1:7.1f}" for s in SEVERITIES)
        mark = "  (held out)" if kind in HELD_OUT_KINDS else ""
        lines.append(f"{kind:20s}{row}{100 * value:8.1f}{mark}")
    if summary.mean_error is not None and summary.mce_pct is not None:
        lines.append(f"mean corruption error, unnormalised: {100 * summary.mean_error:.2f} %")
        lines.append(f"mCE {summary.mce_pct:.2f} %  ({summary.mce_label})")
        if classes != 1000:
            lines.append(
                "This mCE is not comparable with published ones: they are of ImageNet's 1,000 classes."
            )
    if summary.unknown_top1 is not None:
        lines.append(f"held-out kinds, mean top-1: {100 * summary.unknown_top1:.2f} %")
    return "\n".join(lines)
