"""Fixtures shared by all tests: where the real photographs are, and what `gpu` means."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model.codebook.kernels import Kernels
from shards.build import BuildOptions, build
from tests.codebook_shim import build_shim

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-gpu", action="store_true", help="a test marked gpu fails instead of skipping")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() or config.getoption("--require-gpu"):
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(
                pytest.mark.skip(reason="no CUDA device here: run `make gpu-check` on a machine with one")
            )


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    """The codebook's CUDA kernels, run on the CPU."""
    return build_shim(tmp_path_factory.mktemp("shim"))


def data_root() -> Path | None:
    """The folder with the photographs: $VQSA_DATA, else ../shared/data beside the checkout."""
    root = Path(os.environ.get("VQSA_DATA", ROOT.parent / "shared" / "data"))
    return root if root.is_dir() else None


def _extracted(archive: str, tmp: pytest.TempPathFactory) -> Path:
    root = data_root()
    path = root / archive if root else None
    if path is None or not path.is_file():
        pytest.skip(f"{archive} is not there: set VQSA_DATA to the folder that holds it")
    out = tmp.mktemp(path.stem.removesuffix(".tar"))
    with tarfile.open(path) as tar:
        tar.extractall(out, filter="data")
    return out


@pytest.fixture(scope="session")
def photos_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,000 ImageNet photographs at native size, `<wnid>/<name>.JPEG`; skips where absent."""
    return _extracted("imagenet-sample/imagenet-sample.tar", tmp_path_factory) / "imagenet-sample"


def write_pictures(folder: Path, count: int, *, classes: int = 3, side: int = 64, seed: int = 0) -> None:
    """Write JPEGs whose class can be learnt (hue by class, random gradient) as `folder/<class>/<i>.jpg`."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        label = i % classes
        height, width = rng.integers(side, 2 * side, 2)
        ramp = np.add.outer(
            np.linspace(0, rng.uniform(40, 90), height), np.linspace(0, rng.uniform(40, 90), width)
        )
        pixels = ramp[:, :, None] + rng.normal(0, 6, (height, width, 3)) + 40
        pixels[:, :, label % 3] += 60
        path = folder / f"class{label}" / f"{i:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)


@pytest.fixture(scope="session")
def picture_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard set of 90 generated pictures in 3 classes."""
    source, out = tmp_path_factory.mktemp("pictures"), tmp_path_factory.mktemp("shards") / "set"
    write_pictures(source, 90)
    build(BuildOptions(source=source, out=out, name="pictures", samples_per_shard=40, workers=1))
    return out


RUN_KINDS = ("gaussian_noise", "contrast")


@pytest.fixture(scope="session")
def run_folder(picture_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a checkpoint of an untrained model, as the training loop writes it."""
    import model
    from model import ModelConfig
    from pipeline.config import PipelineConfig
    from tools.runtime import checkpoint
    from tools.runtime.config import RunConfig
    from tools.runtime.metrics import MetricsFile

    out = tmp_path_factory.mktemp("runs") / "untrained"
    config = RunConfig(
        data=picture_shards,
        steps=1,
        pipeline=PipelineConfig(image_size=32, constants="imagenet", kinds=RUN_KINDS, batch_global=32),
        model=ModelConfig(trunk="resnet10", codes=8, init="normal"),
    )
    checkpoint.write(
        out / "checkpoints",
        {"model.safetensors": model.build(config.model, 3).state_dict()},
        step=1,
        config=config,
        classes=["class0", "class1", "class2"],
    )
    metrics = MetricsFile(out / "metrics.jsonl", 0)
    metrics.write({"step": 1, "loss": 2.0, "ce": 1.0, "top1_pct": 30.0})
    metrics.close()
    return out


# `accelerate launch --cpu` starts one process whatever number is asked for; on a CPU, gloo processes come from
# its multi-device launcher together with ACCELERATE_USE_CPU, which `environment` sets.
TWO_PROCESSES = [
    "-m",
    "accelerate.commands.launch",
    "--multi_gpu",
    "--num_processes",
    "2",
    "--num_machines",
    "1",
]
TWO_PROCESSES += ["--mixed_precision", "no"]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_step(out: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Wait until a run in `out` has logged a step."""
    from tools.runtime.metrics import read_metrics

    deadline = time.monotonic() + 120
    while not any(r["step"] >= step for r in read_metrics(out / "metrics.jsonl")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == code, output
    return output
