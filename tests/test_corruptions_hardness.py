"""The hardness benchmark: what it writes, goes on from, and judges."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import write_pictures
from PIL import Image

pytest.importorskip("cv2")
pytest.importorskip("skimage")

from benchmarks import hardness
from benchmarks.reference import reference
from pipeline.corruptions import HELD_OUT_KINDS, TRAINING_KINDS

PHOTOS = 1000


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three photographs, and two cells instead of 95."""
    if reference() is None:
        pytest.skip("imagecorruptions is not installed: pip install --no-deps imagecorruptions==1.1.2")
    write_pictures(tmp_path / "photos", 3, side=80)
    for path in (tmp_path / "photos").rglob("*.jpg"):
        path.rename(path.with_suffix(".JPEG"))
    monkeypatch.setattr(hardness, "CELLS", [("contrast", 2), ("gaussian_noise", 3)])
    return tmp_path / "photos"


def test_writes_imagenet_c_layout_and_goes_on(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = hardness.Write(photos, out)
    hardness.write_share(options, 0)
    files = sorted(str(p.relative_to(out)) for p in out.rglob("*.*"))
    assert len(files) == 3 * (2 + 1)
    assert "gaussian_noise/3/class0/0000.png" in files
    crop = hardness.centre_crop(photos / "class0" / "0000.JPEG")
    assert crop.shape == (224, 224, 3)
    first = out / "gaussian_noise" / "3" / "class0" / "0000.png"
    want = hardness.reference_image(crop, "gaussian_noise", 3, [0, 1])
    assert np.array_equal(np.asarray(Image.open(first)), want)
    other = out / "gaussian_noise" / "3" / "class1" / "0001.png"
    before = other.stat().st_mtime_ns
    first.unlink()
    hardness.write_share(options, 0)
    assert np.array_equal(np.asarray(Image.open(first)), want)
    assert other.stat().st_mtime_ns == before


def test_no_photographs(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"wanted photographs as <wnid>/<name>\.JPEG"):
        hardness.photo_paths(tmp_path)


def test_missing_file_of_the_reference(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="run `python benchmarks/hardness\\.py write`"):
        hardness.reference_batch(tmp_path, hardness.photo_paths(photos))


def test_scores_are_kept_for_the_same_photographs(tmp_path: Path) -> None:
    scores = hardness.Scores(tmp_path / "scores.npz", [Path("a.JPEG"), Path("b.JPEG")])
    scores.add("clean", np.array([True, False]))
    again = hardness.Scores(tmp_path / "scores.npz", [Path("a.JPEG"), Path("b.JPEG")])
    assert again.right["clean"].tolist() == [True, False]
    with pytest.raises(ValueError, match="other photographs"):
        hardness.Scores(tmp_path / "scores.npz", [Path("a.JPEG")])


def right_answers(lost: dict[str, int]) -> dict[str, np.ndarray]:
    """Half right everywhere; on our side `lost` fewer of 1,000 photographs, at every severity of a kind."""
    half = np.arange(PHOTOS) % 2 == 0
    right = {"clean": half}
    for kind in (*TRAINING_KINDS, *HELD_OUT_KINDS):
        for severity in range(1, 6):
            right[f"reference {kind} {severity}"] = half
            right[f"ours {kind} {severity}"] = half & (np.arange(PHOTOS) >= 2 * lost.get(kind, 0))
    return right


@pytest.mark.parametrize(
    ("lost", "passed"),
    [
        ({}, True),
        ({"fog": 20}, True),
        ({"fog": 21}, False),
        ({"saturate": 21}, False),
        (dict.fromkeys(TRAINING_KINDS, 5), True),
        (dict.fromkeys(TRAINING_KINDS, 6), False),
        (dict.fromkeys(HELD_OUT_KINDS, 20), True),
    ],
)
def test_verdict(lost: dict[str, int], passed: bool) -> None:
    """Two points for a kind, half a point for the mean of the 15."""
    result = hardness.summary(right_answers(lost))
    assert result["passed"] == passed
    assert ("all within bounds" in hardness.report(result)) == passed
    for kind, photographs in lost.items():
        assert result["kinds"][kind]["difference_points"] == pytest.approx(-photographs / 10)
