"""What decoding once saves: seconds per image and cell of an evaluation, measured three ways in one run.

    python benchmarks/evaluation.py --data imagenet-sample [--images 64] [--out result.json]

* ours: tools/evaluate.py's own pass. Each image is decoded once and corrupted natively for all 96 cells.
* forward: the model alone, on pixels that lie ready: what no evaluation can be faster than.
* per cell: decode, resize and crop the file again for every cell and corrupt it with PyPI imagecorruptions, as
  scripts in this field do. (--no-per-cell leaves this out.)

Bounds: ours at most 1.15 x forward on a GPU; per cell at least 5 x ours on a CPU. On a CPU both of the first are
the processor's work, so that their ratio says how dear the corruptions are beside the model.
"""

# ruff: noqa: NPY002 - the reference draws from NumPy's global generator

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torchvision
import tyro
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from benchmarks.environment import environment, percentiles, write_result
from benchmarks.reference import reference
from pipeline.corruptions import available_kinds, frost
from pipeline.normalise import normalise
from tools.evaluation.folder import open_folder
from tools.evaluation.models import Classifier, Preprocessing, from_name
from tools.evaluation.passes import Pass, Scorer, Settings
from tools.runtime.device import loader_device_id
from tools.runtime.optim import autocast_dtype
from tools.runtime.results import CLEAN, SEVERITIES, CellName


class EvaluationBenchmark(BaseModel):
    """Measure an evaluation of 96 cells."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    data: Path
    """Folder of class folders with photographs."""

    model: str = "resnet50"
    """torchvision's model, or timm:NAME, with random weights, which do not matter for speed; or
    package.module:function, as tools/evaluate.py takes it."""

    images: int = Field(64, ge=1)
    """Images that ours and the forward passes take."""

    batch: int = Field(16, ge=1)
    """Images per forward pass, in all three ways; the decode-per-cell way, which is slow, takes one batch of them."""

    repeats: int = Field(3, ge=1)
    """Measurements of each way, in turn."""

    precision: str = "fp32"
    """fp32, bf16 or fp16."""

    compile: bool = False
    """Compile the model, in all three ways, as tools/evaluate.py --compile does."""

    threads: int = Field(2, ge=1)
    """DALI threads."""

    per_cell: bool = True
    """Also decode again for every cell; needs imagecorruptions, and takes minutes whatever the device."""

    out: Path | None = None
    """JSON file for the result, written anew after every turn."""


SHOWN = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def ours(
    classifier: Classifier, command: EvaluationBenchmark, settings: Settings, cells: list[CellName]
) -> float:
    """Seconds per image and cell of the evaluation's own pass."""
    store = open_folder(command.data, "photographs")
    part = Pass("benchmark", store, np.arange(command.images, dtype=np.int64), cells)
    outputs = [torch.arange(len(store.classes))]
    scorer = Scorer(part, [classifier], outputs, {}, settings)
    began_s = time.perf_counter()
    scorer.run(lambda count: None, lambda found: None, save_every_s=1e9)
    _finish(settings.device)
    return (time.perf_counter() - began_s) / (command.images * len(cells))


@torch.no_grad()
def forward(
    classifier: Classifier, command: EvaluationBenchmark, settings: Settings, cells: list[CellName]
) -> float:
    """Seconds per image and cell of normalising and scoring pixels that lie ready."""
    pixels = torch.randint(256, (command.batch, 224, 224, 3), dtype=torch.uint8).to(settings.device)
    config = SHOWN.pipeline(1)
    passes = max(1, command.images * len(cells) // command.batch)
    began_s = time.perf_counter()
    for _ in range(passes):
        with torch.autocast(settings.device.type, settings.precision, enabled=settings.precision is not None):
            classifier(normalise(pixels, config))
    _finish(settings.device)
    return (time.perf_counter() - began_s) / (passes * command.batch)


@torch.no_grad()
def per_cell(
    classifier: Classifier,
    command: EvaluationBenchmark,
    settings: Settings,
    cells: list[CellName],
    their: Any,
) -> float:
    """Seconds per image and cell of decoding again for every cell and corrupting with imagecorruptions."""
    files = sorted(command.data.glob("*/*.*"))[: command.batch]
    shown = torchvision.transforms.Compose(
        [torchvision.transforms.Resize(256), torchvision.transforms.CenterCrop(224)]
    )
    config = SHOWN.pipeline(1)
    np.random.seed(0)
    began_s = time.perf_counter()
    for kind, severity in cells:
        pictures = []
        for file in files:
            with Image.open(file) as opened:
                picture = shown(opened.convert("RGB"))
            if kind != CLEAN:
                picture = np.asarray(getattr(their, kind)(picture, severity)).astype(np.uint8)
            pictures.append(np.asarray(picture))
        images = torch.from_numpy(np.stack(pictures)).to(settings.device)
        with torch.autocast(settings.device.type, settings.precision, enabled=settings.precision is not None):
            classifier(normalise(images, config))
    _finish(settings.device)
    return (time.perf_counter() - began_s) / (len(files) * len(cells))


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def build(spec: str, device: torch.device) -> Classifier:
    """Return the model asked for, shown what all three ways make of an image."""
    package, _, name = spec.rpartition(":")
    if package in ("", "timm"):
        net: nn.Module = timm.create_model(name) if package else torchvision.models.get_model(name)
        classifier = Classifier(name, net, SHOWN, [str(i) for i in range(1000)], {})
    else:
        classifier = from_name(spec)
        classifier.preprocessing = SHOWN
    classifier.net.to(memory_format=torch.channels_last).to(device)
    return classifier


def main() -> None:
    """Run the benchmark and print its table."""
    command = tyro.cli(EvaluationBenchmark, description=EvaluationBenchmark.__doc__)
    their = reference() if command.per_cell else None
    if command.per_cell and their is None:
        sys.exit(
            "imagecorruptions is not installed: pip install --no-deps imagecorruptions==1.1.2, or say --no-per-cell"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    classifier = build(command.model, device)
    if command.compile:
        classifier.compile()
    settings = Settings(
        0, "bethge", False, autocast_dtype(command.precision), command.batch, command.threads, "replace", device,
        loader_device_id(device),
    )  # fmt: skip
    kinds = [kind for kind in list(available_kinds())[1:] if kind != "frost" or frost.found()]
    cells: list[CellName] = [(CLEAN, 0), *((k, s) for k in kinds for s in SEVERITIES)]
    warm = command.model_copy(update={"images": command.batch})
    ours(classifier, warm, settings, cells[:3])
    forward(classifier, warm, settings, cells[:3])
    record = {
        **environment(),
        **command.model_dump(mode="json", exclude={"out", "data"}),
        "cells": len(cells),
    }
    seconds: dict[str, list[float]] = {"ours": [], "forward": []}
    if command.per_cell:
        seconds["per cell"] = []
    found: dict[str, Any] = {}
    for _ in range(command.repeats):
        seconds["ours"].append(ours(classifier, command, settings, cells))
        seconds["forward"].append(forward(classifier, command, settings, cells))
        if command.per_cell:
            seconds["per cell"].append(per_cell(classifier, command, settings, cells, their))
        found = compared({name: percentiles([1000 * s for s in values]) for name, values in seconds.items()})
        if command.out:
            write_result(command.out, {**record, **found})
    print(in_words(found, len(cells), device.type))


def compared(ms: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Return times and their ratios, which use the medians."""
    found: dict[str, Any] = {"ms": ms, "over_forward": ms["ours"]["p50"] / ms["forward"]["p50"]}
    if "per cell" in ms:
        found["per_cell_over_ours"] = ms["per cell"]["p50"] / ms["ours"]["p50"]
        theirs_ms, ours_ms = (ms[way]["p50"] - ms["forward"]["p50"] for way in ("per cell", "ours"))
        # The difference of two large numbers says nothing where it is within their own spread.
        spread_ms = max(ms[way]["p80"] - ms[way]["p20"] for way in ("ours", "forward"))
        found["without_model"] = theirs_ms / ours_ms if ours_ms > spread_ms else None
    return found


def in_words(found: dict[str, Any], cells: int, device: str) -> str:
    """Return what `compared` found, a line for each way and one for each ratio."""
    ms = found["ms"]
    lines = [
        f"{name:10s} {row['p50']:9.2f} ms per image and cell ({row['p20']:.2f} to {row['p80']:.2f})"
        for name, row in ms.items()
    ]
    lines.append(
        f"ours costs {found['over_forward']:.2f} x the forward passes, over {cells} cells ({device})"
    )
    if "per cell" in ms:
        lines.append(f"decoding per cell costs {found['per_cell_over_ours']:.1f} x ours")
        data = found["without_model"]
        theirs_ms = ms["per cell"]["p50"] - ms["forward"]["p50"]
        words = (
            f"{data:.1f} x ours"
            if data
            else f"{theirs_ms:.1f} ms, ours less than the spread of a measurement"
        )
        lines.append(f"without the model's own time, decoding per cell costs {words}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
