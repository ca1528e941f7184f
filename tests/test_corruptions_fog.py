"""fog: the plasma and the mixing against float64 NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_corruptions_core import picture

from pipeline.corruptions import apply, draw

# Strength and decay of the noise per level.
CONSTANTS = {
    "imagenet": [(1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)],
    "tiny_imagenet": [(0.4, 3), (0.7, 3), (1, 2.5), (1.5, 2), (2, 1.75)],
    "cifar10": [(0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)],
}
SIZES = [(32, 32), (33, 47), (64, 64), (100, 37), (224, 224), (40, 260)]


def side_of(height: int, width: int) -> int:
    return 1 << (max(height, width, 32) - 1).bit_length()


def plasma(uniform: np.ndarray, side: int, decay: float) -> np.ndarray:
    """Diamond-square on a torus; `uniform` in [-1, 1), level by level, three n x n fields each."""
    a = np.zeros((side, side))
    step, w, at = side, 100.0, 0
    while step >= 2:
        half, n = step // 2, side // step
        u = uniform[at : at + 3 * n * n].reshape(3, n, n).astype(np.float64) * w * w
        at += 3 * n * n
        c = a[::step, ::step]
        right = np.roll(c, -1, 1)
        d = (c + np.roll(c, -1, 0) + right + np.roll(right, -1, 0)) / 4 + u[0]
        a[half::step, half::step] = d
        a[::step, half::step] = (d + np.roll(d, 1, 0) + c + right) / 4 + u[1]
        a[half::step, ::step] = (d + np.roll(d, 1, 1) + c + np.roll(c, -1, 0)) / 4 + u[2]
        step, w = half, w / decay
    assert at == len(uniform)
    a -= a.min()
    return a / a.max()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("constants", CONSTANTS)
def test_plasma(constants: str, size: tuple[int, int]) -> None:
    side = side_of(*size)
    for severity in range(1, 6):
        rng = np.random.default_rng(severity)
        uniform = rng.uniform(-1, 1, side * side - 1).astype(np.float32)
        noise = {"uniform": torch.from_numpy(uniform)}
        fields = draw("fog", severity, 0, *size, constants=constants, noise=noise)
        want = plasma(uniform, side, CONSTANTS[constants][severity - 1][1])[: size[0], : size[1]]
        np.testing.assert_allclose(fields["plasma_HW"].numpy(), want, atol=2e-6)


@pytest.mark.parametrize("constants", CONSTANTS)
@pytest.mark.parametrize("brightest", [255, 100, 0])
def test_mixing(constants: str, brightest: int) -> None:
    image = (picture(100, 37).to(torch.int32) * brightest // 255).to(torch.uint8)
    x = image.numpy() / 255.0
    for severity in range(1, 6):
        strength = CONSTANTS[constants][severity - 1][0]
        fields = draw("fog", severity, 5, 100, 37, constants=constants)
        m = x.max()
        haze = strength * fields["plasma_HW"].numpy().astype(np.float64)[:, :, None]
        want = np.uint8(np.clip((x + haze) * m / (m + strength), 0, 1) * 255)
        got = apply(image, fields, "fog", severity, constants=constants).numpy()
        difference = np.abs(got.astype(int) - want.astype(int))
        assert difference.max() <= 1
        assert difference.mean() <= 0.02


def test_largest_value_of_a_draw_is_one() -> None:
    """The smallest and the largest of the whole square are inside an image that fills it."""
    for key in range(5):
        p = draw("fog", 3, key, 64, 64, constants="imagenet")["plasma_HW"]
        assert p.min() == 0.0
        assert p.max() == 1.0
