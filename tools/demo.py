"""The main job from end to end on small real data: shards, training, evaluation, report. `make demo` runs it.

Every step is the command a user would type, printed before it runs; what is already there is reused.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
import tyro
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from tools.runtime import checkpoint
from tools.runtime.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]


class DemoCommand(BaseModel):
    """Shard, train, evaluate and report on scikit-learn's handwritten digits, or on an image folder."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    data: Path | None = None
    """Folder with train/<class>/ and val/<class>/. Unset: the digits, written as JPEGs of 64 x 64 pixels."""

    out: Path = Path("demo-data")
    """Where images, shards and the run go."""

    recipe: Path = Path("recipes/demo.toml")
    """Recipe of the training."""

    steps: int | None = Field(None, ge=1)
    """Train this many steps instead of the recipe's epochs."""

    images: int | None = Field(None, ge=1)
    """Evaluate on a seeded subset of this many images."""


def write_digits(folder: Path) -> None:
    """Write scikit-learn's 1,797 digits as JPEGs, every fifth one to val/; done once."""
    from sklearn.datasets import load_digits

    if (folder / "complete").is_file():
        return
    digits = load_digits()
    for i, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        split = "val" if i % 5 == 4 else "train"
        path = folder / split / f"digit{label}" / f"{i:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        grey = Image.fromarray((pixels * (255 / 16)).astype(np.uint8))
        grey.resize((64, 64), Image.Resampling.BICUBIC).convert("RGB").save(path, quality=92)
    (folder / "complete").touch()


def run(*command: object) -> float:
    """Print and run one of the project's commands; returns the seconds it took, exits where it fails."""
    words = [str(word) for word in command]
    print("\n$ python " + " ".join(words), flush=True)
    began_s = time.perf_counter()
    code = subprocess.run([sys.executable, *words], cwd=ROOT).returncode
    if code:
        sys.exit(code)
    return time.perf_counter() - began_s


def up_to_date(results: Path, run_folder: Path, images: int | None) -> bool:
    """Whether the results are of the run's newest checkpoint and of as many images as asked for."""
    if not results.is_file():
        return False
    newest = checkpoint.newest(run_folder).path / checkpoint.RUN_FILE
    enough = images is None or json.loads(results.read_text())["images"] == images
    return enough and results.stat().st_mtime > newest.stat().st_mtime


def demo(command: DemoCommand) -> None:
    """Run the four steps and print the summary.

    Raises:
        FileNotFoundError: if the image folder has no train/ or val/.
    """
    out = command.out.resolve()
    if command.data is None:
        source, out = out / "digits" / "images", out / "digits"
        write_digits(source)
    else:
        source, out = command.data.resolve(), out / command.data.resolve().name
        for split in ("train", "val"):
            if not (source / split).is_dir():
                raise FileNotFoundError(f"{source} has no {split}/; wanted {split}/<class>/<image>.jpg")
    shard_sets = {split: out / "shards" / split for split in ("train", "val")}
    run_folder = out / "run"
    if command.steps is not None or command.images is not None:
        run_folder = out / f"run-steps{command.steps or 'all'}"
    timing = out / "shards" / "build.json"
    seconds = json.loads(timing.read_text()) if timing.is_file() else {}
    for split, folder in shard_sets.items():
        taken_s = run("tools/build_shards.py", "--source", source / split, "--out", folder, "--name", split)
        seconds.setdefault(split, taken_s)  # of the run that built it, not of one that found it there
    timing.write_text(json.dumps(seconds))
    length = () if command.steps is None else ("--epochs", "None", "--steps", command.steps)
    run(
        "train.py", "--recipe", command.recipe, "--data", shard_sets["train"], "--val", shard_sets["val"],
        "--out", run_folder, "--resume", "auto", *length,
    )  # fmt: skip
    results_file = run_folder / "evaluation" / "results.json"
    if not up_to_date(results_file, run_folder, command.images):
        subset = () if command.images is None else ("--images", command.images)
        run("tools/evaluate.py", "--checkpoint", run_folder, "--data", shard_sets["val"], *subset)
    run("tools/report.py", "--run", run_folder)

    results = json.loads(results_file.read_text())
    found = next(iter(results["models"].values()))
    rates = [r["rate_img_s"] for r in read_metrics(run_folder / "metrics.jsonl") if "rate_img_s" in r]
    samples = sum(len(list((source / split).glob("*/*"))) for split in shard_sets)
    print("\n" + "=" * 78)
    print(
        f"clean top-1 {100 * found['clean_top1']:.1f} %   ({results['images']} images, {found['classes']} classes)"
    )
    for kind, top1 in found["top1_per_corruption"].items():
        print(f"  {kind:20s} top-1 {100 * top1:5.1f} %")
    print(f"mean corruption error, unnormalised: {100 * found['mean_corruption_error']:.1f} %")
    if found["mce"] is not None:
        print(f"mCE {found['mce']:.1f} %  ({found['mce_label']}; not comparable off ImageNet)")
    print(found["verdict"])
    print(
        f"images/s: shards {samples / sum(seconds.values()):.0f} (start-up included), training "
        f"{median(rates):.0f}, evaluation {results['rate_img_s']:.0f}"
    )
    print(f"report: {run_folder / 'report.html'}")


def main() -> None:
    """Run the command line."""
    try:
        demo(tyro.cli(DemoCommand, description=DemoCommand.__doc__))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"demo.py: {error}")


if __name__ == "__main__":
    main()
