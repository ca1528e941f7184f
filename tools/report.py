"""Makes one self-contained HTML page of an evaluation and its run, and the figures on it as files.

python tools/report.py --run runs/x
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import numpy as np
import tyro
from pydantic import BaseModel, ConfigDict

from pipeline.corruptions import HELD_OUT_KINDS, TRAINING_KINDS
from tools.figures import accuracy, of_models, page, stability, training
from tools.figures.paper import TABLE_3
from tools.runtime import checkpoint
from tools.runtime.config import RunConfig, flatten, validated
from tools.runtime.metrics import read_metrics
from tools.runtime.results import CLEAN, SEVERITIES, Cell, by_kind, over, read_csv, summarise

log = logging.getLogger("vqsa")


class ReportCommand(BaseModel):
    """Make a report page of an evaluation; with --run, of the training behind it too."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    run: Path | None = None
    """Run folder, with metrics.jsonl and checkpoints."""

    evaluation: Path | None = None
    """Folder that tools/evaluate.py wrote. Unset: evaluation/ in the run folder."""

    data: Path | None = None
    """Clean images for the figures that need some. Unset: those of the evaluation."""

    figures: Literal["auto", "saved", "again"] = "auto"
    """Figures that need the models (Grad-CAM, t-SNE, gallery): made if they are not there yet; only those that are
    there; or made anew."""

    out: Path | None = None
    """The page. Unset: report.html in the run folder, or in the evaluation's."""


def report(command: ReportCommand) -> Path:
    """Write the page and its figures; returns the page's path.

    Raises:
        FileNotFoundError: no evaluation there, or no checkpoint in the run.
        ValueError: the run has gone on since it was evaluated.
    """
    if command.evaluation is None and command.run is None:
        raise ValueError("nothing to report on: give --run RUN, or --evaluation FOLDER")
    evaluation = command.evaluation or (command.run or Path()) / "evaluation"
    out = command.out or (command.run or evaluation) / "report.html"
    text = make(command, evaluation)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text)
    print(f"report: {out.resolve()}")
    return out


def make(command: ReportCommand, evaluation: Path) -> str:
    """Return the page's HTML; draws the figures into `figures/` beside the results."""
    if not (evaluation / "results.json").is_file():
        raise FileNotFoundError(f"{evaluation} has no results.json; run tools/evaluate.py first")
    results = json.loads((evaluation / "results.json").read_text())
    cells = read_csv(evaluation / "cells.csv")
    folder = evaluation / "figures"
    folder.mkdir(exist_ok=True)
    first = next(iter(results["models"].values()))
    title = f"{Path(results['data']).name}: {', '.join(results['models'])}"
    parts = [page.title(title), page.note(_about(results))]
    parts += [page.tiles(_tiles(first)), page.verdicts([m["verdict"] for m in results["models"].values()])]
    parts += _accuracy(results, cells, folder)
    parts += _quality(results, cells, evaluation, folder)
    parts += _models(command, results, evaluation)
    if command.run is not None:
        parts += _training(command.run, results, folder)
    return page.page(title, parts)


def _about(results: dict[str, Any]) -> str:
    environment = results["environment"]
    machine = environment["gpu"] if environment["device"] == "cuda" else environment["cpu"]
    words = (
        f"{results['images']} images of {Path(results['data']).name}, seed {results['seed']}, corruptions as "
        f"{results['flavour']}{' with a JPEG pass at quality 85' if results['jpeg85'] else ''}, "
        f"{results['precision']}; {results['date']}, commit {results['commit']}, torch "
        f"{environment['packages']['torch']}, {machine}."
    )
    if results["damaged"]:
        words += f" {len(results['damaged'])} damaged images were left out."
    if any(m["classes"] != 1000 for m in results["models"].values()):
        words += " An mCE off ImageNet's 1,000 classes is not comparable with published ones."
    return words


def _percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f}"


def _tiles(model: dict[str, Any]) -> list[tuple[str, str]]:
    known, unknown = _parts(model)
    found = [
        ("clean_top1", "clean top-1, %"),
        ("known_top1", f"Known: top-1 over the {len(TRAINING_KINDS)} benchmark corruptions{known}, %"),
        ("unknown_top1", f"Unknown: top-1 over the {len(HELD_OUT_KINDS)} held-out corruptions{unknown}, %"),
        ("mean_corruption_error", f"mean corruption error, unnormalised{known}, %"),
    ]
    tiles = [(_percent(model[key]), words) for key, words in found if model[key] is not None]
    if model["mce"] is not None:
        tiles.append((f"{model['mce']:.1f}", model["mce_label"]))
    return tiles


def _parts(model: dict[str, Any]) -> tuple[str, str]:
    """What is said after Known and after Unknown where some of their kinds were not evaluated."""
    evaluated = model["top1_per_corruption"]
    known, unknown = (
        over(sum(k in evaluated for k in kinds), kinds) for kinds in (TRAINING_KINDS, HELD_OUT_KINDS)
    )
    return known, unknown


def _accuracy(results: dict[str, Any], cells: dict[str, list[Cell]], folder: Path) -> list[str]:
    """The table beside the paper's, bars, curves, every cell."""
    head = ["", "clean", "Known", "Unknown", "mCE", "relative mCE"]
    rows, ours = [], []
    for row in TABLE_3:
        rows.append([row.method, *(f"{v:.1f}" for v in row[1:]), "–"])
        ours.append(False)
    for name, m in results["models"].items():
        spans = m["intervals_95"]

        known, unknown = _parts(m)

        def value(
            key: str, factor: float, part: str = "", m: dict[str, Any] = m, spans: dict[str, Any] = spans
        ) -> str:
            if m[key] is None:
                return "–"
            span = spans.get(key)
            half = "" if span is None else f" ± {factor * (span[1] - span[0]) / 2:.1f}"
            return f"{factor * m[key]:.1f}{half}{part}"

        numbers = [
            value("clean_top1", 100),
            value("known_top1", 100, known),
            value("unknown_top1", 100, unknown),
        ]
        rows.append([name, *numbers, value("mce", 1, known), value("relative_mce", 1, known)])
        ours.append(True)
    parts = [
        page.heading("Results beside the paper's"),
        page.note(
            "Upper rows: table 3 of the paper, on ImageNet. Lower rows: this evaluation; ± is half of a 95 % bootstrap "
            "interval over the images. Compare models that were trained on the same corruptions and tested on the "
            "same images only."
        ),
        page.table(head, rows, ours),
    ]
    benchmark = {name: found for name, found in cells.items() if accuracy.is_benchmark(found)}
    if benchmark:
        drawn = {"bars.png": accuracy.bars(benchmark), "severity.png": accuracy.severity_curves(benchmark)}
        words = {"bars.png": "Top-1 per corruption", "severity.png": "Top-1 over severity, by family"}
        parts.append(page.heading("Accuracy per corruption"))
        parts.append(page.figures([_kept(folder, file, data, words[file]) for file, data in drawn.items()]))
    sets = {name: summarise(found).sets_top1 for name, found in cells.items()}
    if any(sets.values()):
        columns = list(dict.fromkeys(s for values in sets.values() for s in values))
        parts.append(page.heading("Other sets: top-1, %"))
        parts.append(
            page.table(["", *columns], [[n, *(_percent(v.get(c)) for c in columns)] for n, v in sets.items()])
        )
    for name, found in cells.items():
        parts.append(page.folded(f"Every cell of {name}", _cells(found)))
    return parts


def _cells(cells: list[Cell]) -> str:
    grouped = by_kind(cells)
    rows = []
    for kind, values in grouped.items():
        if kind == CLEAN or set(values) == {0}:
            continue
        found = [values[s].top1 if s in values else None for s in SEVERITIES]
        there = [v for v in found if v is not None]
        errors = [v for c in values.values() if (v := c.ece) is not None]
        nll = [v for c in values.values() if (v := c.nll) is not None]
        rows.append(
            [
                kind,
                *(_percent(v) for v in found),
                _percent(mean(there)),
                _percent(mean(errors)) if errors else "–",
                f"{mean(nll):.2f}" if nll else "–",
            ]
        )
    return page.table(["top-1, %", *(f"s{s}" for s in SEVERITIES), "mean", "ECE, %", "NLL"], rows)


def _kept(folder: Path, file: str, data: bytes, words: str) -> str:
    """Write a figure to its file and put it on the page."""
    (folder / file).write_bytes(data)
    return page.picture(data, words)


def _quality(
    results: dict[str, Any], cells: dict[str, list[Cell]], evaluation: Path, folder: Path
) -> list[str]:
    """Calibration, and how much the inside of the models moves with image quality."""
    calibration, stable = [], []
    for name, found in cells.items():
        corrupted = [c for c in found if c.severity]
        clean = [c for c in found if c.name == (CLEAN, 0)]
        row = [name]
        for measure in ("ece", "nll", "brier"):
            row += [_average(part, measure, percent=measure == "ece") for part in (clean, corrupted)]
        calibration.append(row)
        row = [name, _average(corrupted, "consistency", percent=True)]
        row += [
            _average(corrupted, measure)
            for measure in ("agreement", "drift_before", "drift_after", "residual")
        ]
        row.append(_average(corrupted, "perplexity"))
        correlations = results["models"][name]["severity_correlation"].values()
        for value in ("confidence", "drift_after"):
            srcc = [c[value]["srcc"] for c in correlations if c.get(value, {}).get("srcc") is not None]
            row.append(f"{mean(srcc):+.2f}" if srcc else "–")
        stable.append(row)
    parts = [
        page.heading("Calibration"),
        page.note("ECE over 15 bins, in percent; corrupted: means over the cells."),
        page.table(
            ["", "ECE clean", "corrupted", "NLL clean", "corrupted", "Brier clean", "corrupted"], calibration
        ),
        page.heading("Quality independence"),
        page.note(
            "Corrupted images against the same images clean, means over the cells. Drift is 1 - cosine between the two "
            "features, before and after quantisation and attention; residual is 1 - cosine between feature and "
            "code; SRCC: rank correlation of single images' values with the severity, mean over corruptions."
        ),
        page.table(
            [
                "",
                "same prediction, %",
                "same codes",
                "drift before",
                "drift after",
                "residual",
                "perplexity",
                "SRCC confidence",
                "SRCC drift",
            ],
            stable,
        ),
    ]
    pictures = []
    usage = _usage(evaluation)
    for i, (name, found) in enumerate(cells.items()):
        drawn = stability.stability(found)
        if drawn is not None and i < 3:
            pictures.append(_kept(folder, f"stability_{i}.png", drawn, f"{name}: what stays the same"))
        if name in usage:
            drawn = stability.code_usage(usage[name], f"{CLEAN}/0")
            pictures.append(_kept(folder, f"codes_{i}.png", drawn, f"{name}: use of the codebook"))
    return [*parts, page.figures(pictures)]


def _average(cells: list[Cell], measure: str, *, percent: bool = False) -> str:
    values = [v for cell in cells if (v := getattr(cell, measure)) is not None]
    if not values:
        return "–"
    return _percent(mean(values)) if percent else f"{mean(values):.2f}"


def _usage(evaluation: Path) -> dict[str, dict[str, Any]]:
    """Return code counts by model and cell."""
    file = evaluation / "code_usage.npz"
    found: dict[str, dict[str, Any]] = {}
    if file.is_file():
        with np.load(file) as arrays:
            for key in arrays.files:
                name, kind, severity = key.rsplit("/", 2)
                found.setdefault(name, {})[f"{kind}/{severity}"] = arrays[key]
    return found


def _models(command: ReportCommand, results: dict[str, Any], evaluation: Path) -> list[str]:
    """Grad-CAM, t-SNE and gallery: from files, made first if need be."""
    found, missed = of_models.kept_or_drawn(results, command.data, evaluation, command.figures)
    for words in missed:
        log.warning("%s", words)
    if not found and not missed:
        return []
    pictures = [page.picture(path.read_bytes(), of_models.FILES[file]) for file, path in found.items()]
    return [page.heading("What the models see"), page.figures(pictures), *map(page.note, missed)]


def _training(run: Path, results: dict[str, Any], folder: Path) -> list[str]:
    """Loss, accuracy, first batch and configuration of the run."""
    found = checkpoint.newest(run)
    config = validated(RunConfig, found.config, str(found.path))
    steps = sorted({m["step"] for m in results["models"].values() if "step" in m})
    if found.step not in steps:
        raise ValueError(
            f"the evaluation has the results of step {', '.join(map(str, steps))}, but {run} has gone on to step "
            f"{found.step}; run tools/evaluate.py again"
        )
    records = read_metrics(run / "metrics.jsonl")
    pictures = [
        _kept(folder, "loss.png", training.losses(records), "Loss over the steps"),
        _kept(folder, "training.png", training.accuracies(records), "Accuracy over the steps"),
    ]
    if config.data.exists():
        pictures.append(
            _kept(
                folder, "batch.jpg", training.first_batch(config), "The first images the model was trained on"
            )
        )
    settings = page.table(["setting", "value"], [[k, str(v)] for k, v in flatten(found.config).items()])
    return [
        page.heading(
            f"Training: {config.model.trunk}, {found.step} steps of {config.pipeline.batch_global} images"
        ),
        page.figures(pictures),
        page.folded("Configuration", settings),
    ]


def main() -> None:
    """Run the command line."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        report(tyro.cli(ReportCommand, description=ReportCommand.__doc__))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"report.py: {error}")


if __name__ == "__main__":
    main()
