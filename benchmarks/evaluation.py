"""What decoding once saves: seconds per image and cell of an evaluation, measured three ways in one run.

    python benchmarks/evaluation.py --data imagenet-sample [--images 64] [--out result.json]

* ours: tools/evaluate.py's own pass. Each image is decoded once and corrupted natively for all 96 cells.
* forward: the model alone, on pixels that lie ready: what no evaluation can be faster than.
* per cell: decode, resize and crop the file again for every cell and corrupt it with PyPI imagecorruptions, as
  scripts in this field do.

Bounds: ours at most 1.15 x forward on a GPU; per cell at least 5 x ours on a CPU. On a CPU both of the first are
the processor's work, so that their ratio says how dear the corruptions are beside the model.
"""

# ruff: noqa: NPY002 - the reference draws from NumPy's global generator

from __future__ import annotations

import json
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

from benchmarks.environment import environment, percentiles
from benchmarks.reference import reference
from pipeline.corruptions import available_kinds
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

    out: Path | None = None
    """JSON file for the result."""


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
    their = reference()
    if their is None:
        sys.exit("imagecorruptions is not installed: pip install --no-deps imagecorruptions==1.1.2")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    classifier = build(command.model, device)
    if command.compile:
        classifier.compile()
    settings = Settings(
        0, "bethge", False, autocast_dtype(command.precision), command.batch, command.threads, "replace", device,
        loader_device_id(device),
    )  # fmt: skip
    cells: list[CellName] = [(CLEAN, 0), *((k, s) for k in list(available_kinds())[1:] for s in SEVERITIES)]
    warm = command.model_copy(update={"images": command.batch})
    ours(classifier, warm, settings, cells[:3])
    forward(classifier, warm, settings, cells[:3])
    seconds: dict[str, list[float]] = {"ours": [], "forward": [], "per cell": []}
    for _ in range(command.repeats):
        seconds["ours"].append(ours(classifier, command, settings, cells))
        seconds["forward"].append(forward(classifier, command, settings, cells))
        seconds["per cell"].append(per_cell(classifier, command, settings, cells, their))
    found = {name: percentiles([1000 * s for s in values]) for name, values in seconds.items()}
    for name, ms in found.items():
        print(f"{name:10s} {ms['p50']:9.2f} ms per image and cell ({ms['p20']:.2f} to {ms['p80']:.2f})")
    over = found["ours"]["p50"] / found["forward"]["p50"]
    faster = found["per cell"]["p50"] / found["ours"]["p50"]
    print(
        f"ours costs {over:.2f} x the forward passes; decoding per cell costs {faster:.1f} x ours ({device.type})"
    )
    model_ms = found["forward"]["p50"]
    theirs_ms, ours_ms = found["per cell"]["p50"] - model_ms, found["ours"]["p50"] - model_ms
    # The difference of two large numbers says nothing where it is within their own spread.
    spread_ms = max(found[way]["p80"] - found[way]["p20"] for way in ("ours", "forward"))
    data = theirs_ms / ours_ms if ours_ms > spread_ms else None
    words = (
        f"{data:.1f} x ours"
        if data
        else f"{theirs_ms:.1f} ms, ours less than the spread of {spread_ms:.1f} ms"
    )
    print(f"without the model's own time, decoding per cell costs {words}")
    if command.out:
        settings_used = command.model_dump(mode="json", exclude={"out", "data"})
        record = {
            **environment(),
            **settings_used,
            "ms": found,
            "over_forward": over,
            "per_cell_over_ours": faster,
            "without_model": data,
        }
        command.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
