"""elastic_transform: both forms against float64 NumPy and SciPy, from the same uniform draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.corruptions import apply, draw

ndimage = pytest.importorskip("scipy.ndimage")

# Strength, sigma and reach of the affine map's points, in pixels (hendrycks).
CONSTANTS = {
    "imagenet": [
        (488, 170.8, 24.4),
        (488, 19.52, 48.8),
        (12.2, 2.44, 4.88),
        (17.08, 2.44, 4.88),
        (29.28, 2.44, 4.88),
    ],
    "tiny_imagenet": [
        (64 * a, 64 * b, 64 * c)
        for a, b, c in [
            (0, 0, 0.08),
            (0.05, 0.3, 0.06),
            (0.1, 0.08, 0.06),
            (0.1, 0.03, 0.03),
            (0.16, 0.03, 0.02),
        ]
    ],
    "cifar10": [
        (32 * a, 32 * b, 32 * c)
        for a, b, c in [
            (0, 0, 0.08),
            (0.05, 0.2, 0.07),
            (0.08, 0.06, 0.06),
            (0.1, 0.04, 0.05),
            (0.1, 0.03, 0.03),
        ]
    ],
}
BETHGE_ALPHA = (12.5, 16.25, 21.25, 25.0, 30.0)
SIZES = [(32, 32), (33, 47), (64, 64), (100, 37)]


def scene(height: int, width: int) -> torch.Tensor:
    """Smooth and without flat areas, whose last bit a float32 mean may truncate either way."""
    colours = np.random.default_rng(height).uniform(-300, 555, (height, width, 3))
    return torch.from_numpy(ndimage.gaussian_filter(colours, (1.5, 1.5, 0)).clip(1.5, 253.5).astype(np.uint8))


def noise(size: tuple[int, int], seed: int) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed)
    return {
        "affine_uniform_32": torch.from_numpy(rng.uniform(-1, 1, (3, 2)).astype(np.float32)),
        "uniform_xy_2HW": torch.from_numpy(rng.uniform(-1, 1, (2, *size)).astype(np.float32)),
    }


def smoothed(uniform_2HW: torch.Tensor, sigma: tuple[float, float]) -> np.ndarray:
    planes = uniform_2HW.numpy().astype(np.float64)
    return np.stack([ndimage.gaussian_filter(p, sigma, mode="reflect", truncate=3) for p in planes])


def moved_points(size: tuple[int, int]) -> np.ndarray:
    """The three reference points; rows and columns are swapped on purpose, as in the reference."""
    centre, reach = np.array([size[0] // 2, size[1] // 2], np.float64), min(size) // 3
    return np.array([centre + reach, [centre[0] + reach, centre[1] - reach], centre - reach])


def warped(x_HWC: np.ndarray, offset_32: np.ndarray) -> np.ndarray:
    """Move the points by the offsets and the image with them; bilinear, mirrored without the edge."""
    height, width = x_HWC.shape[:2]
    source = moved_points((height, width))
    target = (source + offset_32).astype(np.float32).astype(np.float64)
    # Output position -> input position: solve on the three pairs.
    inverse = np.linalg.solve(np.column_stack([target, np.ones(3)]), source).T
    column, row = np.meshgrid(np.arange(width), np.arange(height))
    at = np.tensordot(inverse, np.stack([column, row, np.ones_like(row)]), axes=1)
    return np.stack(
        [ndimage.map_coordinates(x_HWC[..., c], at[::-1], order=1, mode="mirror") for c in range(3)], -1
    )


def displaced(x_HWC: np.ndarray, xy_2HW: np.ndarray) -> np.ndarray:
    row, column = np.mgrid[: x_HWC.shape[0], : x_HWC.shape[1]]
    at = [row + xy_2HW[1], column + xy_2HW[0]]
    moved = [ndimage.map_coordinates(x_HWC[..., c], at, order=1, mode="reflect") for c in range(3)]
    return np.uint8(np.clip(np.stack(moved, -1), 0, 1) * 255)


def compare(got: torch.Tensor, want: np.ndarray) -> None:
    difference = np.abs(got.numpy().astype(int) - want.astype(int))
    assert difference.max() <= 1
    assert difference.mean() <= 0.02


def check_hendrycks(constants: str, severity: int, size: tuple[int, int]) -> None:
    alpha, sigma, reach = CONSTANTS[constants][severity - 1]
    raw = noise(size, severity)
    fields = draw(
        "elastic_transform", severity, 0, *size, flavour="hendrycks", constants=constants, noise=raw
    )
    xy = alpha * smoothed(raw["uniform_xy_2HW"], (sigma, sigma))
    np.testing.assert_allclose(fields["displacement_xy_2HW"].numpy(), xy, atol=2e-4)
    offset = reach * raw["affine_uniform_32"].numpy().astype(np.float64)
    np.testing.assert_allclose(fields["affine_points_32"].numpy(), offset, rtol=1e-6)
    image = scene(*size)
    want = displaced(warped(image.numpy() / 255.0, offset), xy)
    got = apply(image, fields, "elastic_transform", severity, flavour="hendrycks", constants=constants)
    compare(got, want)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("constants", CONSTANTS)
def test_hendrycks(constants: str, size: tuple[int, int]) -> None:
    for severity in range(1, 6):
        check_hendrycks(constants, severity, size)


@pytest.mark.parametrize("severity", range(1, 6))
def test_hendrycks_at_224(severity: int) -> None:
    """At severity 1 the filter is wider than the image, which mirrors itself several times."""
    check_hendrycks("imagenet", severity, (224, 224))


def test_affine_map_equals_opencv() -> None:
    cv2 = pytest.importorskip("cv2")
    if int(cv2.__version__.split(".")[0]) < 5:
        pytest.skip("OpenCV before 5 rounds positions to 1/32 pixel")
    x = scene(90, 70).numpy() / 255.0
    offset = np.random.default_rng(0).uniform(-12, 12, (3, 2))
    source = moved_points((90, 70)).astype(np.float32)
    matrix = cv2.getAffineTransform(source, (source + offset).astype(np.float32))
    want = cv2.warpAffine(x.astype(np.float32), matrix, (70, 90), borderMode=cv2.BORDER_REFLECT_101)
    np.testing.assert_allclose(warped(x, offset), want, atol=2e-3)


@pytest.mark.parametrize("size", [*SIZES, (224, 160)])
def test_bethge(size: tuple[int, int]) -> None:
    for severity in range(1, 6):
        raw = noise(size, severity)
        raw["affine_uniform_32"] = torch.zeros(3, 2)
        fields = draw("elastic_transform", severity, 0, *size, flavour="bethge", noise=raw)
        # Both amplitudes come from the height.
        scale = BETHGE_ALPHA[severity - 1] * 0.005 * size[0]
        xy = scale * smoothed(raw["uniform_xy_2HW"], (0.01 * size[0], 0.01 * size[1]))
        np.testing.assert_allclose(fields["displacement_xy_2HW"].numpy(), xy, atol=1e-5)
        image = scene(*size)
        got = apply(image, fields, "elastic_transform", severity, flavour="bethge")
        compare(got, displaced(image.numpy() / 255.0, xy))


@pytest.mark.parametrize("flavour", ["hendrycks", "bethge"])
def test_flat_areas_keep_their_level(flavour: str) -> None:
    """Interpolating equal values must not end just below them: truncation would take a whole level."""
    for level in (255, 130, 77):
        image = torch.full((64, 96, 3), level, dtype=torch.uint8)
        fields = draw("elastic_transform", 2, 3, 64, 96, flavour=flavour)
        assert torch.equal(apply(image, fields, "elastic_transform", 2, flavour=flavour), image)
