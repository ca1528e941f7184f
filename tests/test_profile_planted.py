"""The profiler names the limiting stage where it was planted, at least five times as slow as anything else."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import write_pictures
from torch import Tensor, nn

import model
import shards
from model.vqsa import Losses
from pipeline import graph
from shards.build import BuildOptions, build
from tools.profiling.measure import run as profile_of
from tools.profiling.session import Session
from tools.profiling.table import Profile, Stage
from tools.runtime.config import RunConfig, read_recipe, validated

TINY = Path(__file__).resolve().parent / "tiny.toml"


class Pooled(nn.Module):
    """A classifier that costs next to nothing."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.codebook = None
        self.num_classes = classes
        self.fc = nn.Linear(3, classes)

    def forward(self, images: Tensor, labels: Tensor) -> Losses:
        logits = self.fc(images.mean((2, 3)))
        loss, zero = nn.functional.cross_entropy(logits, labels), torch.zeros(())
        finite = torch.ones(len(images), dtype=torch.bool)
        return Losses(loss, loss, zero, zero, logits, None, finite, None)

    def update_codebook(self, *outputs: Losses) -> None:
        pass


@pytest.fixture
def cheap_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "build", lambda config, classes: Pooled(classes))


@pytest.fixture
def profiled(picture_shards: Path, tmp_path: Path) -> Callable[..., Profile]:
    def run(data: Path = picture_shards, **pipeline: Any) -> Profile:
        recipe = read_recipe(TINY)
        trunk = pipeline.pop("trunk", "resnet10")
        recipe["model"] = {**recipe["model"], "trunk": trunk}
        recipe["pipeline"] = {**recipe["pipeline"], "batch_global": 4, **pipeline}
        config = validated(RunConfig, {**recipe, "data": data, "out": tmp_path}, "test")
        session = Session(config, Accelerator(cpu=True), rounds=3, seconds=0.02, progress=lambda name: None)
        try:
            return profile_of(session, with_checkpoint=False)
        finally:
            session.close()

    return run


def others_s(profile: Profile, *planted: str) -> float:
    """CPU or waiting time of the costliest stage that was not planted."""
    return max(cost_s(s) for s in profile.stages if s.counts and s.name not in planted)


def cost_s(stage: Stage) -> float:
    assert stage.cpu_s is not None
    return stage.cpu_s.p50


def of(profile: Profile, name: str) -> Stage:
    return next(stage for stage in profile.stages if stage.name == name)


def test_a_throttled_reader(
    profiled: Callable[..., Profile], cheap_model: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = shards.Store.fetch

    def slow(self: shards.Store, ids: Any, *more: Any, **named: Any) -> shards.Records:
        time.sleep(0.03 * len(ids))
        return fetch(self, ids, *more, **named)

    monkeypatch.setattr(shards.Store, "fetch", slow)
    found = profiled()
    reading = of(found, "read").wall_s
    assert reading is not None
    assert reading.p50 >= 5 * others_s(found, "read")
    first = found.verdict.limits[0]
    assert (first.stage, first.lane) == ("read", "read")
    assert first.rate_if_free_img_s > 2 * first.rate_img_s
    assert found.verdict.measured_img_s < 36  # 30 ms per image, one thread: 33
    assert found.verdict.data_wait_pct > 50
    assert found.suggestions[0].change == "--pipeline.read-threads 2"


def test_a_heavy_corruption(
    profiled: Callable[..., Profile], cheap_model: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    corrupt = graph.corrupt

    def heavy(config: Any, image: Any, *planned: Any) -> Any:
        for _ in range(24):
            image = corrupt(config, image, *planned)
        return image

    monkeypatch.setattr(graph, "corrupt", heavy)
    found = profiled(kinds=("zoom_blur",), clean_fraction=0, image_size=160)
    assert cost_s(of(found, "corrupt")) >= 5 * others_s(found, "corrupt")
    assert (found.verdict.limits[0].stage, found.verdict.limits[0].lane) == ("corrupt", "graph")


def test_a_tiny_model(
    profiled: Callable[..., Profile], cheap_model: None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source, data = tmp_path_factory.mktemp("large"), tmp_path_factory.mktemp("shards") / "set"
    write_pictures(source, 16, side=1400)
    build(BuildOptions(source=source, out=data, name="large", samples_per_shard=16, workers=1))
    # A step has a cost of its own, whatever the model: 16 images share it.
    found = profiled(data, kinds=(), crop_scale=(0.03, 0.04), batch_global=16)
    assert cost_s(of(found, "decode")) >= 5 * others_s(found, "decode")
    assert (found.verdict.limits[0].stage, found.verdict.limits[0].lane) == ("decode", "graph")
    assert found.verdict.limits[1].lane == "graph"  # the model is never the limit
    # 1400 px are far more than 32 px of training need: said with a measured decode of smaller images.
    assert any("resized to 256 px" in s.words for s in found.suggestions)
    smaller = of(found, "decode, stored at 256 px")
    assert cost_s(smaller) < cost_s(of(found, "decode")) / 2


def test_a_huge_model(profiled: Callable[..., Profile]) -> None:
    found = profiled(trunk="resnet34", image_size=64, batch_global=2, kinds=("brightness",))
    model_s = sum(cost_s(s) for s in found.stages if s.counts and s.lane == "model")
    graph_s = sum(cost_s(s) for s in found.stages if s.counts and s.lane in ("graph", "read"))
    assert model_s >= 5 * graph_s
    first = found.verdict.limits[0]
    assert first.lane == "model"
    assert first.stage in ("forward", "backward")
    assert found.verdict.data_wait_pct < 50
    assert 0 < found.verdict.mfu_pct < 150
    assert found.verdict.gpu_busy_pct is None
    assert any("no GPU" in warning for warning in found.warnings)
