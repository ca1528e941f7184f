"""Images per second of training: loader alone, model alone on synthetic batches, both together.

    python benchmarks/training.py --data SHARDS [--recipe recipes/paper.toml] [--out result.json]

Training is well fed where "both" is close to the smaller of the two others.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import tyro
from accelerate import Accelerator
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

import model
import shards
from benchmarks.environment import environment, percentiles
from pipeline.loader import TrainingLoader
from tools.runtime.config import RunConfig, read_recipe, validated
from tools.runtime.device import loader_device_id
from tools.runtime.optim import make_optimizer


class TrainingBenchmark(BaseModel):
    """Measure training steps."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    data: Path
    """Shard set."""

    recipe: Path = Path("recipes/paper.toml")
    """Recipe whose model, precision and data settings are measured."""

    batch: int = Field(128, ge=1)
    """Images per step."""

    steps: int = Field(10, ge=1)
    """Steps per measurement."""

    repeats: int = Field(5, ge=1)
    """Measurements of each row."""

    threads: int = Field(2, ge=1)
    """DALI threads."""

    baseline: bool = True
    """Also measure the plain trunk with one linear layer, which VQSA's cost is compared with."""

    out: Path | None = None
    """JSON file for the result."""


def _rates(step: Callable[[], object], command: TrainingBenchmark) -> dict[str, float]:
    def finish() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    for _ in range(5):
        step()
    rates = []
    for _ in range(command.repeats):
        finish()
        began_s = time.perf_counter()
        for _ in range(command.steps):
            step()
        finish()
        rates.append(command.steps * command.batch / (time.perf_counter() - began_s))
    return percentiles(rates)


def _trainer(config: RunConfig, classes: int, accelerator: Accelerator) -> Callable[[Any, Any], None]:
    net: nn.Module = model.build(config.model, classes).to(memory_format=torch.channels_last)
    optimizer = make_optimizer(config.optim, net)
    net, optimizer = accelerator.prepare(net, optimizer)

    def step(images: torch.Tensor, labels: torch.Tensor) -> None:
        with accelerator.autocast():
            loss = net(images, labels).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    """Run the benchmark and print a table."""
    command = tyro.cli(TrainingBenchmark, description=TrainingBenchmark.__doc__)
    recipe = read_recipe(command.recipe)
    recipe["model"] = {**recipe.get("model", {}), "weights": ""}  # speed does not depend on their values
    recipe["pipeline"] = {
        **recipe.get("pipeline", {}),
        "batch_global": command.batch,
        "threads": command.threads,
        "read_threads": command.threads,
    }
    config = validated(RunConfig, recipe, str(command.recipe))
    accelerator = Accelerator(mixed_precision={"fp32": "no"}.get(config.precision, config.precision))
    device = accelerator.device
    store = shards.open(command.data)
    side = config.pipeline.image_size
    synthetic = torch.randn(command.batch, 3, side, side, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(len(store.classes), (command.batch,), device=device)
    rows: dict[str, Any] = {}
    if command.baseline:
        plain = config.model_copy(
            update={"model": config.model.model_copy(update={"quantise": "none", "attention": False})}
        )
        step = _trainer(plain, len(store.classes), accelerator)
        rows["plain trunk alone, synthetic batches"] = _rates(lambda: step(synthetic, labels), command)
    step = _trainer(config, len(store.classes), accelerator)
    rows["VQSA alone, synthetic batches"] = _rates(lambda: step(synthetic, labels), command)
    loader = TrainingLoader(store, config.pipeline, seed=0, device_id=loader_device_id(device))

    def both() -> None:
        batch = next(loader)
        step(batch.images, batch.labels)

    rows["loader alone"] = _rates(lambda: next(loader), command)
    rows["loader and VQSA"] = _rates(both, command)
    loader.close()
    for name, rate in rows.items():
        print(f"{name:40s} {rate['p50']:9.0f} img/s ({rate['p20']:.0f} to {rate['p80']:.0f})")
    if command.out:
        settings = {"recipe": str(command.recipe), "batch": command.batch, "precision": config.precision}
        command.out.write_text(json.dumps({**environment(), **settings, "img_per_s": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
