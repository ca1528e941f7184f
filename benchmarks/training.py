"""Images per second of training: loader alone, model alone on synthetic batches, both together, and what that costs.

    python benchmarks/training.py --data SHARDS [--recipe recipes/paper.toml] [--batch 256] [--out result.json]

Steps are train.py's own. The three are measured in turns, so that a machine that slows down slows all of them; batches
that were ready before a turn are not counted. Training is well fed where "both" is as fast as the model alone: the
aim is 95 % of it, with less than 2 % of a step spent waiting for data.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import tyro
from accelerate import Accelerator
from pydantic import BaseModel, ConfigDict, Field

import shards
from benchmarks.environment import environment, percentiles, write_result
from tools.profiling.workload import Workload
from tools.runtime.config import RunConfig, read_recipe, validated
from tools.runtime.meter import device_memory_gib

AIM_PCT = 95.0
LOADER, MODEL, BOTH = "loader alone", "model alone, synthetic batches", "both"
PLAIN = "plain trunk alone, synthetic batches"


class TrainingBenchmark(BaseModel):
    """Measure training steps."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    data: Path
    """Shard set."""

    recipe: Path = Path("recipes/paper.toml")
    """Recipe whose model, precision and data settings are measured: ResNet-50 VQSA, bf16, 224 px, all corruptions."""

    batch: int = Field(128, ge=1)
    """Images per step."""

    steps: int = Field(10, ge=1)
    """Steps of each measurement."""

    repeats: int = Field(5, ge=1)
    """Turns: measurements of each row."""

    threads: int = Field(2, ge=1)
    """DALI threads, and as many that read."""

    baseline: bool = True
    """Also measure the plain trunk with one linear layer, which VQSA's cost is compared with."""

    tests: bool = True
    """Run the tests of the training step first, and measure nothing if one fails."""

    out: Path | None = None
    """JSON file for the result."""


def finish() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(step: Callable[[], int], steps: int) -> tuple[float, float]:
    """Return images per second over so many steps, and the seconds they took."""
    finish()
    began_s = time.perf_counter()
    images = sum(step() for _ in range(steps))
    finish()
    taken_s = time.perf_counter() - began_s
    return images / taken_s, taken_s


def measure(work: Workload, command: TrainingBenchmark) -> dict[str, Any]:
    """Measure loader, model and both in turns."""
    pipeline = work.config.pipeline
    # What readers and DALI have ready when a turn begins says nothing about their speed.
    ready = -(-(pipeline.read_ahead + pipeline.prefetch) // work.loader.micros) + 1
    steps = {
        LOADER: work.load_step,
        MODEL: lambda: work.train_step(work.synthetic),
        BOTH: lambda: work.train_step(work.loader),
    }
    rates: dict[str, list[float]] = {name: [] for name in steps}
    waits_pct = []
    for _ in range(3):
        steps[MODEL]()  # kernels are tuned, queues fill
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    for _ in range(command.repeats):
        for name, step in steps.items():
            timed(step, 1 if name == MODEL else ready)
            waited_s = work.loader.waited_s
            rate, taken_s = timed(step, command.steps)
            rates[name].append(rate)
            if name == BOTH:
                waits_pct.append(100 * (work.loader.waited_s - waited_s) / taken_s)
    shares = [100 * both / alone for both, alone in zip(rates[BOTH], rates[MODEL], strict=True)]
    return {
        "img_per_s": {name: percentiles(values) for name, values in rates.items()},
        "both_pct_of_model_alone": percentiles(shares),
        "data_wait_pct": percentiles(waits_pct),
        "peak_memory_gib": device_memory_gib(work.device),
    }


def table(result: dict[str, Any]) -> str:
    """Return the result in words; the last line is the verdict."""
    lines = [
        f"{name:40s} {rate['p50']:9.1f} img/s ({rate['p20']:.1f} to {rate['p80']:.1f})"
        for name, rate in result["img_per_s"].items()
    ]
    share, wait = result["both_pct_of_model_alone"], result["data_wait_pct"]
    lines += [
        f"{result['what']}",
        f"both: {share['p50']:.1f}% of the model alone ({share['p20']:.1f} to {share['p80']:.1f}; aim {AIM_PCT:g}%), "
        f"data wait {wait['p50']:.1f}%, peak memory of the {result['device']} {result['peak_memory_gib']:.1f} GiB",
    ]
    return "\n".join(lines)


def run(command: TrainingBenchmark) -> dict[str, Any]:
    """Measure and return the result."""
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
    store = shards.open(command.data)
    work = Workload(config, store, accelerator)
    result = measure(work, command)
    work.close()
    if command.baseline:
        changes = {"quantise": "none", "attention": False, "init": "normal"}
        plain = config.model_copy(update={"model": config.model.model_copy(update=changes)})
        other = Workload(plain, store, accelerator)
        other.close()
        for _ in range(3):
            other.train_step(other.synthetic)
        alone = [
            timed(lambda: other.train_step(other.synthetic), command.steps)[0] for _ in range(command.repeats)
        ]
        result["img_per_s"][PLAIN] = percentiles(alone)
    model, pipeline = config.model, config.pipeline
    return {
        "what": f"{model.trunk}, {model.codes if model.quantise != 'none' else 'no'} codes, {config.precision}, "
        f"{pipeline.image_size} px, {len(pipeline.kinds)} corruptions, "
        f"batch {command.batch}, {command.threads} threads",
        "device": accelerator.device.type,
        **result,
    }


def main() -> None:
    """Run the benchmark and print a table."""
    command = tyro.cli(TrainingBenchmark, description=TrainingBenchmark.__doc__)
    if command.tests:
        tests = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "tests/test_train_golden.py"]
        if subprocess.run(tests, cwd=Path(__file__).resolve().parents[1]).returncode:
            sys.exit("the tests of the training step fail: nothing was measured")
    result = run(command)
    print(table(result))
    if command.out:
        words = (
            f"python benchmarks/training.py --data {command.data.name} --recipe {command.recipe} "
            f"--batch {command.batch} --steps {command.steps} --repeats {command.repeats} --threads {command.threads}"
        )
        write_result(command.out, {**environment(), "command": words, **result})


if __name__ == "__main__":
    main()
