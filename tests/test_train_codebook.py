"""The codebook in a run: it starts from the first batches, is reported, and resumes bit for bit."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, finish, start

import model
import shards
from model import ModelConfig
from pipeline.config import PipelineConfig
from pipeline.loader import TrainingLoader
from tools.runtime import checkpoint
from tools.runtime.codebook import codebook_metrics, start_codebook
from tools.runtime.codes import CodeUsage
from tools.runtime.metrics import read_metrics

BATCH = 8


@pytest.fixture
def loader(picture_shards: Path) -> Iterator[TrainingLoader]:
    config = PipelineConfig(
        image_size=32, constants="imagenet", batch_global=BATCH, threads=1, read_threads=1,
        kinds=("contrast",), batch_per_gpu=4,
    )  # fmt: skip
    loader = TrainingLoader(shards.open(picture_shards), config, seed=0)
    yield loader
    loader.close()


def _net(**choices: Any) -> model.VQSA:
    torch.manual_seed(0)
    return model.build(ModelConfig(**({"trunk": "resnet10", "freeze_bn": True} | choices)), 3)


def _start(net: model.VQSA, loader: TrainingLoader, samples: int = 90) -> int:
    batches = net.config.init_batches
    return start_codebook(
        Accelerator(), net, loader, lambda batch: batch.images, batches=batches, samples=samples
    )


def test_takes_as_many_batches_as_the_codes_need_and_rewinds(loader: TrainingLoader) -> None:
    net = _net(codes=20)  # one feature per image at 32 px
    assert _start(net, loader) == 3
    seen = [next(loader) for _ in range(6)]
    assert torch.cat([b.position for b in seen]).tolist() == list(range(24)), (
        "training begins at the first sample"
    )
    features = torch.cat([net.codebook_features(b.images) for b in seen])
    assert torch.cdist(net.codebook.codes, features).min(1).values.max() < 1e-5  # type: ignore[union-attr]
    assert _start(net, loader) == 0, "only once"
    assert _start(_net(codes=4, init="kmeans", init_batches=2), loader) == 2
    assert _start(_net(codes=4, init="normal"), loader) == 0
    assert _start(_net(quantise="none", attention=False), loader) == 0


def test_more_codes_than_the_data_has_features_is_said(loader: TrainingLoader) -> None:
    with pytest.warns(UserWarning, match="100 codes starts from 88 features"):
        assert _start(_net(codes=100), loader) == 11


def test_features_that_are_not_finite_name_their_samples(loader: TrainingLoader) -> None:
    first = next(loader).sample_id.tolist()
    loader.load_state_dict({**loader.state_dict(), "position": 0, "micro": 0})
    net = _net(codes=4)
    with torch.no_grad():
        net.trunk.layer4[0].conv1.weight[0] = torch.nan  # type: ignore[union-attr, index]
    with pytest.raises(
        ValueError, match=r"not finite before the first step.*samples \[" + ", ".join(map(str, first))
    ):
        _start(net, loader)


def test_metrics_are_of_the_interval() -> None:
    net = _net(codes=5, init="normal", revive_after=1)
    book = net.codebook
    assert book is not None
    assert book.upkeep is not None
    with torch.no_grad():
        book.codes.zero_()
        book.codes[:, 0] = torch.tensor([0.0, 10, 20, 30, 40])
    z_ND = torch.zeros(4, 512)
    z_ND[:, 0] = torch.tensor([1.0, 9, 9, 13])
    found = book(z_ND)
    book.update(z_ND, found.index_N)
    record = codebook_metrics(Accelerator(), net)
    assert record == pytest.approx({
        "codes_used_pct": 40, "codes_dead": 3, "codes_revived": 3, "sqdist_mean": 3, "sqdist_max": 9,
        "sqdist_std": math.sqrt((1 + 1 + 1 + 81) / 4 - 9),
        "perplexity": math.exp(-(math.log(1 / 4) / 4 + 3 * math.log(3 / 4) / 4)),
    })  # fmt: skip
    again = codebook_metrics(Accelerator(), net)
    assert (again["codes_dead"], again["codes_revived"], again["sqdist_max"]) == (5, 0, 0)
    assert codebook_metrics(Accelerator(), _net(quantise="none", attention=False)) == {}


def test_an_intervals_counts_go_on() -> None:
    """As after a resume inside a logging interval."""
    settings = {"codes": 5, "init": "normal", "revive_after": 1}
    nets = [_net(**settings), _net(**settings)]
    book = nets[0].codebook
    assert book is not None
    found = book(torch.randn(4, 512))
    book.update(torch.randn(4, 512), found.index_N)
    accelerator = Accelerator()
    state = CodeUsage(accelerator, nets[0]).state_dict()
    CodeUsage(accelerator, nets[1]).load_state_dict(state)
    records = [codebook_metrics(accelerator, net) for net in nets]
    assert records[0] == records[1]
    assert records[0]["codes_revived"] > 0
    del state["revived"]  # a checkpoint from before it was saved
    CodeUsage(accelerator, nets[1]).load_state_dict(state)


@pytest.mark.slow
def test_a_kept_up_codebook_resumes_bit_for_bit(picture_shards: Path, tmp_path: Path) -> None:
    settings = ["--model.init", "kmeans", "--model.init-batches", "2", "--model.ema", "0.9",
                "--model.revive-after", "3", "--model.metric", "cosine", "--model.centre"]  # fmt: skip
    recipe = str(ROOT / "tests" / "tiny.toml")

    def run(out: Path, *more: str) -> None:
        finish(
            start(
                "train.py",
                "--recipe",
                recipe,
                "--data",
                str(picture_shards),
                "--out",
                str(out),
                *settings,
                *more,
            )
        )

    run(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    newest = checkpoint.newest(tmp_path / "b")
    shutil.rmtree(newest.path)
    run(tmp_path / "b", "--resume", "auto")
    a, b = (checkpoint.newest(tmp_path / name).model_state() for name in "ab")
    assert any(name.startswith("codebook.upkeep.") for name in a)
    assert all(torch.equal(a[name], b[name]) for name in a)
    losses = [
        [r["loss"] for r in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in r] for name in "ab"
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 12
    records = [r for r in read_metrics(tmp_path / "b" / "metrics.jsonl") if "perplexity" in r]
    assert {"codes_dead", "codes_revived", "sqdist_mean", "sqdist_std", "sqdist_max"} <= records[-1].keys()
