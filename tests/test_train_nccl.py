"""Training where processes speak through NCCL, on one GPU and, where there are two, on two. Run by `make gpu-check`.

One process that a launcher starts has a process group, DDP and NCCL too: a tensor on the wrong device and a wrong order
of wrapping show there as on a whole node.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools.runtime import checkpoint
from tools.runtime.metrics import read_metrics

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parent.parent
# Frozen statistics: a step then computes the same on any number of processes.
COMPARABLE = ("--model.freeze-bn", "--optim.lr", "1e-4", "--steps", "4")


@pytest.fixture(params=[1, 2])
def processes(request: pytest.FixtureRequest) -> int:
    """So many processes, each with a GPU of its own."""
    if torch.cuda.device_count() < request.param:
        pytest.skip(f"needs {request.param} GPUs, found {torch.cuda.device_count()}")
    return int(request.param)


def trained(shards: Path, out: Path, *options: str, processes: int | None) -> list[dict[str, float]]:
    """Train by the command, through torchrun with this many processes or, with None, without it; return the metrics."""
    program = [sys.executable]
    if processes is not None:
        program += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [
        *program,
        "train.py",
        "--recipe",
        "tests/tiny.toml",
        "--data",
        str(shards),
        "--out",
        str(out),
        *options,
    ]
    ended = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout
    return [record for record in read_metrics(out / "metrics.jsonl") if "loss" in record]


def losses(records: list[dict[str, float]]) -> list[float]:
    return [record["loss"] for record in records]


def test_losses_are_those_of_one_process_alone(picture_shards: Path, tmp_path: Path, processes: int) -> None:
    alone = trained(picture_shards, tmp_path / "alone", *COMPARABLE, processes=None)
    found = trained(picture_shards, tmp_path / "launched", *COMPARABLE, processes=processes)
    assert losses(found) == pytest.approx(losses(alone), rel=1e-3)


@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_everything_that_is_exchanged_goes_through(
    picture_shards: Path, tmp_path: Path, processes: int, how: str
) -> None:
    """Codebook, accumulated gradients, statistics, validation and metrics; then resumed without a launcher."""
    options = ["--val", str(picture_shards), "--val-every", "4", "--images-every", "2", "--audit"]
    options += ["--model.init", "kmeans", "--model.ema", "0.9", "--model.revive-after", "2"]
    options += ["--pipeline.batch-per-gpu", "2", "--pipeline.mixup", "0.2", "--optim.ema-decay", "0.99"]
    options += ["--precision", "bf16", "--sync-bn", "--checkpoint-async", "--resume", "auto"]
    options += ["--compile"] if how == "compiled" else []
    out = tmp_path / "run"
    whole = trained(picture_shards, out, *options, processes=processes)
    assert [record["step"] for record in whole] == list(range(1, 13))
    assert any("val_score_pct" in record for record in read_metrics(out / "metrics.jsonl"))
    shutil.rmtree(checkpoint.newest(out).path)
    again = trained(picture_shards, out, *options, processes=None)
    assert [record["step"] for record in again] == list(range(1, 13))
    assert losses(again) == pytest.approx(
        losses(whole), rel=0.05
    )  # batches of another size for the statistics
