"""What differs on a GPU: the loader's pixels, damage, lifetimes, evaluation, training. Run by `make gpu-check`."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import finish, start

import shards
import train
from pipeline.config import PipelineConfig
from pipeline.loader import EvaluationLoader, TrainingLoader
from pipeline.normalise import denormalise
from tools.evaluate import EvaluateCommand, evaluate
from tools.runtime.config import parse_command
from tools.runtime.metrics import read_metrics
from tools.runtime.results import read_csv

pytestmark = pytest.mark.gpu
KINDS = ("gaussian_noise", "shot_noise", "brightness", "contrast")


def settings(**changes: object) -> PipelineConfig:
    return PipelineConfig(
        **{"image_size": 64, "constants": "imagenet", "kinds": KINDS, "batch_global": 8, **changes}
    )  # type: ignore[arg-type]


def pixels(
    store: shards.Store, config: PipelineConfig, batches: int, skip: int = 0
) -> dict[int, torch.Tensor]:
    loader = TrainingLoader(store, config, seed=3, device_id=0)
    if skip:
        state = loader.state_dict()
        loader.load_state_dict({**state, "position": skip * config.batch_global})
    out = {}
    for _ in range(batches):
        batch = next(loader)
        assert batch.images.is_cuda
        assert batch.labels.is_cuda
        out.update(zip(batch.position.tolist(), batch.images.cpu(), strict=True))
    loader.close()
    return out


@pytest.fixture(scope="module")
def store(picture_shards: Path) -> shards.Store:
    return shards.open(picture_shards)


@pytest.mark.parametrize("size", [1, 7, 32])
def test_pixels_do_not_depend_on_the_batch_size(store: shards.Store, size: int) -> None:
    want = pixels(store, settings(), 12)
    got = pixels(store, settings(batch_global=size), 64 // size)
    assert all(torch.equal(want[position], image) for position, image in got.items())


def test_a_restart_continues_with_the_same_pixels(store: shards.Store) -> None:
    want, got = pixels(store, settings(), 12), pixels(store, settings(), 4, skip=6)
    assert list(got) == list(range(48, 80))
    assert all(torch.equal(want[position], image) for position, image in got.items())


def test_the_gpu_graph_is_close_to_the_cpu_graph(store: shards.Store) -> None:
    """Clean crops: the decoders' own difference, at most 2 grey levels on average."""
    config = settings(kinds=())
    loader = TrainingLoader(store, config, seed=3)
    batch = next(loader)
    loader.close()
    on_cpu = denormalise(batch.images, config).float()
    on_gpu = denormalise(torch.stack([pixels(store, config, 1)[i] for i in range(8)]), config).float()
    assert (on_cpu - on_gpu).abs().mean() < 2


def test_evaluation_sees_every_sample_once(store: shards.Store) -> None:
    loader = EvaluationLoader(store, settings(), batch=32, device_id=0)
    seen = [i for batch in loader for i in batch.sample_id.tolist() if batch.images_u8.is_cuda]
    loader.close()
    assert sorted(seen) == list(range(len(store)))


def test_paired_views_share_a_crop(store: shards.Store) -> None:
    loader = TrainingLoader(store, settings(paired=True), seed=3, device_id=0)
    batch = next(loader)
    loader.close()
    assert batch.clean_images is not None
    assert batch.clean_images.is_cuda
    assert not torch.equal(batch.images, batch.clean_images)


def test_batches_outlive_the_work_queued_on_them(store: shards.Store) -> None:
    """Sums queued behind slow kernels, while the loader goes on, are those of the batches themselves."""
    config = settings(batch_global=32)
    want = [image.double().sum().item() for image in pixels(store, config, 6).values()]
    loader = TrainingLoader(store, config, seed=3, device_id=0)
    slow = torch.randn(4096, 4096, device="cuda")
    got = []
    for _ in range(6):
        batch = next(loader)
        for _ in range(20):
            slow = slow @ slow
            slow /= slow.abs().max()
        got.append(batch.images.double().sum(dim=(1, 2, 3)))
        del batch
    loader.close()
    torch.testing.assert_close(torch.cat(got).cpu(), torch.tensor(want, dtype=torch.float64))


def test_damaged_records_are_replaced(picture_shards: Path, tmp_path: Path) -> None:
    """A record cut off in the middle: named, and every other sample as before."""
    shutil.copytree(picture_shards, tmp_path / "set")
    store = shards.open(tmp_path / "set")
    config = settings(batch_global=32, kinds=())
    want = pixels(store, config, 2)
    loader = TrainingLoader(store, config, seed=3, device_id=0)
    bad = int(next(loader).sample_id[5])
    loader.close()
    half = int(store.length[bad]) // 2
    with (store.path / store.location(bad).split(",")[0]).open("r+b") as file:
        file.seek(int(store.offset[bad]) + half)
        file.write(b"\0" * (int(store.length[bad]) - half))
    loader = TrainingLoader(store, config, seed=3, device_id=0)
    for _ in range(2):
        batch = next(loader)
        rows = zip(batch.position.tolist(), batch.sample_id.tolist(), batch.images.cpu(), strict=True)
        for position, sample, image in rows:
            assert torch.equal(image, want[position]) == (sample != bad)
    assert list(loader.damaged) == [bad]
    loader.close()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_training_runs_and_resumes(
    picture_shards: Path, tmp_path: Path, precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The training command on the GPU, alone: the loader's graph must be the GPU's."""
    recipe = Path(__file__).parent / "tiny.toml"
    arguments = ["--recipe", str(recipe), "--data", str(picture_shards), "--val", str(picture_shards)]
    arguments += ["--out", str(tmp_path / "run"), "--precision", precision, "--resume", "auto"]
    AcceleratorState._reset_state(reset_partial_state=True)  # one precision per process, it says otherwise
    assert train.train(parse_command(train.TrainCommand, arguments)) == 0
    assert f"cuda, {precision}" in capsys.readouterr().out
    losses = [r["loss"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in r]
    assert len(losses) == 12
    assert all(map(math.isfinite, losses))
    assert train.train(parse_command(train.TrainCommand, arguments)) == 0


OPTIONS = {
    "a codebook that stays in use, mixed images, averaged weights": [
        *("--model.init", "kmeans", "--model.ema", "0.9", "--model.revive-after", "2"),
        *("--pipeline.mixup", "0.2", "--pipeline.cutmix", "1.0", "--optim.ema-decay", "0.99"),
    ],
    "AugMix, clipped, checkpoints in the background": [
        *(
            "--pipeline.augmix",
            "2",
            "--loss.consistency",
            "12",
            "--optim.clip-norm",
            "1",
            "--checkpoint-async",
        ),
    ],
    "pairs in parts, cosine, centred": [
        *("--pipeline.paired", "--loss.consistency", "1", "--pipeline.batch-per-gpu", "4"),
        *("--model.metric", "cosine", "--model.centre", "--images-every", "1", "--audit"),
    ],
    "compiled": ["--compile", "--precision", "bf16"],
}


@pytest.mark.parametrize("options", OPTIONS)
def test_options_of_training_work(picture_shards: Path, tmp_path: Path, options: str) -> None:
    recipe = Path(__file__).parent / "tiny.toml"
    arguments = ["--recipe", str(recipe), "--data", str(picture_shards), "--val", str(picture_shards)]
    arguments += ["--out", str(tmp_path / "run"), "--steps", "3", *OPTIONS[options]]
    AcceleratorState._reset_state(reset_partial_state=True)
    assert train.train(parse_command(train.TrainCommand, arguments)) == 0
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    losses = [r["loss"] for r in records if "loss" in r]
    assert len(losses) == 3
    assert all(map(math.isfinite, losses))
    assert any("val_score_pct" in r for r in records)


def test_the_evaluation_command_says_what_it_says_on_a_cpu(
    run_folder: Path, picture_shards: Path, tmp_path: Path
) -> None:
    arguments = ["tools/evaluate.py", "--checkpoint", str(run_folder), "--data", str(picture_shards)]
    arguments += ["--kinds", "gaussian_noise", "contrast", "--batch", "32"]
    finish(start(*arguments, "--out", str(tmp_path / "cpu")))  # what `start` starts uses no GPU
    AcceleratorState._reset_state(reset_partial_state=True)
    report = evaluate(
        EvaluateCommand(
            checkpoint=(run_folder,),
            data=picture_shards,
            kinds=("gaussian_noise", "contrast"),
            batch=32,
            out=tmp_path / "gpu",
        )
    )
    assert report["environment"]["device"] == "cuda"
    (want,), (found,) = (read_csv(tmp_path / place / "cells.csv").values() for place in ("cpu", "gpu"))
    for cell, wanted in zip(found, want, strict=True):
        assert (cell.name, cell.images) == (wanted.name, wanted.images)
        assert cell.top1 == pytest.approx(wanted.top1, abs=0.1)  # of a model that was not trained: near ties
        assert cell.nll == pytest.approx(wanted.nll, abs=0.02)
