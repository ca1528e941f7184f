"""frost: every texture, crop and share against OpenCV's scaling, both flavours and all constant sets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_corruptions_core import picture

from pipeline.corruptions import apply, frost

cv2 = pytest.importorskip("cv2")

# Shares of the image and of the texture; the factor of the textures' size.
CONSTANTS = {
    "imagenet": [(1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)],
    "tiny_imagenet": [(1, 0.3), (0.9, 0.4), (0.8, 0.45), (0.75, 0.5), (0.7, 0.55)],
    "cifar10": [(1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)],
}
FACTOR = {"imagenet": 1.0, "tiny_imagenet": 0.3, "cifar10": 0.2}
NAMES = ("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg")


@pytest.fixture(scope="module")
def folder() -> Path:
    found = frost.find_folder()
    if found is None:
        pytest.skip("the frost textures are not there: pip install --no-deps imagecorruptions")
    return found


def texture(folder: Path, index: int) -> np.ndarray:
    with Image.open(folder / NAMES[index]) as image:
        return np.asarray(image.convert("RGB"))


def scaled(rgb: np.ndarray, flavour: str, constants: str, size: tuple[int, int]) -> np.ndarray:
    """The texture as the reference crops it."""
    if flavour == "bethge":
        cover = max(1.0, size[0] / rgb.shape[0], size[1] / rgb.shape[1]) * 1.1
        height, width = (int(np.ceil(side * cover)) for side in rgb.shape[:2])
        return np.asarray(cv2.resize(rgb, (width, height), interpolation=cv2.INTER_CUBIC))
    factor = FACTOR[constants]
    return rgb if factor == 1 else np.asarray(cv2.resize(rgb, (0, 0), fx=factor, fy=factor))


def check(
    folder: Path, flavour: str, constants: str, severity: int, size: tuple[int, int], bound: float
) -> None:
    image = picture(*size)
    for index in range(5):
        big = scaled(texture(folder, index), flavour, constants, size)
        rows, columns = big.shape[0] - size[0], big.shape[1] - size[1]
        rng = np.random.default_rng([index, severity])
        # The last crop that can be drawn, and another.
        for row, column in ((rows - 1, columns - 1), (rng.integers(rows), rng.integers(columns))):
            values = {"index": index, "row": row, "column": column}
            fields = {k: torch.tensor(int(v), dtype=torch.int32) for k, v in values.items()}
            got = apply(image, fields, "frost", severity, flavour=flavour, constants=constants).numpy()
            crop = big[row : row + size[0], column : column + size[1]]
            a, b = CONSTANTS[constants][severity - 1]
            want = np.uint8(np.clip(a * image.numpy() + b * crop, 0, 255))
            difference = np.abs(got.astype(int) - want.astype(int))
            assert difference.max() <= 1, f"{NAMES[index]} at {row}, {column}"
            assert difference.mean() <= bound


@pytest.mark.parametrize("severity", range(1, 6))
@pytest.mark.parametrize(
    ("flavour", "constants", "size"),
    [
        ("bethge", "imagenet", (224, 224)),
        ("hendrycks", "imagenet", (224, 224)),
        ("hendrycks", "imagenet", (100, 37)),
        ("hendrycks", "tiny_imagenet", (64, 64)),
        ("hendrycks", "cifar10", (32, 32)),
        ("hendrycks", "cifar10", (33, 47)),
    ],
)
def test_crop_and_mixing(
    folder: Path, flavour: str, constants: str, severity: int, size: tuple[int, int]
) -> None:
    check(folder, flavour, constants, severity, size, 0.06)


@pytest.mark.parametrize("size", [(40, 700), (400, 300), (640, 910)])
def test_bethge_scales_a_texture_to_cover_a_large_image(folder: Path, size: tuple[int, int]) -> None:
    check(folder, "bethge", "imagenet", 3, size, 0.06)
