"""defocus_blur against OpenCV's filter with the reference's kernel, for every constant set."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from pipeline.corruptions import corrupt

CONSTANTS = {
    "imagenet": [(3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)],
    "tiny_imagenet": [(0.5, 0.6), (1, 0.1), (1.5, 0.1), (2.5, 0.01), (3, 0.1)],
    "cifar10": [(0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)],
}


def kernel(radius: float, alias: float) -> np.ndarray:
    reach, window = (8, 3) if radius <= 8 else (int(radius), 5)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disk = (x**2 + y**2 <= radius**2).astype(np.float64)
    return cv2.GaussianBlur(disk / disk.sum(), (window, window), sigmaX=alias)


@pytest.mark.parametrize("constants", CONSTANTS)
@pytest.mark.parametrize("severity", range(1, 6))
def test_defocus_equals_opencv(constants: str, severity: int) -> None:
    rng = np.random.default_rng(severity)
    smooth = cv2.GaussianBlur(rng.integers(0, 256, (75, 50, 3)).astype(np.float64), (0, 0), 1.5)
    image = np.clip((smooth - 128) * 4 + 128, 0, 255).astype(np.uint8)
    want = cv2.filter2D(image / 255, -1, kernel(*CONSTANTS[constants][severity - 1]))
    want = (np.clip(want, 0, 1) * 255).astype(np.uint8).astype(int)
    got = (
        corrupt(torch.from_numpy(image), "defocus_blur", severity, 0, constants=constants).numpy().astype(int)
    )
    difference = np.abs(got - want)
    assert difference.max() <= 1
    # The mean of 5 or 9 pixels is often a whole number, which the last bit truncates either way.
    assert difference.mean() <= (0.12 if CONSTANTS[constants][severity - 1][0] <= 1.5 else 0.06)
