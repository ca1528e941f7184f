"""Recomputes every aggregate of published cells and says what does not fit.

python tools/check_results.py cells.csv --json
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import tyro
from pydantic import BaseModel, ConfigDict

from pipeline.corruptions import HELD_OUT_KINDS, KINDS, TRAINING_KINDS
from pipeline.corruptions.kinds import suggest
from tools.runtime.results import C_BAR_KINDS, Cell, Summary, names, read_csv, summarise

RATIO_BAND = (1.252, 1.285)
"""mCE divided by the mean corruption error, over 12 published models of mCE 41 to 100 (RobustBench's cells). The two
are different averages of the same cells, so that a pair far outside was not made by one evaluation."""


class CheckCommand(BaseModel):
    """Check a table of results: one row per model, corruption and severity, top1 as a fraction; or one row per model
    with `known` and `mce` as somebody printed them."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    cells: tyro.conf.Positional[Path]
    """CSV with the columns model, corruption, severity, top1; clean rows and calibration (ece, nll, brier) may be there
    too. Or with the columns model, known, mce."""

    json_: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print JSON: {model: {known, unknown, mce, relative_mce, …}}; mCE in percent, accuracies as fractions."""

    metrics: tuple[str, ...] = ()
    """Give these numbers only, by their names in the JSON; all by default. Missing cells and flags are always said."""

    partial: bool = False
    """Give Known, Unknown and mCE over the kinds there are, where some are missing."""

    released_mce_bug: bool = False
    """Compute the mCE with the mistake of the VQSA authors' published code."""

    strict: bool = False
    """Exit with 1 on anything flagged, not on missing cells alone."""


def check(command: CheckCommand) -> dict[str, dict[str, Any]]:
    """Return the aggregates and findings by model.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a table, or an impossible value in it; names the line.
    """
    if not command.cells.is_file():
        raise FileNotFoundError(f"{command.cells}: no such file; tools/evaluate.py writes cells.csv")
    printed = read_printed(command.cells)
    if printed is not None:
        return {
            model: chosen({**pair, "flags": pair_flags(**pair)}, command.metrics)
            for model, pair in printed.items()
        }
    found = {}
    for model, cells in read_csv(command.cells).items():
        for cell in cells:
            known = (*KINDS[1:], *C_BAR_KINDS)
            if cell.severity and cell.corruption not in known:
                raise ValueError(
                    f"{command.cells}: {model}: unknown corruption {cell.corruption!r}{suggest(cell.corruption, known)}"
                )
        try:
            summary = summarise(cells, partial=command.partial, released_bug=command.released_mce_bug)
        except ValueError as error:
            raise ValueError(f"{command.cells}: {model}: {error}") from None
        found[model] = aggregates(cells, summary, partial=command.partial)
    if not found:
        raise ValueError(f"{command.cells}: no rows")
    return {model: chosen(numbers, command.metrics) for model, numbers in found.items()}


def chosen(numbers: dict[str, Any], metrics: tuple[str, ...]) -> dict[str, Any]:
    """Return the metrics asked for, and what is always said.

    Raises:
        ValueError: an unknown metric.
    """
    said = ("missing_cells", "flags")
    known = [name for name in numbers if name not in said]
    for name in metrics:
        if name not in known:
            raise ValueError(f"--metrics: unknown metric {name!r}{suggest(name, known)}")
    return {name: value for name, value in numbers.items() if not metrics or name in (*metrics, *said)}


def read_printed(path: Path) -> dict[str, dict[str, float]] | None:
    """Return model, known (fraction) and mce (percent) of a table of printed aggregates; None if it has cells."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        columns = set(reader.fieldnames or ())
        if "corruption" in columns or not {"model", "known", "mce"} <= columns:
            return None
        try:
            return {row["model"]: {"known": float(row["known"]), "mce": float(row["mce"])} for row in reader}
        except ValueError as error:
            raise ValueError(
                f"{path}, line {reader.line_num}: {error}; known is a fraction, mce percent"
            ) from None


def aggregates(cells: list[Cell], summary: Summary, *, partial: bool) -> dict[str, Any]:
    """Return what the JSON says of one model; a mean over a part of its kinds only if that was asked for."""
    absent = {kind for kind, _ in summary.missing}
    kinds = [cell for cell in cells if cell.severity]
    flags = []
    ratio = None
    # The band is one of whole benchmarks: over a few kinds the two averages lie anywhere.
    whole = summary.mce_kinds == len(TRAINING_KINDS)
    if whole and summary.mce_pct is not None and summary.known_top1 is not None:
        ratio = summary.mce_pct / (100 * (1 - summary.known_top1)) if summary.known_top1 < 1 else None
        flags = pair_flags(summary.known_top1, summary.mce_pct)
    clean = summary.clean_top1
    for kind, top1 in summary.top1.items():
        if clean is not None and top1 > clean + 0.02:
            flags.append(f"{kind}: {100 * top1:.2f} % is above clean accuracy ({100 * clean:.2f} %)")
    calibration = {
        name: mean(values)
        for name in ("ece", "nll", "brier")
        if (values := [v for cell in kinds if (v := getattr(cell, name)) is not None])
    }
    return {
        "clean": clean,
        "known": summary.known_top1 if partial or not absent & set(TRAINING_KINDS) else None,
        "unknown": summary.unknown_top1 if partial or not absent & set(HELD_OUT_KINDS) else None,
        "mean_error": summary.mean_error if partial or not absent & set(TRAINING_KINDS) else None,
        "mce": summary.mce_pct,
        "mce_kinds": summary.mce_kinds,
        "relative_mce": summary.relative_mce_pct,
        "families": summary.family_top1,
        "c_bar": summary.c_bar_top1,
        "sets": summary.sets_top1,
        "top1": summary.top1,
        "calibration": calibration,
        "mce_over_mean_error": ratio,
        "missing_cells": [f"{kind} {severity}" for kind, severity in summary.missing],
        "flags": flags,
    }


def pair_flags(known: float, mce: float) -> list[str]:
    """Return a line if an mCE (percent) and a mean accuracy (fraction) are unlikely to be of the same cells."""
    if not 0 <= known < 1:
        return [f"known {known:g} is no fraction below 1"]
    ratio, (low, high) = mce / (100 * (1 - known)), RATIO_BAND
    if low <= ratio <= high:
        return []
    mid = 100 * (1 - known) * (low + high) / 2
    return [
        f"mCE {mce:.2f} % with Known {100 * known:.2f} %: ratio mCE / mean error {ratio:.3f} is outside {low}-{high}, "
        f"measured on 12 published ImageNet models; about {mid:.1f} % would fit. Were both made by one evaluation?"
    ]


COLUMNS = ("clean", "known", "unknown", "mce", "relative_mce")
"""What is printed where no metrics are asked for."""

_AS_THEY_ARE = ("mce", "relative_mce", "mce_kinds", "mce_over_mean_error", "calibration")
"""Not fractions, or fractions beside numbers that are none; the others are printed in percent."""


def text(found: dict[str, dict[str, Any]], metrics: tuple[str, ...] = ()) -> str:
    """Put the findings in words: a column for each number, a line for what has several."""
    asked = [name for name in metrics or COLUMNS if any(name in f for f in found.values())]
    several = [name for name in asked if any(isinstance(f.get(name), dict) for f in found.values())]
    columns = {name: max(13, len(name) + 2) for name in asked if name not in several}

    def number(name: str, value: float | None) -> str:
        return "-" if value is None else f"{value if name in _AS_THEY_ARE else 100 * value:.2f}"

    width = max(len("model"), *(len(model) for model in found))
    lines = []
    if columns:
        lines.append(f"{'model':{width}s}" + "".join(f"{name:>{wide}s}" for name, wide in columns.items()))
        for model, f in found.items():
            row = "".join(f"{number(name, f.get(name)):>{wide}s}" for name, wide in columns.items())
            lines.append(f"{model:{width}s}{row}")
    for model, f in found.items():
        for name in several:
            parts = ", ".join(f"{part} {number(name, value)}" for part, value in f.get(name, {}).items())
            lines.append(f"{model}: {name}: {parts or '-'}")
    for model, f in found.items():
        missing = [(m.rpartition(" ")[0], int(m.rpartition(" ")[2])) for m in f.get("missing_cells", ())]
        if missing:
            lines.append(f"{model}: missing {names(missing, most=20)}")
        lines += [f"{model}: {flag}" for flag in f["flags"]]
    lines.append("Which corruptions the models were trained on is not in this table: say it beside any mCE.")
    return "\n".join(lines)


def main() -> None:
    """Run the command line; exits with 1 where cells are missing."""
    try:
        command = tyro.cli(CheckCommand, description=CheckCommand.__doc__)
        found = check(command)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"check_results.py: {error}")
    if command.json_:
        print(json.dumps(found, indent=1))
    else:
        print(text(found, command.metrics))
    missing = {model: f["missing_cells"] for model, f in found.items() if f.get("missing_cells")}
    if missing and command.json_:
        for model, cells in missing.items():
            print(f"check_results.py: {model}: missing {', '.join(cells)}", file=sys.stderr)
    if (missing and not command.partial) or (command.strict and any(f["flags"] for f in found.values())):
        sys.exit(1)


if __name__ == "__main__":
    main()
