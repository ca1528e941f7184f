"""Photographs under our corruptions and under PyPI imagecorruptions, each with its own random draws.

Statistics of the corrupted photographs agree within the reference's own spread from seed to seed.
"""

# ruff: noqa: NPY002 - the reference draws from NumPy's global generator

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.corruptions import HELD_OUT_KINDS, TRAINING_KINDS, corrupt, frost

pytest.importorskip("cv2")
pytest.importorskip("skimage")

from skimage import metrics

from benchmarks.corruptions import photographs
from benchmarks.parity import FIELDS, has_numba
from benchmarks.reference import glass_blur_by_numba, reference

BANDS = 8
# What two exact implementations may differ by: whole levels truncate either way.
FLOORS = {
    "mean shift": 0.30,
    "rmse": 0.40,
    "psnr_db": 0.12,
    "ssim": 0.004,
    "black share": 0.01,
    "white share": 0.01,
    **{f"band {i} db": 0.20 for i in range(BANDS)},
}


@functools.cache
def band_of(side: int) -> np.ndarray:
    """The band, by distance from the origin, of every bin of a real 2-D Fourier transform; -1 in the corners."""
    radius = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    band = (radius * 2 * BANDS).astype(int)
    return np.where(band < BANDS, band, -1)


def luma(image_HWC: np.ndarray) -> np.ndarray:
    return image_HWC @ np.array([0.299, 0.587, 0.114])


def statistics(image_HWC: np.ndarray, corrupted_HWC: np.ndarray) -> list[float]:
    """Return the values of FLOORS' names, in their order."""
    difference = corrupted_HWC.astype(float) - image_HWC
    rmse = float(np.sqrt((difference**2).mean()))
    before, after = luma(image_HWC), luma(corrupted_HWC)
    window = np.hanning(len(after))
    power = np.abs(np.fft.rfft2((after - after.mean()) * window[:, None] * window)) ** 2
    band = band_of(len(after))
    total = np.bincount(band[band >= 0], power[band >= 0]) / np.bincount(band[band >= 0])
    return [
        float(difference.mean()),
        rmse,
        20 * np.log10(255 / max(rmse, 0.1)),
        float(metrics.structural_similarity(before, after, data_range=255)),
        float((corrupted_HWC <= 1).mean()),
        float((corrupted_HWC >= 254).mean()),
        *(10 * np.log10(total + 1.0)),
    ]


def theirs(image_HWC: np.ndarray, kind: str, severity: int, seed: int) -> np.ndarray:
    np.random.seed(seed)
    corrupted: Any = getattr(reference(), kind)
    if kind == "glass_blur" and has_numba():
        corrupted = glass_blur_by_numba
    return np.uint8(corrupted(Image.fromarray(image_HWC), severity))


def ours(image_HWC: np.ndarray, kind: str, severity: int, seed: int) -> np.ndarray:
    return corrupt(torch.from_numpy(image_HWC), kind, severity, seed, flavour="bethge").numpy()


def gather(side: Any, photos: np.ndarray, kind: str, severity: int, seeds: int) -> np.ndarray:
    """Return statistics (photographs, seeds, statistic); no two pictures share a seed."""
    return np.array(
        [
            [statistics(x, side(x, kind, severity, 1000 * severity + 10 * i + seed)) for seed in range(seeds)]
            for i, x in enumerate(photos)
        ]
    )


def disagreements(ours_PSK: np.ndarray, reference_PSK: np.ndarray) -> dict[str, tuple[float, float]]:
    """Return the statistics that differ by more than four standard errors and the floor: by how much, bound."""
    photos, seeds, _ = reference_PSK.shape
    spread_K = np.sqrt(reference_PSK.var(axis=1, ddof=1).mean(axis=0)) if seeds > 1 else 0.0
    bound_K = 4 * spread_K * np.sqrt(2 / (photos * seeds)) + np.array(list(FLOORS.values()))
    difference_K = np.abs(ours_PSK.mean((0, 1)) - reference_PSK.mean((0, 1)))
    return {
        name: (round(float(d), 4), round(float(b), 4))
        for name, d, b in zip(FLOORS, difference_K, bound_K, strict=True)
        if d > b
    }


@pytest.fixture(scope="module")
def photos(request: pytest.FixtureRequest) -> np.ndarray:
    if reference() is None:
        pytest.skip("imagecorruptions is not installed: pip install --no-deps imagecorruptions==1.1.2")
    own = photographs(None, 3).numpy()
    try:
        return np.concatenate([own, photographs(request.getfixturevalue("photos_dir"), 9).numpy()])
    except pytest.skip.Exception:
        return own


ALL_SEVERITIES = [pytest.param(s, marks=[] if s == 3 else pytest.mark.slow) for s in range(1, 6)]


@pytest.mark.parametrize("severity", ALL_SEVERITIES)
@pytest.mark.parametrize("kind", [*TRAINING_KINDS, *HELD_OUT_KINDS])
def test_photographs_look_as_under_the_reference(photos: np.ndarray, kind: str, severity: int) -> None:
    if kind == "frost" and not frost.found():
        pytest.skip("frost cannot run here")
    if kind == "glass_blur" and not has_numba():
        pytest.skip("numba is not installed: the reference's glass blur takes half a second a picture")
    some = photos[:6] if severity == 3 else photos
    seeds = 2 if kind in FIELDS else 1
    want = gather(theirs, some, kind, severity, seeds)
    got = gather(ours, some, kind, severity, seeds)
    assert disagreements(got, want) == {}
    if severity == 3 and kind in ("gaussian_noise", "motion_blur", "snow", "fog", "elastic_transform"):
        milder = gather(ours, some, kind, 1, seeds)
        assert disagreements(milder, want), f"{kind} at severity 1 passes for severity 3"
