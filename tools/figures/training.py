"""The course of the training, from metrics.jsonl, and the first batch it saw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import shards
from pipeline.corruptions import KINDS
from pipeline.loader import TrainingLoader
from pipeline.normalise import denormalise
from tools.figures.style import COLOURS, contact_sheet, figure, jpeg, png, stack
from tools.runtime.config import RunConfig

_COLUMNS, _ROWS = 6, 4


def losses(records: Sequence[dict[str, Any]]) -> bytes:
    """Return a PNG of the loss over the steps."""
    rows = [r for r in records if r.get("loss") is not None]
    drawn, axis = figure(2.8)
    steps = [r["step"] for r in rows]
    axis.plot(steps, [r["loss"] for r in rows], color=COLOURS[0], label="total")
    if all("ce" in r for r in rows):
        axis.plot(steps, [r["ce"] for r in rows], color=COLOURS[1], ls="--", label="cross entropy")
    axis.set_title("loss on mixed clean and corrupted batches", fontsize=9, loc="left")
    axis.set_xlabel("step", fontsize=8)
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8, frameon=False)
    return png(drawn)


def accuracies(records: Sequence[dict[str, Any]]) -> bytes:
    """Return a PNG of top-1 on training batches and on the validation images over the steps."""
    drawn, axis = figure(2.8)
    names = {
        "top1_pct": "training batches",
        "val_top1_pct": "clean validation",
        "val_corrupted_top1_pct": "corrupted validation",
    }
    for i, (name, words) in enumerate(names.items()):
        rows = [r for r in records if r.get(name) is not None]
        if rows:
            few = "o" if len(rows) < 40 else None
            axis.plot(
                [r["step"] for r in rows],
                [r[name] for r in rows],
                color=COLOURS[i],
                marker=few,
                ms=3,
                label=words,
            )
    axis.set_title("top-1, %", fontsize=9, loc="left")
    axis.set_xlabel("step", fontsize=8)
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8, frameon=False)
    return png(drawn)


def first_batch(config: RunConfig) -> bytes:
    """Return a JPEG of the first images the run was trained on, each with its corruption and severity."""
    loader = TrainingLoader(shards.open(config.data), config.pipeline, seed=config.seed)
    try:
        batch = next(loader)
    finally:
        loader.close()
    pictures = denormalise(batch.images, config.pipeline).numpy()[: _ROWS * _COLUMNS]
    names = []
    for kind, severity in zip(batch.kind.tolist(), batch.severity.tolist(), strict=True):
        short = KINDS[kind].replace("_noise", "").replace("_transform", "").replace("_compression", "")
        names.append("clean" if severity == 0 else f"{short.replace('_', ' ')} {severity}")
    strips = []
    for begin in range(0, len(pictures), _COLUMNS):
        row = list(pictures[begin : begin + _COLUMNS])
        strips.append(contact_sheet([("", row)], names[begin : begin + len(row)], 132, 2))
    return jpeg(stack(strips))
