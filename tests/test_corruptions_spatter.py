"""spatter: the mask against OpenCV step by step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_corruptions_core import picture

from pipeline.corruptions import apply, draw

cv2 = pytest.importorskip("cv2")
if int(cv2.__version__.split(".")[0]) < 5:
    pytest.skip("OpenCV before 5 rounds the chamfer steps to 1/65536", allow_module_level=True)
gaussian_filter = pytest.importorskip("scipy.ndimage").gaussian_filter

# Mean, spread, sigma and threshold of the layer; strength of water or smoothing of mud; mud.
CONSTANTS = {
    "imagenet": [
        (0.65, 0.3, 4, 0.69, 0.6, 0),
        (0.65, 0.3, 3, 0.68, 0.6, 0),
        (0.65, 0.3, 2, 0.68, 0.5, 0),
        (0.65, 0.3, 1, 0.65, 1.5, 1),
        (0.67, 0.4, 1, 0.65, 1.5, 1),
    ],
    "tiny_imagenet": [
        (0.62, 0.1, 0.7, 0.7, 0.6, 0),
        (0.65, 0.1, 0.8, 0.7, 0.6, 0),
        (0.65, 0.3, 1, 0.69, 0.6, 0),
        (0.65, 0.1, 0.7, 0.68, 0.6, 1),
        (0.65, 0.1, 0.5, 0.67, 0.6, 1),
    ],
    "cifar10": [
        (0.62, 0.1, 0.7, 0.7, 0.5, 0),
        (0.65, 0.1, 0.8, 0.7, 0.5, 0),
        (0.65, 0.3, 1, 0.69, 0.5, 0),
        (0.65, 0.1, 0.7, 0.69, 0.6, 1),
        (0.65, 0.1, 0.5, 0.68, 0.6, 1),
    ],
}
SIZES = [(32, 32), (33, 47), (64, 64), (100, 37), (224, 224)]


def mask(normal_HW: np.ndarray, c: tuple[float, ...]) -> np.ndarray:
    layer = gaussian_filter(c[0] + c[1] * normal_HW.astype(np.float64), c[2], mode="nearest")
    if c[5]:
        splash = gaussian_filter((layer > c[3]).astype(np.float32), c[4], mode="nearest")
        return np.where(splash < np.float32(0.8), 0, splash)
    layer[layer < c[3]] = 0
    drops = (layer * 255).astype(np.int64).astype(np.uint8)
    distance = cv2.distanceTransform(255 - cv2.Canny(drops, 50, 150), cv2.DIST_L2, 5)
    depth = cv2.blur(np.minimum(distance, 20).astype(np.float32), (3, 3)).astype(np.uint8)
    emboss = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]], np.float32)
    relief = cv2.blur(cv2.filter2D(cv2.equalizeHist(depth), cv2.CV_8U, emboss), (3, 3))
    shade = drops * relief.astype(np.float32)
    scaled: np.ndarray = shade / max(shade.max(), 1) * np.float32(c[4])
    return scaled


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("constants", CONSTANTS)
def test_mask_equals_opencv(constants: str, size: tuple[int, int]) -> None:
    for severity in range(1, 6):
        for seed in range(4):
            rng = np.random.default_rng([severity, seed])
            normal = rng.normal(size=size).astype(np.float32)
            noise = {"normal_HW": torch.from_numpy(normal)}
            got = draw("spatter", severity, 0, *size, constants=constants, noise=noise)["mask_HW"].numpy()
            want = mask(normal, CONSTANTS[constants][severity - 1])
            what = f"severity {severity}, seed {seed}"
            np.testing.assert_allclose(got, want, atol=1e-6, err_msg=what)


@pytest.mark.parametrize("severity", [1, 3, 4, 5])
def test_mixing(severity: int) -> None:
    image = picture(100, 37)
    fields = draw("spatter", severity, 11, 100, 37)
    m = fields["mask_HW"].numpy().astype(np.float64)[:, :, None]
    x = image.numpy() / 255.0
    mud = severity >= 4
    colour = np.array((63, 42, 20) if mud else (175, 238, 238)) / 255.0
    want = np.uint8(np.clip(x * (1 - m if mud else 1) + m * colour, 0, 1) * 255)
    difference = np.abs(apply(image, fields, "spatter", severity).numpy().astype(int) - want.astype(int))
    assert difference.max() <= 1
    assert difference.mean() <= 0.02
    assert m.max() > 0.3


def test_no_drop_leaves_the_image_alone() -> None:
    """The reference divides 0 by 0 here, and its whole image turns black."""
    noise = {"normal_HW": torch.full((40, 50), -1.0)}
    fields = draw("spatter", 1, 0, 40, 50, noise=noise)
    assert not fields["mask_HW"].any()
    image = picture(40, 50)
    assert torch.equal(apply(image, fields, "spatter", 1), image)
