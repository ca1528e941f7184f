"""Results of an evaluation: numbers per cell, and what follows from the cells by arithmetic alone."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import mean
from typing import Any

from pipeline.corruptions import HELD_OUT_KINDS, KINDS, TRAINING_KINDS
from tools.runtime.alexnet import ALEXNET_CLEAN_ERROR, ALEXNET_ERROR

CLEAN = "clean"
SEVERITIES = (1, 2, 3, 4, 5)

CellName = tuple[str, int]

FAMILIES: dict[str, tuple[str, ...]] = {
    "noise": TRAINING_KINDS[0:3],
    "blur": TRAINING_KINDS[3:7],
    "weather": TRAINING_KINDS[7:11],
    "digital": TRAINING_KINDS[11:15],
}
"""The four families of ImageNet-C (arXiv:1903.12261, section 3.2)."""

C_BAR_KINDS: tuple[str, ...] = (
    "blue_noise_sample",
    "plasma_noise",
    "checkerboard_cutout",
    "inverse_sparkles",
    "brownish_noise",
    "perlin_noise",
    "concentric_sine_waves",
    "single_frequency_greyscale",
    "caustic_refraction",
    "sparkles",
)
"""The ten corruptions of ImageNet-C-bar (arXiv:2102.11273), chosen to be unlike ImageNet-C's."""


@dataclass(frozen=True)
class Cell:
    """Results on one corruption at one severity; clean images are ("clean", 0), other sets (name, 0).

    top1, top5: fractions. ece, nll, brier: calibration, see `tools.evaluation.calibration`. consistency: share of
    images with the clean image's prediction. agreement, drift_before, drift_after, residual: means of
    `tools.evaluation.outcomes.VALUES`. perplexity: of the codes, 1 to K. None: not measured.
    """

    corruption: str
    severity: int
    top1: float
    top5: float
    images: int
    ece: float | None = None
    nll: float | None = None
    brier: float | None = None
    consistency: float | None = None
    agreement: float | None = None
    drift_before: float | None = None
    drift_after: float | None = None
    residual: float | None = None
    perplexity: float | None = None

    @property
    def name(self) -> CellName:
        """Corruption and severity."""
        return self.corruption, self.severity


COLUMNS = tuple(field.name for field in fields(Cell))


@dataclass(frozen=True)
class Summary:
    """Aggregates of the cells of one model. Accuracies and errors are fractions, mCE is in percent.

    known_top1, unknown_top1: mean over the 15 benchmark kinds and the 4 held-out ones, over severities; of those
        that were evaluated: mce_kinds and unknown_kinds of them. `missing` names the cells that were not.
    mean_error: mean corruption error over the benchmark kinds that were evaluated, unnormalised.
    mce_pct: mean over benchmark kinds of error / AlexNet's error (paper, eq. 11); None unless all 15 are there or a
        partial one was asked for.
    relative_mce_pct: the same of the errors beyond the clean one, for model and AlexNet.
    family_top1: mean top-1 per family of the benchmark kinds, whole families only.
    c_bar_top1: mean over the kinds of ImageNet-C-bar that were evaluated.
    top1: kind to mean top-1 over the severities.
    sets_top1: top-1 on sets that have no severities.
    """

    clean_top1: float | None
    clean_top5: float | None
    known_top1: float | None
    unknown_top1: float | None
    mean_error: float | None
    mce_pct: float | None
    relative_mce_pct: float | None
    mce_kinds: int
    unknown_kinds: int
    family_top1: dict[str, float]
    c_bar_top1: float | None
    top1: dict[str, float]
    sets_top1: dict[str, float]
    missing: tuple[CellName, ...]

    @property
    def known_over(self) -> str:
        """What is said after Known and the mean error where they are over a part of their kinds."""
        return over(self.mce_kinds, TRAINING_KINDS)

    @property
    def unknown_over(self) -> str:
        """The same after Unknown."""
        return over(self.unknown_kinds, HELD_OUT_KINDS)

    @property
    def mce_label(self) -> str:
        """How many kinds the mCE is over, and what it is normalised by."""
        return (
            f"mCE over {self.mce_kinds} of {len(TRAINING_KINDS)} kinds, normalised by AlexNet on ImageNet-C"
        )


def over(there: int, kinds: Sequence[str]) -> str:
    """Return " (2 of 15 kinds)", or nothing where all or none are there."""
    return f" ({there} of {len(kinds)} kinds)" if 0 < there < len(kinds) else ""


def by_kind(cells: Iterable[Cell]) -> dict[str, dict[int, Cell]]:
    """Group cells by corruption and severity.

    Raises:
        ValueError: if a cell stands there twice.
    """
    grouped: dict[str, dict[int, Cell]] = {}
    for cell in cells:
        severities = grouped.setdefault(cell.corruption, {})
        if cell.severity in severities:
            raise ValueError(f"{cell.corruption} severity {cell.severity} stands twice in the results")
        severities[cell.severity] = cell
    return grouped


def _in_order(kinds: Iterable[str]) -> list[str]:
    """Kinds in the benchmarks' order, others after them by name."""
    order = {kind: i for i, kind in enumerate((*KINDS, *C_BAR_KINDS))}
    return sorted(kinds, key=lambda kind: (order.get(kind, len(order)), kind))


def summarise(cells: Iterable[Cell], *, partial: bool = False, released_bug: bool = False) -> Summary:
    """Compute the aggregates of a model's cells.

    A kind without all five severities has no mean and is not counted; its missing cells are named in `missing`. So
    are all cells of benchmark kinds that are absent, unless no benchmark kind is there at all.

    Args:
        cells: of one model.
        partial: give the mCE over the kinds there are, instead of none.
        released_bug: compute the mCE as the VQSA authors' published code does, which drops gaussian_noise and puts
            the clean error in its place, with AlexNet's errors rounded to 0.1 %; only for reproducing their numbers.

    Raises:
        ValueError: if a cell stands there twice.
    """
    grouped = by_kind(cells)
    clean = grouped.pop(CLEAN, {}).get(0)
    sets = {kind: grouped.pop(kind)[0].top1 for kind in list(grouped) if set(grouped[kind]) == {0}}
    missing = [(k, s) for k in _in_order(grouped) for s in SEVERITIES if s not in grouped[k]]
    if any(kind in TRAINING_KINDS for kind in grouped):
        missing += [(k, s) for k in TRAINING_KINDS if k not in grouped for s in SEVERITIES]
    if any(kind in HELD_OUT_KINDS for kind in grouped):
        missing += [(k, s) for k in HELD_OUT_KINDS if k not in grouped for s in SEVERITIES]
    top1 = {
        kind: mean(grouped[kind][s].top1 for s in SEVERITIES)
        for kind in _in_order(grouped)
        if set(SEVERITIES) <= grouped[kind].keys()
    }
    known = [kind for kind in TRAINING_KINDS if kind in top1]
    unknown = [kind for kind in HELD_OUT_KINDS if kind in top1]
    c_bar = [kind for kind in C_BAR_KINDS if kind in top1]
    clean_error = None if clean is None else 1 - clean.top1
    mce = relative = None
    if known and (partial or len(known) == len(TRAINING_KINDS)):
        mce = 100 * mean((1 - top1[k]) / ALEXNET_ERROR[k] for k in known)
        if released_bug:
            mce = _released_mce(top1, clean_error)
        if clean_error is not None:
            relative = 100 * mean(
                (1 - top1[k] - clean_error) / (ALEXNET_ERROR[k] - ALEXNET_CLEAN_ERROR) for k in known
            )
    return Summary(
        clean_top1=clean.top1 if clean else None,
        clean_top5=clean.top5 if clean else None,
        known_top1=mean(top1[k] for k in known) if known else None,
        unknown_top1=mean(top1[k] for k in unknown) if unknown else None,
        mean_error=mean(1 - top1[k] for k in known) if known else None,
        mce_pct=mce,
        relative_mce_pct=relative,
        mce_kinds=len(known),
        unknown_kinds=len(unknown),
        family_top1={
            family: mean(top1[k] for k in kinds)
            for family, kinds in FAMILIES.items()
            if all(k in top1 for k in kinds)
        },
        c_bar_top1=mean(top1[k] for k in c_bar) if c_bar else None,
        top1=top1,
        sets_top1=sets,
        missing=tuple(missing),
    )


def _released_mce(top1: dict[str, float], clean_error: float | None) -> float:
    """The published code deletes the wrong list entry: its first quotient is clean error / AlexNet's of gaussian."""
    if clean_error is None or set(TRAINING_KINDS) - top1.keys():
        raise ValueError(
            "--released-mce-bug needs the clean cell and all 15 benchmark kinds, as the published code has them"
        )
    errors = [clean_error, *(1 - top1[kind] for kind in TRAINING_KINDS[1:])]
    rounded = [round(ALEXNET_ERROR[kind], 3) for kind in TRAINING_KINDS]
    return 100 * mean(e / a for e, a in zip(errors, rounded, strict=True))


def names(cells: Sequence[CellName], most: int = 6) -> str:
    """Put cells in words: "fog 4, fog 5 … and 73 more"."""
    shown = ", ".join(f"{kind} {severity}" for kind, severity in cells[:most])
    return shown + (f" … and {len(cells) - most} more" if len(cells) > most else "")


def as_json(summary: Summary) -> dict[str, Any]:
    """Return the aggregates under the names the JSON file uses."""
    return {
        "clean_top1": summary.clean_top1,
        "clean_top5": summary.clean_top5,
        "known_top1": summary.known_top1,
        "known_kinds": summary.mce_kinds,
        "unknown_top1": summary.unknown_top1,
        "unknown_kinds": summary.unknown_kinds,
        "mean_corruption_error": summary.mean_error,
        "mce": summary.mce_pct,
        "relative_mce": summary.relative_mce_pct,
        "mce_label": summary.mce_label,
        "family_top1": summary.family_top1,
        "c_bar_top1": summary.c_bar_top1,
        "top1_per_corruption": summary.top1,
        "sets_top1": summary.sets_top1,
        "missing_cells": [f"{kind} {severity}" for kind, severity in summary.missing],
    }


def write_csv(path: Path, results: dict[str, Sequence[Cell]]) -> None:
    """Write one row per model and cell: model, then the fields of `Cell`; empty where not measured."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["model", *COLUMNS], lineterminator="\n")
        writer.writeheader()
        for model, cells in results.items():
            for cell in cells:
                row = {k: f"{v:.6f}" if isinstance(v, float) else v for k, v in asdict(cell).items()}
                writer.writerow({"model": model, **row})


def read_csv(path: Path) -> dict[str, list[Cell]]:
    """Read cells by model. Columns model, corruption, severity and top1 are needed, the others of `Cell` may be there.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a column is missing, or a value is no number or impossible; names the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; tools/evaluate.py writes cells.csv")
    results: dict[str, list[Cell]] = {}
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        needed = ("model", "corruption", "severity", "top1")
        absent = [name for name in needed if name not in (reader.fieldnames or ())]
        if absent:
            raise ValueError(
                f"{path}: no column {', '.join(absent)}; wanted {', '.join(needed)}, found "
                f"{', '.join(reader.fieldnames or ()) or 'an empty file'}"
            )
        for row in reader:
            try:
                cell = _cell(row)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {reader.line_num}: {error}") from None
            results.setdefault(row["model"], []).append(cell)
    return results


def _cell(row: dict[str, str]) -> Cell:
    severity = row["severity"] or "0"
    if severity not in {"0", "1", "2", "3", "4", "5"}:
        raise ValueError(
            f"severity {severity!r} is outside 0..5 (0 for clean images and sets without severities)"
        )
    values: dict[str, float | None] = {}
    for column in COLUMNS[2:]:
        text = row.get(column) or ""
        try:
            values[column] = float(text) if text else None
        except ValueError:
            raise ValueError(f"{column} {text!r} is no number") from None
    top1 = values.pop("top1")
    top5 = values.pop("top5")
    if top1 is None:
        raise ValueError("top1 is empty; leave the line out for a cell that was not evaluated")
    for column, value in (("top1", top1), ("top5", top5), ("ece", values["ece"])):
        if value is not None and not 0 <= value <= 1:
            hint = "; it is a fraction, not a percentage" if 1 < value <= 100 else ""
            raise ValueError(f"{column} {value:g} is outside 0..1{hint}")
    images = int(values.pop("images") or 0)
    return Cell(
        row["corruption"], int(severity), top1, float("nan") if top5 is None else top5, images, **values
    )


def table(cells: Sequence[Cell], classes: int, *, partial: bool = False, released_bug: bool = False) -> str:
    """Return a model's results as the table `tools/evaluate.py` prints: top-1 in percent."""
    summary = summarise(cells, partial=partial, released_bug=released_bug)
    at = {c.name: c for c in cells}
    lines = []
    clean = at.get((CLEAN, 0))
    if clean:
        lines.append(
            f"clean  top-1 {100 * clean.top1:.2f} %  top-5 {100 * clean.top5:.2f} %  ({clean.images} images, "
            f"{classes} classes)"
        )
    for name, value in summary.sets_top1.items():
        lines.append(f"{name}  top-1 {100 * value:.2f} %  ({at[name, 0].images} images)")
    if summary.top1:
        lines.append(f"{'top-1 %':27s}" + "".join(f"{f's{s}':>7s}" for s in SEVERITIES) + f"{'mean':>8s}")
    for kind, value in summary.top1.items():
        row = "".join(f"{100 * at[kind, s].top1:7.1f}" for s in SEVERITIES)
        mark = "  (held out)" if kind in HELD_OUT_KINDS else ""
        lines.append(f"{kind:27s}{row}{100 * value:8.1f}{mark}")
    for family, value in summary.family_top1.items():
        lines.append(f"{family:27s}{'':35s}{100 * value:8.1f}  (family)")
    if summary.mean_error is not None:
        lines.append(
            f"mean corruption error, unnormalised{summary.known_over}: {100 * summary.mean_error:.2f} %"
        )
    if summary.mce_pct is not None:
        relative = summary.relative_mce_pct
        more = "" if relative is None else f", relative mCE {relative:.2f} %"
        lines.append(f"mCE {summary.mce_pct:.2f} %{more}  ({summary.mce_label})")
        if released_bug:
            lines.append("This mCE repeats the published code's mistake, as asked for; it is too low.")
        if classes != 1000:
            lines.append(
                "This mCE is not comparable with published ones: they are of ImageNet's 1,000 classes."
            )
    elif summary.known_top1 is not None:
        lines.append(
            f"no mCE: missing {names(summary.missing)}; --partial-mce gives it over the kinds there are"
        )
    if summary.unknown_top1 is not None:
        lines.append(f"held-out kinds{summary.unknown_over}, mean top-1: {100 * summary.unknown_top1:.2f} %")
    if summary.c_bar_top1 is not None:
        part = over(sum(kind in summary.top1 for kind in C_BAR_KINDS), C_BAR_KINDS)
        lines.append(f"ImageNet-C-bar{part}, mean top-1: {100 * summary.c_bar_top1:.2f} %")
    return "\n".join(lines)
