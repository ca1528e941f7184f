"""AugMix's operations against PIL, its draws, and the views that the loader gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image, ImageOps

import shards
from pipeline import augmix
from pipeline.config import PipelineConfig
from pipeline.loader import TrainingLoader
from pipeline.normalise import denormalise, normalise

SIDE = 48
CONFIG = PipelineConfig(image_size=SIDE)


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    """uint8 (5, S, S, 3): noise on ramps, a flat one, a dark one of few levels."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(20, 200, SIDE)[None, :, None, None] + np.linspace(0, 40, SIDE)[None, None, :, None]
    noisy = ramp + rng.normal(0, 8, (3, SIDE, SIDE, 3))
    flat = np.full((1, SIDE, SIDE, 3), 77.0)
    dark = rng.integers(10, 14, (1, SIDE, SIDE, 3)).astype(float)
    return np.concatenate([noisy, flat, dark]).clip(0, 255).astype(np.uint8)


def by_pil(image: np.ndarray, operation: str, level: float, sign: float) -> np.ndarray:
    """What AugMix's authors do with PIL, as the paper's appendix describes the nine operations."""
    picture = Image.fromarray(image)
    shear, shift = sign * level * 0.3 / 10, sign * int(level * int(SIDE / 3) / 10)
    affine = {
        "shear_x": (1, shear, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, shear, 1, 0),
        "translate_x": (1, 0, shift, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, shift),
    }
    if operation in affine:
        made = picture.transform(
            picture.size, Image.Transform.AFFINE, affine[operation], Image.Resampling.BILINEAR
        )
    elif operation == "rotate":
        made = picture.rotate(sign * int(level * 30 / 10), Image.Resampling.BILINEAR)
    elif operation == "posterize":
        made = ImageOps.posterize(picture, 4 - int(level * 4 / 10))
    elif operation == "solarize":
        made = ImageOps.solarize(picture, 256 - int(level * 256 / 10))
    else:
        made = getattr(ImageOps, operation)(picture)
    return np.asarray(made)


@pytest.mark.parametrize("operation", augmix.OPERATIONS)
@pytest.mark.parametrize(("level", "sign"), [(0.2, 1.0), (1.7, -1.0), (2.99, 1.0)])
def test_operations_are_pils(pictures: np.ndarray, operation: str, level: float, sign: float) -> None:
    number = augmix.OPERATIONS.index(operation)
    images = len(pictures)
    columns = (np.full(images, number), np.full(images, level), np.full(images, sign))
    planar = torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()
    is_table = number < augmix._TABLES
    got = (augmix._look_up if is_table else augmix._warp)(planar, *columns).permute(0, 2, 3, 1).numpy()
    expected = np.stack([by_pil(image, operation, level, sign) for image in pictures])
    difference = np.abs(got.astype(int) - expected)
    if is_table:
        assert difference.max() == 0
    else:
        # PIL cuts results off where we round; at the border of the picture one may see a pixel the other does not.
        assert np.mean(difference > 1) < 0.004
        assert difference.mean() < 0.6


def chains(images: int, view: int = 0, seed: int = 3) -> augmix.Chains:
    return augmix.draw_chains(seed, np.zeros(images, np.int64), np.arange(images), view)


def test_draws_follow_their_laws() -> None:
    drawn = chains(4000)
    assert scipy.stats.kstest(drawn.share_B, "uniform").pvalue > 0.001
    # Each weight of Dirichlet(1, 1, 1) is Beta(1, 2).
    for chain in range(3):
        assert scipy.stats.kstest(drawn.weight_BW[:, chain], scipy.stats.beta(1, 2).cdf).pvalue > 0.001
    assert drawn.weight_BW.sum(1) == pytest.approx(1)
    assert np.bincount(drawn.depth_BW.ravel(), minlength=4)[1:] == pytest.approx(4000, rel=0.1)
    assert np.bincount(drawn.operation_BWd.ravel(), minlength=9) == pytest.approx(4000, rel=0.1)
    assert 0.1 <= drawn.level_BWd.min() < 0.11
    assert 2.99 < drawn.level_BWd.max() < 3.0
    assert abs(drawn.sign_BWd.mean()) < 0.02
    assert not np.array_equal(chains(9, view=1).share_B, drawn.share_B[:9])


def test_a_view_depends_on_its_own_sample_alone(pictures: np.ndarray) -> None:
    together = augmix.augmix(torch.from_numpy(pictures), chains(5), CONFIG)
    for i in range(5):
        alone = augmix.draw_chains(3, np.zeros(1, np.int64), np.array([i]), 0)
        one = augmix.augmix(torch.from_numpy(pictures[i : i + 1]), alone, CONFIG)
        torch.testing.assert_close(one[0], together[i], rtol=0, atol=1e-6)
    assert together.is_contiguous(memory_format=torch.channels_last)


def test_a_view_is_the_weighted_mean_of_image_and_chains(pictures: np.ndarray) -> None:
    """Computed again from PIL's results, image by image."""
    drawn = chains(5)
    got = augmix.augmix(torch.from_numpy(pictures), drawn, CONFIG)
    for i, image in enumerate(pictures):
        ends = []
        for chain in range(3):
            end = image
            for depth in range(drawn.depth_BW[i, chain]):
                slot = (i, chain, depth)
                name = augmix.OPERATIONS[drawn.operation_BWd[slot]]
                end = by_pil(end, name, drawn.level_BWd[slot], drawn.sign_BWd[slot])
            ends.append(drawn.weight_BW[i, chain] * end.astype(float))
        mixed = (1 - drawn.share_B[i]) * image + drawn.share_B[i] * sum(ends)
        expected = normalise(torch.from_numpy(mixed[None]).float(), CONFIG)
        assert (got[i] - expected[0]).abs().mean() < 0.03  # of a standard deviation: about 1.7 grey levels


def test_the_loader_gives_the_views(picture_shards: Path) -> None:
    store = shards.open(picture_shards)
    settings = {"image_size": 32, "batch_global": 4, "threads": 1, "read_threads": 1, "constants": "imagenet"}
    batches = {}
    for views in (0, 1, 2):
        loader = TrainingLoader(store, PipelineConfig(**settings, kinds=(), augmix=views), seed=1)
        batches[views] = next(loader)
        loader.close()
    torch.testing.assert_close(batches[2].images, batches[0].images, rtol=0, atol=1e-5)
    assert len(batches[2].augmented) == 2
    assert [len(batch.views) for batch in batches.values()] == [1, 1, 3]
    torch.testing.assert_close(batches[1].images, batches[2].augmented[0])
    plain_u8 = denormalise(batches[2].images, CONFIG)
    keys = (np.zeros(4, np.int64), batches[2].sample_id.numpy())
    for view in (0, 1):
        expected = augmix.augmix(plain_u8, augmix.draw_chains(1, *keys, view), CONFIG)
        torch.testing.assert_close(batches[2].augmented[view], expected)
