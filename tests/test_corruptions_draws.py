"""draw by its distribution: against the reference's own field statistics, and against theory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import data_root

from pipeline.corruptions import apply, corrupt, draw, frost

scipy_stats = pytest.importorskip("scipy.stats")

KEYS = range(100, 124)
SIDE = 224


@pytest.fixture(scope="module")
def field_stats() -> dict[str, dict[str, dict[str, float]]]:
    """Statistics of imagecorruptions' fields over many seeds; skips where the file is absent."""
    root = data_root()
    path = root / "oracles" / "field_stats.json" if root else None
    if path is None or not path.is_file():
        pytest.skip("oracles/field_stats.json is not there: set VQSA_DATA to the folder that holds it")
    content: dict[str, dict[str, dict[str, float]]] = json.loads(path.read_text())
    return content


def compare(ours: dict[str, list[float]], reference: dict[str, dict[str, float]], what: str) -> None:
    """Means agree within 4 standard errors and 1 %."""
    for name, values in ours.items():
        want = reference[name]
        error = abs(np.mean(values) - want["mean"])
        bound = 4 * want["sd"] * np.sqrt(1 / len(values) + 1 / want["n"]) + 0.01 * abs(want["mean"])
        assert error <= bound, (
            f"{what} {name}: {np.mean(values):.4f}, reference {want['mean']:.4f}, bound {bound:.4f}"
        )


def lag(field_HW: np.ndarray, pixels: int, axis: int) -> float:
    """Correlation of a field with itself shifted along an axis."""
    moved = np.moveaxis(field_HW, axis, 0)
    return float(np.corrcoef(moved[pixels:].ravel(), moved[:-pixels].ravel())[0, 1])


def gather(kind: str, severity: int, name: str, measure: Any) -> dict[str, list[float]]:
    """Measure one field over KEYS."""
    out: dict[str, list[float]] = {}
    for key in KEYS:
        field = draw(kind, severity, key, SIDE, SIDE, flavour="bethge")[name].numpy()
        for quantity, value in measure(field).items():
            out.setdefault(quantity, []).append(float(value))
    return out


@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
def test_snow_layer(field_stats: Any, severity: int) -> None:
    def measure(field: np.ndarray) -> dict[str, float]:
        f = field / 255.0
        return {
            "mean": f.mean(),
            "std": f.std(),
            "frac_zero": (f == 0).mean(),
            "p99": np.percentile(f, 99),
            "lag1_x": lag(f, 1, 1),
            "lag1_y": lag(f, 1, 0),
            "lag4_x": lag(f, 4, 1),
        }

    compare(
        gather("snow", severity, "layer_HW", measure),
        field_stats[f"snow_layer_{severity}"],
        f"snow {severity}",
    )


@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
def test_spatter_mask(field_stats: Any, severity: int) -> None:
    def measure(f: np.ndarray) -> dict[str, float]:
        return {
            "mean": f.mean(),
            "std": f.std(),
            "frac_pos": (f > 0).mean(),
            "frac_gt_03": (f > 0.3).mean(),
            "max": f.max(),
            "lag1": lag(f, 1, 1),
        }

    compare(
        gather("spatter", severity, "mask_HW", measure),
        field_stats[f"spatter_mask_{severity}"],
        f"spatter {severity}",
    )


@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
def test_elastic_displacement(field_stats: Any, severity: int) -> None:
    def measure(f: np.ndarray) -> dict[str, float]:
        return {
            "std": f[0].std(),
            "max": np.abs(f[0]).max(),
            "lag1": lag(f[0], 1, 1),
            "lag4": lag(f[0], 4, 1),
        }

    ours = gather("elastic_transform", severity, "displacement_xy_2HW", measure)
    compare(ours, field_stats[f"elastic_dx_{severity}"], f"elastic {severity}")


@pytest.mark.parametrize(("severity", "decay"), [(1, "2.0"), (3, "1.7"), (4, "1.5"), (5, "1.4")])
def test_fog_plasma(field_stats: Any, severity: int, decay: str) -> None:
    def measure(f: np.ndarray) -> dict[str, float]:
        return {
            "mean": f.mean(),
            "std": f.std(),
            "p05": np.percentile(f, 5),
            "p95": np.percentile(f, 95),
            "lag1": lag(f, 1, 1),
            "lag32": lag(f, 32, 1),
        }

    ours = gather("fog", severity, "plasma_HW", measure)
    compare(ours, field_stats[f"plasma_decay_{decay}"], f"fog {severity}")


REACH = (1, 2, 2, 3, 4)


@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
def test_glass_map(field_stats: Any, severity: int) -> None:
    """Where each pixel comes from after all iterations, by the reference's own sequential copy."""
    reach = REACH[severity - 1]
    ours: dict[str, list[float]] = {}
    for key in list(KEYS)[:4]:
        offsets = draw("glass_blur", severity, key, SIDE, SIDE)["offset_xy_NHW2"].numpy()
        assert offsets.min() == -reach
        assert offsets.max() == reach - 1
        source = list(range(SIDE * SIDE))
        for flat in (offsets[..., 1].astype(int) * SIDE + offsets[..., 0]).reshape(len(offsets), -1).tolist():
            for h in range(SIDE - reach, reach, -1):
                for p in range(h * SIDE + SIDE - reach, h * SIDE + reach, -1):
                    source[p] = source[p + flat[p]]
        inside = (slice(reach + 1, SIDE - reach + 1), slice(reach + 1, SIDE - reach + 1))
        at = np.array(source).reshape(SIDE, SIDE)[inside]
        y, x = np.mgrid[0:SIDE, 0:SIDE]
        dy, dx = at // SIDE - y[inside], at % SIDE - x[inside]
        for name, value in {
            "dy_mean": dy.mean(),
            "dx_mean": dx.mean(),
            "dy_std": dy.std(),
            "dx_std": dx.std(),
            "stay_frac": ((dy == 0) & (dx == 0)).mean(),
        }.items():
            ours.setdefault(name, []).append(float(value))
    compare(ours, field_stats[f"glass_map_{severity}"], f"glass {severity}")


@pytest.mark.parametrize("kind", ["gaussian_noise", "speckle_noise"])
def test_normals_are_standard_and_independent(kind: str) -> None:
    f = draw(kind, 1, 5, 400, 400)["normal_HWC"].numpy().astype(np.float64)
    assert abs(f.mean()) < 0.006
    assert abs(f.std() - 1) < 0.006
    assert scipy_stats.kstest(f.ravel()[:100_000], "norm").pvalue > 1e-3
    assert abs(np.corrcoef(f[..., 0].ravel(), f[..., 1].ravel())[0, 1]) < 0.01
    assert abs(lag(f[..., 0], 1, 0)) < 0.01
    assert abs(lag(f[..., 0], 1, 1)) < 0.01
    assert np.abs(f).max() > 4.3


@pytest.mark.parametrize(("severity", "sigma"), [(1, 0.08), (3, 0.18)])
def test_gaussian_noise_on_grey(severity: int, sigma: float) -> None:
    """Truncated, not rounded: half a level lower on average."""
    grey = torch.full((300, 300, 3), 128, dtype=torch.uint8)
    out = corrupt(grey, "gaussian_noise", severity, 3).double()
    clipped = np.clip(128 + 255 * sigma * np.random.default_rng(0).normal(size=400_000), 0, 255)
    assert abs(out.mean().item() - (clipped.mean() - 0.5)) < 0.3
    assert abs(out.std().item() - clipped.std()) < 0.3


@pytest.mark.parametrize(("severity", "photons"), [(1, 60), (3, 12), (5, 3)])
@pytest.mark.parametrize("level", [1, 40, 128, 255])
def test_shot_noise_is_poisson(severity: int, photons: int, level: int) -> None:
    grey = torch.full((256, 256, 3), level, dtype=torch.uint8)
    out = corrupt(grey, "shot_noise", severity, 17).numpy().ravel()
    top = photons + 1
    count = np.arange(top + 1)
    shown = np.minimum(255, count / photons * 255).astype(np.uint8)
    probability = scipy_stats.poisson.pmf(count, level / 255 * photons)
    probability[-1] = 1 - probability[:-1].sum()
    probability[-2] += probability[-1]  # one count above white is white too
    observed = np.array([(out == v).sum() for v in shown[:-1]])
    expected = probability[:-1] * out.size
    assert observed.sum() == out.size, "a level that no count gives"
    frequent = expected > 10
    chi2 = ((observed - expected)[frequent] ** 2 / expected[frequent]).sum()
    assert scipy_stats.chi2.sf(chi2, max(frequent.sum() - 1, 1)) > 1e-4


def test_shot_noise_keeps_black() -> None:
    assert corrupt(torch.zeros(224, 224, 3, dtype=torch.uint8), "shot_noise", 5, 1).max() == 0


@pytest.mark.parametrize(("severity", "p"), [(1, 0.03), (5, 0.27)])
def test_impulse_noise_rates(severity: int, p: float) -> None:
    out = corrupt(torch.full((400, 400, 3), 100, dtype=torch.uint8), "impulse_noise", severity, 2)
    n = out.numel()
    for level in (0, 255):
        assert abs((out == level).sum().item() / n - p / 2) < 4 * np.sqrt(p / 2 / n)
    assert ((out == 0) | (out == 100) | (out == 255)).all()


def test_motion_angle_is_uniform() -> None:
    angles = [draw("motion_blur", 1, key, 32, 32)["angle_deg"].item() for key in range(4000)]
    assert scipy_stats.kstest(angles, "uniform", args=(-45, 90)).pvalue > 1e-3


@pytest.mark.parametrize(("flavour", "sizes"), [
    ("hendrycks", ((600, 900), (315, 560), (315, 560), (350, 527), (495, 660))),
    ("bethge", ((660, 991), (347, 616), (347, 616), (386, 580), (545, 727))),
])  # fmt: skip
def test_frost_choice(flavour: str, sizes: tuple[tuple[int, int], ...]) -> None:
    """Five names with equal chance, frost6 never; every position but the last."""
    if not frost.found():
        pytest.skip("the frost textures are not there: pip install imagecorruptions")
    drawn = [draw("frost", 1, key, SIDE, SIDE, flavour=flavour) for key in range(4000)]
    index = np.array([d["index"].item() for d in drawn])
    assert scipy_stats.chisquare(np.bincount(index, minlength=5)).pvalue > 1e-3
    assert index.max() == 4
    for i, (height, width) in enumerate(sizes):
        for name, free in (("row", height - SIDE), ("column", width - SIDE)):
            values = np.array([d[name].item() for d in drawn])[index == i]
            assert values.max() < free
            assert scipy_stats.kstest((values + 0.5) / free, "uniform").pvalue > 1e-3


def test_frost_second_and_third_are_the_same_picture() -> None:
    if not frost.found():
        pytest.skip("the frost textures are not there: pip install imagecorruptions")
    image = torch.zeros(64, 80, 3, dtype=torch.uint8)
    at = {"row": torch.tensor(5, dtype=torch.int32), "column": torch.tensor(7, dtype=torch.int32)}
    one, two = (
        apply(image, {"index": torch.tensor(i, dtype=torch.int32), **at}, "frost", 3, constants="imagenet")
        for i in (1, 2)
    )
    assert torch.equal(one, two)


def test_frost_textures_missing(tmp_path: Path) -> None:
    """In a process of its own: textures that were loaded stay."""
    code = (
        "import torch; from pipeline.corruptions import corrupt\n"
        "image = torch.zeros(2, 40, 40, 3, dtype=torch.uint8)\n"
        "corrupt(image, 'fog', 1, 0)\n"
        "try: corrupt(image, ['fog', 'frost'], 1, 0)\n"
        "except FileNotFoundError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "VQSA_FROST_DIR": str(tmp_path)},
        cwd=Path(__file__).resolve().parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"looked in VQSA_FROST_DIR={tmp_path}" in done.stdout
    assert "pip install --no-deps imagecorruptions" in done.stdout


def test_frost_scaling_equals_opencv() -> None:
    cv2 = pytest.importorskip("cv2")
    image = np.random.default_rng(1).integers(0, 256, (61, 90, 3), dtype=np.uint8)
    cubic = cv2.resize(image, (99, 68), interpolation=cv2.INTER_CUBIC)
    assert np.abs(frost.resize_cubic(image, 68, 99).astype(int) - cubic).max() <= 1
    assert (frost.resize_cubic(image, 68, 99) != cubic).mean() < 1e-3
    for factor in (0.3, 0.2):
        assert np.array_equal(
            frost.resize_linear(image, factor), cv2.resize(image, (0, 0), fx=factor, fy=factor)
        )


def test_noise_can_be_given() -> None:
    height, width = 40, 50
    noise = {"normal_HW": torch.zeros(height, width), "angle_deg": torch.tensor(-90.0)}
    layer = draw("snow", 1, 0, height, width, noise=noise)["layer_HW"]
    assert layer.max() == 0
    with pytest.raises(ValueError, match="normal_HW"):
        draw("snow", 1, 0, height, width, noise={"normal": torch.zeros(height, width)})
    with pytest.raises(ValueError, match="no raw noise"):
        draw("gaussian_noise", 1, 0, height, width, noise=noise)
    with pytest.raises(ValueError, match="fields of contrast"):
        apply(torch.zeros(40, 50, 3, dtype=torch.uint8), noise, "contrast", 1)
