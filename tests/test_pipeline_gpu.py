"""What differs on a GPU: the loader's pixels, evaluation, a training step. Run by `make gpu-check`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import shards
from pipeline.config import PipelineConfig
from pipeline.loader import EvaluationLoader, TrainingLoader
from pipeline.normalise import denormalise

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
