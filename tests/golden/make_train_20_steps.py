"""Makes train_20_steps.json: the losses of twenty steps that tests/test_train_golden.py holds the loop to.

    python tests/golden/make_train_20_steps.py

To be run again only where the numbers are meant to change; say why in the commit.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402

import train  # noqa: E402
from tools.runtime.config import parse_command  # noqa: E402
from tools.runtime.metrics import read_metrics  # noqa: E402

GOLDEN = Path(__file__).with_name("train_20_steps.json")
# A step's worth of everything that changes what a step computes, at a rate at which rounding stays rounding.
SETTINGS = [
    *("--steps", "20", "--checkpoint-every", "100", "--optim.lr", "2e-4", "--optim.warmup-epochs", "0.5"),
    *("--optim.weight-decay", "0.01", "--optim.decay", "weights", "--optim.clip-norm", "10"),
    *("--loss.label-smoothing", "0.1", "--pipeline.mixup", "0.2", "--pipeline.mix-probability", "0.5"),
]


def losses(shards: Path, out: Path, *more: str) -> list[float]:
    """Train twenty steps and return the loss of each."""
    recipe = ["--recipe", str(ROOT / "tests" / "tiny.toml"), "--data", str(shards), "--out", str(out)]
    AcceleratorState._reset_state(reset_partial_state=True)  # one process, several precisions
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more threads add in another order
    try:
        assert train.train(parse_command(train.TrainCommand, [*recipe, *SETTINGS, *more])) == 0
    finally:
        torch.set_num_threads(threads)
    return [record["loss"] for record in read_metrics(out / "metrics.jsonl")]


def main() -> None:
    """Write the file."""
    from conftest import write_pictures

    from shards.build import BuildOptions, build

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pictures(folder / "source", 90)
        build(BuildOptions(source=folder / "source", out=folder / "set", name="pictures", workers=1))
        found = losses(folder / "set", folder / "run")
    GOLDEN.write_text(json.dumps({"loss": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
