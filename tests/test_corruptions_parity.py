"""apply against PyPI imagecorruptions 1.1.2, pixel by pixel, with the reference's own seeded draws.

The draws are injected by benchmarks/parity.py, which also makes the table of docs/corruptions.md.
"""

# ruff: noqa: NPY002 - the reference draws from NumPy's global generator

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.corruptions import HELD_OUT_KINDS, TRAINING_KINDS, available_kinds, frost

pytest.importorskip("cv2")
pytest.importorskip("skimage")

from benchmarks.corruptions import photographs
from benchmarks.parity import differences
from benchmarks.reference import glass_blur_by_numba, reference

# Largest and mean absolute difference in grey levels, over a set of photographs.
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


@pytest.fixture(scope="module")
def imagecorruptions() -> Any:
    """imagecorruptions.corruptions, made to run on current libraries without changing the package."""
    module = reference()
    if module is None:
        pytest.skip("imagecorruptions is not installed: pip install --no-deps imagecorruptions==1.1.2")
    return module


@pytest.fixture(scope="module", params=[6, pytest.param(30, marks=pytest.mark.slow)], ids="photos{}".format)
def photos(request: pytest.FixtureRequest) -> np.ndarray:
    """224 x 224 photographs: three of scikit-image's own, and ImageNet's where they are there."""
    own = photographs(None, 3).numpy()
    try:
        return np.concatenate(
            [own, photographs(request.getfixturevalue("photos_dir"), request.param).numpy()]
        )
    except pytest.skip.Exception:
        return own


@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("kind", [*TRAINING_KINDS, *HELD_OUT_KINDS])
def test_apply_equals_imagecorruptions(
    imagecorruptions: Any, photos: np.ndarray, kind: str, severity: int
) -> None:
    if kind not in available_kinds() or (kind == "frost" and not frost.found()):
        pytest.skip(f"{kind} cannot run here")
    largest, mean = differences(kind, severity, photos)
    bound = BOUNDS.get(kind, DEFAULT_BOUND)
    assert largest <= bound[0], f"{kind} {severity}: {largest} levels apart (mean {mean:.5f})"
    assert mean <= bound[1], f"{kind} {severity}: {mean:.5f} levels apart on average"


@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
def test_numba_runs_the_packages_own_glass_blur(
    imagecorruptions: Any, photos: np.ndarray, severity: int
) -> None:
    pytest.importorskip("numba", reason="numba is not installed")
    picture = Image.fromarray(photos[0][:40, :61])
    np.random.seed(severity)
    want = imagecorruptions.glass_blur(picture, severity)
    np.random.seed(severity)
    assert np.array_equal(glass_blur_by_numba(picture, severity), want)
