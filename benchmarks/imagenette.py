"""Trains and evaluates the paper's ladder on Imagenette at 112 px: clean, Known, Unknown and mCE per recipe.

    python benchmarks/imagenette.py --train S/train --val S/val --out runs/ladder --form gpu     # 3 seeds, 20 epochs
    python benchmarks/imagenette.py --train S/train --val S/val --out runs/ladder --form cpu     # hours on two cores

Made by tools/build_shards.py from imagenette-112's train and val folders. The rungs are recipes of the paper's Table 1:
finetune (no codebook), concat, concat_sa, here with 1,000 codes, at 112 px, from random weights, and differing in
nothing else. Runs that are finished are kept, stopped ones go on: the command can be given again.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import tyro
from pydantic import BaseModel, ConfigDict, Field

from benchmarks.environment import environment, write_result

ROOT = Path(__file__).resolve().parent.parent
RUNGS = ("finetune", "concat", "concat_sa")
COLUMNS = ("clean_top1", "known_top1", "unknown_top1", "mce")


class Form(BaseModel):
    """How much is trained and evaluated."""

    trunks: tuple[str, ...]
    seeds: int
    epochs: float
    images: int | None


FORMS = {
    "cpu": Form(trunks=("resnet18",), seeds=1, epochs=3, images=500),
    "gpu": Form(trunks=("resnet18", "resnet50"), seeds=3, epochs=20, images=None),
}


class Ladder(BaseModel):
    """Train and evaluate every rung, and print the table."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    train: Path
    """Shard set of imagenette-112/train."""

    val: Path
    """Shard set of imagenette-112/val."""

    out: Path
    """Folder for the runs."""

    form: Literal["cpu", "gpu"] = "cpu"
    """cpu: ResNet-18, one seed, 3 epochs, 500 images. gpu: also ResNet-50, 3 seeds, 20 epochs, all images."""

    trunks: tuple[str, ...] = ()
    """Other trunks than the form's."""

    seeds: int | None = Field(None, ge=1)
    """Another number of seeds than the form's."""

    epochs: float | None = Field(None, gt=0)
    """Another length than the form's."""

    images: int | None = Field(None, ge=1)
    """Another number of evaluated images than the form's."""

    threads: int = Field(2, ge=1)
    """DALI CPU threads."""

    result: Path | None = None
    """JSON file for the result."""


def settings(trunk: str, rung: str, epochs: float) -> list[str]:
    """Return what a rung's run is given beside data, folder and seed: its recipe at Imagenette's size."""
    chosen = ["--recipe", f"recipes/{rung}.toml", "--epochs", f"{epochs:g}", "--model.trunk", trunk]
    chosen += ["--model.weights", "", "--model.codes", "1000"]
    chosen += ["--pipeline.image-size", "112", "--pipeline.batch-global", "64"]
    chosen += ["--pipeline.crop-scale", "0.35", "1.0", "--pipeline.clean-fraction", "0.25"]
    # One schedule for all rungs: the paper's, with a warm-up that training from random weights needs.
    return [*chosen, "--optim.warmup-epochs", "0.5", "--precision", "bf16"]


def rung_result(command: Ladder, form: Form, trunk: str, rung: str, seed: int) -> dict[str, Any]:
    """Train and evaluate one run, as far as that is not done; returns its results."""
    run = command.out / f"{trunk}-{rung}-seed{seed}"
    found = run / "evaluation" / "results.json"
    if not found.is_file():
        common = ["--data", str(command.train), "--out", str(run), "--seed", str(seed), "--resume", "auto"]
        common += ["--log-every", "20", "--checkpoint-every", "148"]
        common += ["--pipeline.threads", str(command.threads)]
        call("train.py", *settings(trunk, rung, command.epochs or form.epochs), *common)
        images = command.images or form.images
        more = ["--images", str(images)] if images else []
        call("tools/evaluate.py", "--checkpoint", str(run), "--data", str(command.val), "--precision", "bf16",
             "--threads", str(command.threads), *more)  # fmt: skip
    (results,) = json.loads(found.read_text())["models"].values()
    return dict(results)


def call(*arguments: str) -> None:
    """Run a command of this project."""
    print("$ python", " ".join(arguments), flush=True)
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True)


def table(rows: dict[str, dict[str, list[float]]]) -> str:
    """Return the results as a Markdown table, percent; mean and, from two seeds on, standard deviation."""
    lines = ["| trunk | recipe | clean | Known | Unknown | mCE |", "|---|---|---|---|---|---|"]
    for name, values in rows.items():
        cells = []
        for column in COLUMNS:
            numbers = [v if column == "mce" else 100 * v for v in values[column]]
            spread = f" ± {statistics.stdev(numbers):.1f}" if len(numbers) > 1 else ""
            cells.append(f"{statistics.mean(numbers):.1f}{spread}")
        lines.append(f"| {' | '.join(name.split('/'))} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run the ladder and print the table."""
    command = tyro.cli(Ladder, description=Ladder.__doc__)
    form = FORMS[command.form]
    chosen = {"trunks": command.trunks, "seeds": command.seeds}
    form = form.model_copy(update={name: value for name, value in chosen.items() if value})
    rows: dict[str, dict[str, list[float]]] = {}
    for trunk in form.trunks:
        for rung in RUNGS:
            results = [rung_result(command, form, trunk, rung, seed) for seed in range(form.seeds)]
            rows[f"{trunk}/{rung}"] = {column: [r[column] for r in results] for column in COLUMNS}
            print(table(rows), flush=True)
    if command.result:
        said = {"epochs": command.epochs or form.epochs, "images": command.images or form.images or "all"}
        shown = {**environment(), "form": command.form, **said, "seeds": form.seeds, "rows": rows}
        write_result(command.result, shown)


if __name__ == "__main__":
    main()
