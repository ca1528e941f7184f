"""Makes one self-contained HTML page of a run: results, loss curve, and what a training batch looks like.

python tools/report.py --run runs/x
"""

from __future__ import annotations

import base64
import html
import io
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed
import matplotlib.pyplot as plt
import tyro
from matplotlib.figure import Figure
from pydantic import BaseModel, ConfigDict

import shards
from pipeline.corruptions import HELD_OUT_KINDS, KINDS
from pipeline.loader import TrainingLoader
from pipeline.normalise import denormalise
from tools.runtime import checkpoint
from tools.runtime.config import RunConfig, flatten, validated
from tools.runtime.metrics import read_metrics

_COLUMNS, _ROWS = 8, 4
_INK, _LINE = "#1c2733", "#2a6fb0"

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2733; background: #fff; margin: 0 auto;
       max-width: 1100px; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1.2rem 0; }
.tile { flex: 1 1 150px; border: 1px solid #d8dee5; border-radius: 8px; padding: .7rem .9rem; }
.tile b { display: block; font-size: 1.5rem; font-variant-numeric: tabular-nums; }
.tile span, .note { color: #5b6875; font-size: .87rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .22rem .7rem; border-bottom: 1px solid #e5e9ee; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; height: auto; } code { overflow-wrap: anywhere; }
"""


class ReportCommand(BaseModel):
    """Make a report page of a run, from its metrics, its evaluation and its training shards."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    run: Path
    """Run folder, with metrics.jsonl and checkpoints."""

    evaluation: Path | None = None
    """Folder that tools/evaluate.py wrote. Unset: evaluation/ in the run folder."""

    out: Path | None = None
    """The page. Unset: report.html in the run folder."""


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight", facecolor="white")
    plt.close(figure)
    return buffer.getvalue()


def batch_picture(config: RunConfig) -> bytes:
    """Return a PNG of the first images the run trained on, each with its corruption and severity."""
    store = shards.open(config.data)
    loader = TrainingLoader(store, config.pipeline, seed=config.seed)
    try:
        batch = next(loader)
    finally:
        loader.close()
    images = denormalise(batch.images, config.pipeline).numpy()[: _ROWS * _COLUMNS]
    figure, axes = plt.subplots(_ROWS, _COLUMNS, figsize=(1.45 * _COLUMNS, 1.75 * _ROWS), squeeze=False)
    for i, axis in enumerate(axes.flat):
        axis.axis("off")
        if i < len(images):
            kind, severity = KINDS[int(batch.kind[i])], int(batch.severity[i])
            axis.imshow(images[i], interpolation="nearest")
            axis.set_title("clean" if severity == 0 else f"{kind} {severity}", fontsize=7.5, color=_INK)
    figure.tight_layout(pad=0.4)
    return _png(figure)


def loss_picture(records: list[dict[str, Any]]) -> bytes:
    """Return a PNG of the loss and of training and validation accuracy over the steps."""
    training = [r for r in records if "loss" in r]
    validation = [r for r in records if "val_top1_pct" in r]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6))
    left.plot([r["step"] for r in training], [r["loss"] for r in training], color=_LINE, label="total")
    left.plot(
        [r["step"] for r in training],
        [r["ce"] for r in training],
        color="#d08a26",
        ls="--",
        label="cross entropy",
    )
    left.set_title("Training loss (mixed clean and corrupted)", fontsize=10)
    right.plot(
        [r["step"] for r in training],
        [r["top1_pct"] for r in training],
        color=_LINE,
        label="training batches",
    )
    if validation:
        right.plot(
            [r["step"] for r in validation],
            [r["val_top1_pct"] for r in validation],
            color="#2e8b57",
            marker="o",
            ms=4,
            label="clean validation",
        )
    right.set_title("Top-1, %", fontsize=10)
    for axis in (left, right):
        axis.set_xlabel("step", fontsize=9)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return _png(figure)


def corruption_picture(top1: dict[str, float], clean: float | None) -> bytes:
    """Return a PNG with a bar of mean top-1 for each corruption, and a line for clean images."""
    figure, axis = plt.subplots(figsize=(11, 0.28 * len(top1) + 1.1))
    names = list(top1)[::-1]
    colours = ["#8fb4d9" if name in HELD_OUT_KINDS else _LINE for name in names]
    bars = axis.barh(names, [100 * top1[name] for name in names], color=colours, height=0.7)
    axis.bar_label(bars, fmt="%.1f", fontsize=8, padding=3)
    if clean is not None:
        axis.axvline(100 * clean, color="#2e8b57", ls="--", lw=1.2, label=f"clean {100 * clean:.1f} %")
        axis.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.12))
    axis.set_xlim(0, 100)
    axis.set_xlabel("top-1, mean over severities, % (pale: held out of training)", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    return _png(figure)


def _image(png: bytes, text: str) -> str:
    return f'<img alt="{html.escape(text)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _tile(value: str, words: str) -> str:
    return f'<div class="tile"><b>{html.escape(value)}</b><span>{html.escape(words)}</span></div>'


def _cells_table(cells: Path) -> str:
    rows: dict[str, dict[str, float]] = {}
    for line in cells.read_text().splitlines()[1:]:
        _, kind, severity, top1, *_ = line.split(",")
        rows.setdefault(kind, {})[severity] = float(top1)
    body = ""
    for kind, values in rows.items():
        if "0" in values:
            continue
        mean = sum(values.values()) / len(values)
        body += f"<tr><td>{html.escape(kind)}</td>" + "".join(
            f"<td>{100 * values[s]:.1f}</td>" for s in "12345"
        )
        body += f"<td><b>{100 * mean:.1f}</b></td></tr>"
    head = "".join(f"<th>s{s}</th>" for s in "12345")
    return f'<div class="scroll"><table><tr><th>top-1, %</th>{head}<th>mean</th></tr>{body}</table></div>'


def page(run: Path, evaluation: Path) -> str:
    """Return the HTML of a run's report.

    Raises:
        FileNotFoundError: if the run has no checkpoint, or was not evaluated.
    """
    found = checkpoint.newest(run)
    config = validated(RunConfig, found.config, str(found.path))
    if not (evaluation / "results.json").is_file():
        raise FileNotFoundError(f"{evaluation} has no results.json; run tools/evaluate.py first")
    results = json.loads((evaluation / "results.json").read_text())
    results |= next(iter(results["models"].values()))
    if results["step"] != found.step:
        raise ValueError(
            f"{evaluation} has the results of step {results['step']}, but {run} has gone on to step {found.step}; "
            "run tools/evaluate.py again"
        )
    records = read_metrics(run / "metrics.jsonl")
    tiles = [_tile(f"{100 * results['clean_top1']:.1f} %", "clean top-1")]
    if results["mean_corruption_error"] is not None:
        tiles += [
            _tile(f"{100 * results['mean_corruption_error']:.1f} %", "mean corruption error, unnormalised"),
            _tile("none" if results["mce"] is None else f"{results['mce']:.1f} %", results["mce_label"]),
        ]
    if results["unknown_top1"] is not None:
        tiles.append(_tile(f"{100 * results['unknown_top1']:.1f} %", "top-1 on the four held-out kinds"))
    tiles.append(_tile(f"{found.step}", f"steps of {config.pipeline.batch_global} images"))
    comparable = (
        ""
        if results["classes"] == 1000
        else ("The mCE is not comparable with published ones, which are of ImageNet's 1,000 classes. ")
    )
    note = (
        f"{comparable}{results['images']} images of {results['data']}, {results['classes']} classes, seed "
        f"{results['seed']}, corruptions as {results['flavour']}; {results['date']}, commit {results['commit']}."
    )
    if results["damaged"]:
        note += f" {len(results['damaged'])} damaged images were left out."
    settings = "".join(
        f"<tr><td>{html.escape(k)}</td><td>{html.escape(str(v))}</td></tr>"
        for k, v in flatten(found.config).items()
    )
    title = f"{results['data']}: {config.model.trunk} after {found.step} steps"
    parts = [
        f"<h1>{html.escape(title)}</h1><p class=note>{html.escape(note)}</p>",
        f'<div class="tiles">{"".join(tiles)}</div>',
    ]
    if results["top1_per_corruption"]:
        picture = corruption_picture(results["top1_per_corruption"], results["clean_top1"])
        parts += ["<h2>Accuracy per corruption</h2>", _image(picture, "top-1 per corruption")]
        parts += ["<h2>Every cell</h2>", _cells_table(evaluation / "cells.csv")]
    parts += ["<h2>Training</h2>", _image(loss_picture(records), "loss and accuracy over the steps")]
    parts += [
        "<h2>What the model was trained on</h2>",
        "<p class=note>The first images of the first batch, as the model saw them.</p>",
        _image(batch_picture(config), "a mixed batch of clean and corrupted images"),
    ]
    parts += ["<h2>Configuration</h2>", f'<div class="scroll"><table>{settings}</table></div>']
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>"
        f"<body>{''.join(parts)}</body></html>"
    )


def report(command: ReportCommand) -> Path:
    """Write the page and return its path."""
    out = command.out or command.run / "report.html"
    out.write_text(page(command.run, command.evaluation or command.run / "evaluation"))
    print(f"report: {out.resolve()}")
    return out


def main() -> None:
    """Run the command line."""
    try:
        report(tyro.cli(ReportCommand, description=ReportCommand.__doc__))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"report.py: {error}")


if __name__ == "__main__":
    main()
