"""apply against PyPI imagecorruptions 1.1.2, pixel by pixel, with the reference's own seeded draws.

The reference draws from NumPy's global generator. Each helper below seeds it, records the draws in
the reference's order, and hands them to our apply.
"""

# ruff: noqa: NPY002 - the reference draws from NumPy's global generator and needs np.float_

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.reference import reference as imagecorruptions
from pipeline.corruptions import HELD_OUT_KINDS, TRAINING_KINDS, apply, available_kinds, draw, frost
from pipeline.corruptions.fields import noise_parts

Fields = dict[str, torch.Tensor]

# Largest and mean absolute difference in grey levels, over a set of photographs (CORRUPTIONS 4a).
BOUNDS: dict[str, tuple[int, float]] = {
    "glass_blur": (2, 0.05),
    "frost": (1, 0.06),
    "defocus_blur": (1, 0.06),
    "brightness": (1, 0.10),
    "saturate": (1, 0.30),
    "pixelate": (0, 0.0),
    "jpeg_compression": (0, 0.0),
}
DEFAULT_BOUND = (1, 0.02)

# Six photographs keep the tests fast; docs/corruptions.md was made with VQSA_PARITY_PHOTOS=30.
PHOTOS = int(os.environ.get("VQSA_PARITY_PHOTOS", "6"))


@pytest.fixture(scope="module")
def reference() -> Any:
    """imagecorruptions.corruptions, made to run on current libraries without changing the package."""
    pytest.importorskip("cv2")
    pytest.importorskip("skimage")
    module = imagecorruptions()
    if module is None:
        pytest.skip("imagecorruptions is not installed: pip install --no-deps imagecorruptions==1.1.2")
    return module


@pytest.fixture(scope="module")
def photos(request: pytest.FixtureRequest) -> list[np.ndarray]:
    """224 x 224 photographs: three of scikit-image's own, and ImageNet's where they are there."""
    data = pytest.importorskip("skimage.data")
    images = [
        Image.fromarray(data.astronaut()),
        Image.fromarray(data.chelsea()),
        Image.fromarray(data.coffee()),
    ]
    try:
        folder: Path = request.getfixturevalue("photos_dir")
        images += [Image.open(p).convert("RGB") for p in sorted(folder.rglob("*.JPEG"))[:: 1000 // PHOTOS]]
    except pytest.skip.Exception:
        pass
    return [np.asarray(image.resize((224, 224), Image.Resampling.BILINEAR)) for image in images]


def normals(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.normal(size=shape)


def no_fields(x: np.ndarray, severity: int) -> Fields:
    return {}


def gaussian_fields(x: np.ndarray, severity: int) -> Fields:
    return {"normal_HWC": torch.from_numpy(normals(x.shape).astype(np.float32))}


SHOT = (60, 25, 12, 5, 3)
IMPULSE = (0.03, 0.06, 0.09, 0.17, 0.27)


def bits(u: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(u.astype(np.uint32).view(np.int32))


def shot_fields(x: np.ndarray, severity: int) -> Fields:
    """A word in the middle of the interval that inverts to the reference's count."""
    from scipy.stats import poisson

    rate = x / 255.0 * SHOT[severity - 1]
    count = np.random.poisson(rate)
    middle = (poisson.cdf(count - 1, rate) + poisson.cdf(count, rate)) / 2
    return {"uniform_bits_HWC": bits(np.clip(middle * 2**32, 0, 2**32 - 1))}


def impulse_fields(x: np.ndarray, severity: int) -> Fields:
    """The reference's two draws, as one word: below p replaced, in the lower half by white."""
    flip = np.random.random(x.shape) <= IMPULSE[severity - 1]
    salt = np.random.random(x.shape) <= 0.5
    p = IMPULSE[severity - 1] * 2**32
    return {"uniform_bits_HWC": bits(np.where(flip, np.where(salt, 0.25 * p, 0.75 * p), (p + 2**32) / 2))}


GLASS = ((1, 2), (2, 1), (2, 3), (3, 2), (4, 2))


def glass_fields(x: np.ndarray, severity: int) -> Fields:
    reach, iterations = GLASS[severity - 1]
    height, width = x.shape[:2]
    offsets = np.zeros((iterations, height, width, 2), np.int16)
    for n in range(iterations):
        for h in range(height - reach, reach, -1):
            for w in range(width - reach, reach, -1):
                offsets[n, h, w] = np.random.randint(-reach, reach, size=(2,))
    return {"offset_xy_NHW2": torch.from_numpy(offsets)}


def motion_fields(x: np.ndarray, severity: int) -> Fields:
    return {"angle_deg": torch.tensor(np.random.uniform(-45, 45), dtype=torch.float32)}


def shaped(kind: str, severity: int, x: np.ndarray, *parts: np.ndarray) -> Fields:
    height, width = x.shape[:2]
    words = sum(part.size for part in parts)
    names = [name for name, _, _ in noise_parts(kind, height, width, words)]
    noise = {n: torch.from_numpy(np.asarray(p, np.float32)) for n, p in zip(names, parts, strict=True)}
    return draw(kind, severity, 0, height, width, flavour="bethge", noise=noise)


def snow_fields(x: np.ndarray, severity: int) -> Fields:
    layer = normals(x.shape[:2])
    return shaped("snow", severity, x, layer, np.array(np.random.uniform(-135, -45)))


def frost_fields(x: np.ndarray, severity: int) -> Fields:
    sizes = ((660, 991), (347, 616), (347, 616), (386, 580), (545, 727))
    index = np.random.randint(5)
    row = np.random.randint(0, sizes[index][0] - x.shape[0])
    column = np.random.randint(0, sizes[index][1] - x.shape[1])
    return {
        n: torch.tensor(v, dtype=torch.int32) for n, v in (("index", index), ("row", row), ("column", column))
    }


def fog_fields(x: np.ndarray, severity: int) -> Fields:
    levels = [np.random.uniform(-1, 1, 3 * n * n) for n in (1, 2, 4, 8, 16, 32, 64, 128)]
    return shaped("fog", severity, x, np.concatenate(levels))


def elastic_fields(x: np.ndarray, severity: int) -> Fields:
    dx, dy = np.random.uniform(-1, 1, x.shape[:2]), np.random.uniform(-1, 1, x.shape[:2])
    return shaped("elastic_transform", severity, x, np.stack([dx, dy]), np.zeros((3, 2)))


def spatter_fields(x: np.ndarray, severity: int) -> Fields:
    return shaped("spatter", severity, x, normals(x.shape[:2]))


FIELDS: dict[str, Callable[[np.ndarray, int], Fields]] = {
    "gaussian_noise": gaussian_fields,
    "speckle_noise": gaussian_fields,
    "shot_noise": shot_fields,
    "impulse_noise": impulse_fields,
    "glass_blur": glass_fields,
    "motion_blur": motion_fields,
    "snow": snow_fields,
    "frost": frost_fields,
    "fog": fog_fields,
    "elastic_transform": elastic_fields,
    "spatter": spatter_fields,
}


@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("kind", [*TRAINING_KINDS, *HELD_OUT_KINDS])
def test_apply_equals_imagecorruptions(
    reference: Any, photos: list[np.ndarray], kind: str, severity: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind not in available_kinds() or (kind == "frost" and not frost.found()):
        pytest.skip(f"{kind} cannot run here")
    if kind == "impulse_noise":
        # Current scikit-image draws from a fresh generator: give it NumPy's global one.
        monkeypatch.setattr(
            "skimage.util.noise.np.random.default_rng", lambda *_: np.random.mtrand._rand, raising=True
        )
    if kind == "spatter":
        # Its edges hang on whole levels of a smoothed layer: give both the same float32 noise.
        def single(size: Any, loc: float = 0.0, scale: float = 1.0) -> np.ndarray:
            return loc + scale * np.random.standard_normal(size).astype(np.float32).astype(np.float64)

        monkeypatch.setattr(np.random, "normal", single)
    largest, means = 0, []
    for i, x in enumerate(photos[:2] if kind == "glass_blur" else photos):
        seed = 1000 * severity + i
        np.random.seed(seed)
        want = np.uint8(getattr(reference, kind)(Image.fromarray(x), severity))
        np.random.seed(seed)
        fields = FIELDS.get(kind, no_fields)(x, severity)
        got = apply(torch.from_numpy(x.copy()), fields, kind, severity, flavour="bethge").numpy()
        difference = np.abs(got.astype(int) - want.astype(int))
        largest = max(largest, int(difference.max()))
        means.append(float(difference.mean()))
    print(f"{kind} {severity}: max {largest}, mean {np.mean(means):.5f}")
    bound = BOUNDS.get(kind, DEFAULT_BOUND)
    assert largest <= bound[0], f"{kind} {severity}: {largest} levels apart (mean {np.mean(means):.5f})"
    assert np.mean(means) <= bound[1], f"{kind} {severity}: {np.mean(means):.5f} levels apart on average"
