"""Does every recipe train? A few steps of each through the real command, in float32 and bfloat16.

    python benchmarks/recipes.py --data SHARDS [--steps 20] [--image-size 64] [--out result.json]

Runs `train.py --recipe R` with batch 16, at most 1,000 codes and random trunk weights, and reports the parameters
that it prints, whether all losses are finite, and the first and last loss. Full sizes, on a GPU: --image-size 224.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import tyro
from pydantic import BaseModel, ConfigDict, Field

from benchmarks.environment import environment
from tools.runtime.config import RunConfig, read_recipe, validated
from tools.runtime.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]


class RecipesBenchmark(BaseModel):
    """Train each recipe for a few steps."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    data: Path
    """Shard set."""

    steps: int = Field(20, ge=1)
    """Optimiser steps of each run."""

    batch: int = Field(16, ge=1)
    """Images per step."""

    image_size: int = Field(64, ge=32)
    """Side of the images in pixels."""

    most_codes: int = Field(1000, ge=1)
    """Codebooks with more codes get this many."""

    precisions: tuple[str, ...] = ("fp32", "bf16")
    """Precisions to run."""

    recipes: tuple[str, ...] = ()
    """Only these, without ".toml"; unset: all in recipes/."""

    out: Path | None = None
    """JSON file for the result."""


def run(command: RecipesBenchmark, recipe: Path, precision: str, folder: Path) -> dict[str, Any]:
    """Run one recipe in one precision; returns its row."""
    config = validated(RunConfig, read_recipe(recipe), str(recipe))
    length = ["--epochs", "None", "--steps", str(command.steps)]
    done = subprocess.run(
        [
            sys.executable, "train.py", "--recipe", str(recipe), "--data", str(command.data.resolve()),
            "--out", str(folder), *length, "--precision", precision, "--log-every", "1",
            "--pipeline.batch-global", str(command.batch), "--pipeline.batch-per-gpu", "None",
            "--pipeline.image-size", str(command.image_size), "--pipeline.constants", "imagenet",
            "--model.codes", str(min(config.model.codes, command.most_codes)), "--model.weights", "",
        ],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    losses = [r["loss"] for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]
    found = re.search(r"([\d,]+) parameters", done.stdout)
    row: dict[str, Any] = {
        "parameters": int(found.group(1).replace(",", "")) if found else None,
        "finite": len(losses) == command.steps and all(math.isfinite(loss) for loss in losses),
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
    }
    if done.returncode:
        row["error"] = (done.stdout + done.stderr)[-1000:]
    return row


def main() -> int:
    """Run them all and print a table; the exit code is 1 if one failed or was not finite."""
    command = tyro.cli(RecipesBenchmark, description=__doc__)
    every = sorted(path.stem for path in (ROOT / "recipes").glob("*.toml"))
    unknown = set(command.recipes) - set(every)
    if unknown:
        raise ValueError(f"no recipe {', '.join(unknown)}; there are {', '.join(every)}")
    rows: dict[str, Any] = {}
    print("| recipe | precision | parameters | finite | loss, first to last |\n|---|---|---|---|---|")
    for name in command.recipes or every:
        for precision in command.precisions:
            with tempfile.TemporaryDirectory() as folder:
                row = run(command, ROOT / "recipes" / f"{name}.toml", precision, Path(folder) / "run")
            rows[f"{name}, {precision}"] = row
            span = "" if row["last_loss"] is None else f"{row['first_loss']:.3f} to {row['last_loss']:.3f}"
            state = "yes" if row["finite"] else "**no**"
            print(f"| {name} | {precision} | {row['parameters'] or 0:,} | {state} | {span} |", flush=True)
            if "error" in row:
                print(row["error"], file=sys.stderr)
            if command.out:
                settings = command.model_dump(mode="json", exclude={"out", "recipes"})
                command.out.write_text(
                    json.dumps({**environment(), "settings": settings, "recipes": rows}, indent=1) + "\n"
                )
    return 0 if all(row["finite"] and "error" not in row for row in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
