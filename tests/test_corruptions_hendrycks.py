"""Where the hendrycks flavour differs, against independent code; and Pillow at odd sizes and all sets."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from test_corruptions_core import picture

from pipeline.corruptions import apply, corrupt, draw, frost, jpeg_pass

ODD_SIZES = [(32, 32), (33, 47), (64, 64), (41, 331), (1000, 37), (224, 224), (49, 48)]


def noisy(height: int, width: int) -> torch.Tensor:
    return torch.from_numpy(
        np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


def through_pillow(image: torch.Tensor, quality: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image.numpy()).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


@pytest.mark.parametrize("size", ODD_SIZES)
def test_jpeg_equals_pillow_bit_for_bit(size: tuple[int, int]) -> None:
    for image in (picture(*size), noisy(*size)):
        for quality in (1, 7, 10, 25, 50, 85, 95, 100):
            assert np.array_equal(jpeg_pass(image, quality).numpy(), through_pillow(image, quality)), quality


def test_jpeg_pass_refuses_bad_quality() -> None:
    for quality in (0, 101, 85.0):
        with pytest.raises(ValueError, match=r"1\.\.100"):
            jpeg_pass(picture(32, 32), quality)  # type: ignore[arg-type]


PIXELATE = {
    "imagenet": (0.6, 0.5, 0.4, 0.3, 0.25),
    "tiny_imagenet": (0.9, 0.8, 0.7, 0.6, 0.5),
    "cifar10": (0.95, 0.9, 0.85, 0.75, 0.65),
}


@pytest.mark.parametrize("constants", list(PIXELATE))
@pytest.mark.parametrize("size", ODD_SIZES)
def test_pixelate_equals_pillow(size: tuple[int, int], constants: str) -> None:
    """Bit for bit, but one level where Pillow takes rows before columns, in tall images."""
    image = noisy(*size)
    height, width = size
    for severity, c in enumerate(PIXELATE[constants], start=1):
        for flavour, up in (("hendrycks", Image.Resampling.BOX), ("bethge", Image.Resampling.NEAREST)):
            small = Image.fromarray(image.numpy()).resize(
                (int(width * c), int(height * c)), Image.Resampling.BOX
            )
            want = np.asarray(small.resize((width, height), up)).astype(int)
            got = corrupt(image, "pixelate", severity, 0, flavour=flavour, constants=constants).numpy()
            assert np.abs(got - want).max() <= (1 if height > 4 * width else 0)


ELASTIC = {
    "imagenet": (
        (488, 170.8, 24.4),
        (488, 19.52, 48.8),
        (12.2, 2.44, 4.88),
        (17.08, 2.44, 4.88),
        (29.28, 2.44, 4.88),
    ),
    "tiny_imagenet": (
        (0, 0, 5.12),
        (3.2, 19.2, 3.84),
        (6.4, 5.12, 3.84),
        (6.4, 1.92, 1.92),
        (10.24, 1.92, 1.28),
    ),
}


@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("side", "constants"), [(224, "imagenet"), (64, "tiny_imagenet")])
def test_elastic_transform(side: int, constants: str, severity: int) -> None:
    """Affine map, smoothing and sampling by OpenCV and SciPy, from the same raw noise."""
    cv2 = pytest.importorskip("cv2")
    ndimage = pytest.importorskip("scipy.ndimage")
    if int(cv2.__version__.split(".")[0]) < 5:
        pytest.skip("OpenCV before 5 rounds warpAffine's positions to 1/32 pixel")
    alpha, sigma, reach = ELASTIC[constants][severity - 1]
    rng = np.random.default_rng(severity)
    image = picture(side, side)
    x = image.numpy().astype(np.float32) / 255
    moves, planes = rng.uniform(-1, 1, (3, 2)), rng.uniform(-1, 1, (2, side, side))
    centre, third = side // 2, side // 3
    points = np.array(
        [
            [centre + third, centre + third],
            [centre + third, centre - third],
            [centre - third, centre - third],
        ],
        np.float32,
    )
    matrix = cv2.getAffineTransform(points, points + (reach * moves).astype(np.float32))
    warped = cv2.warpAffine(x, matrix, (side, side), borderMode=cv2.BORDER_REFLECT_101)
    if sigma:
        planes_smooth = [
            ndimage.gaussian_filter(p, sigma, mode="reflect", truncate=3) * alpha for p in planes
        ]
    else:
        planes_smooth = [0 * p for p in planes]
    rows, columns = np.mgrid[0:side, 0:side]
    at = [rows + planes_smooth[1], columns + planes_smooth[0]]
    want = np.stack(
        [ndimage.map_coordinates(warped[..., c], at, order=1, mode="reflect") for c in range(3)], axis=-1
    )
    noise = {
        "uniform_xy_2HW": torch.tensor(planes, dtype=torch.float32),
        "affine_uniform_32": torch.tensor(moves, dtype=torch.float32),
    }
    fields = draw("elastic_transform", severity, 0, side, side, constants=constants, noise=noise)
    got = apply(image, fields, "elastic_transform", severity, constants=constants).numpy()
    difference = np.abs(got.astype(int) - np.uint8(np.clip(want, 0, 1) * 255))
    assert difference.max() <= 1
    # At 64 px the flat areas are most of the picture, and whole levels truncate either way.
    assert difference.mean() <= (0.02 if side == 224 else 0.05)


SNOW = (
    (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
    (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
    (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
    (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
    (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
)


@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
def test_snow(severity: int) -> None:
    """Trimmed and quantised before the blur, truncated after it."""
    ndimage = pytest.importorskip("scipy.ndimage")
    side = 224
    mean, sd, zoom, threshold, radius, sigma, mix = SNOW[severity - 1]
    rng = np.random.default_rng(severity)
    normal, angle = (
        rng.normal(size=(side, side)).astype(np.float32),
        float(np.float32(rng.uniform(-135, -45))),
    )
    crop = math.ceil(side / zoom)
    start = (side - crop) // 2
    layer = mean + sd * normal.astype(np.float64)
    layer = ndimage.zoom(layer[start : start + crop, start : start + crop], (zoom, zoom), order=1)
    trim = (layer.shape[0] - side) // 2
    layer = layer[trim : trim + side, trim : trim + side]
    layer[layer < threshold] = 0
    layer = np.uint8(np.clip(layer, 0, 1) * 255)
    taps = np.exp(-(np.arange(2 * radius + 1) ** 2) / (2 * sigma**2))
    blurred = np.zeros((side, side))
    for i, w in enumerate(taps / taps.sum()):
        dy = math.ceil(i * math.sin(math.radians(angle)) - 0.5)
        dx = math.ceil(i * math.cos(math.radians(angle)) - 0.5)
        rows, columns = (np.clip(np.arange(side) + d, 0, side - 1) for d in (dy, dx))
        blurred += w * layer[np.ix_(rows, columns)]
    noise = {"normal_HW": torch.from_numpy(normal), "angle_deg": torch.tensor(angle)}
    fields = draw("snow", severity, 0, side, side, noise=noise)
    ours = fields["layer_HW"].numpy().astype(int)
    assert np.abs(ours - np.uint8(blurred)).max() <= 1
    assert np.abs(ours - np.uint8(blurred)).mean() <= 0.02
    image = picture(side, side)
    x, flakes = image.numpy() / 255.0, ours[..., None] / 255.0
    grey = (x @ np.array([0.299, 0.587, 0.114]))[..., None] * 1.5 + 0.5
    want = mix * x + (1 - mix) * np.maximum(x, grey) + flakes + np.rot90(flakes, 2)
    got = apply(image, fields, "snow", severity).numpy()
    assert np.abs(got - np.uint8(np.clip(want, 0, 1) * 255).astype(int)).max() <= 1


def test_flavours_differ_where_they_should() -> None:
    image = picture(224, 224)
    differ = {"snow", "elastic_transform"} | ({"frost"} if frost.found() else set())
    for kind in ("gaussian_noise", "glass_blur", "motion_blur", "fog", "contrast", *differ):
        same = torch.equal(
            corrupt(image, kind, 3, 4, flavour="hendrycks"), corrupt(image, kind, 3, 4, flavour="bethge")
        )
        assert same != (kind in differ), kind


@pytest.mark.parametrize(
    ("side", "constants"), [(64, "tiny_imagenet"), (32, "cifar10"), (63, "imagenet"), (224, "imagenet")]
)
def test_auto_takes_the_set_of_the_size(side: int, constants: str) -> None:
    image = picture(side, side)
    for kind in ("gaussian_noise", "contrast", "jpeg_compression", "fog"):
        want = corrupt(image, kind, 2, 4, constants=constants)
        assert torch.equal(corrupt(image, kind, 2, 4), want)
        if constants != "imagenet" and kind != "contrast":
            assert not torch.equal(want, corrupt(image, kind, 2, 4, constants="imagenet"))


@pytest.mark.skipif(
    not frost.found(), reason="the frost textures are not there: pip install imagecorruptions"
)
def test_frost_covers_images_larger_than_its_textures() -> None:
    image = torch.full((700, 1000, 3), 10, dtype=torch.uint8)
    for flavour in ("hendrycks", "bethge"):
        out = corrupt(image, "frost", 2, 3, flavour=flavour)
        assert out.float().std() > 5
        assert (out >= 8).all()
