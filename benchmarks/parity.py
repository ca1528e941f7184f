"""How many grey levels lie between our corruptions and the reference's, with the reference's own draws.

    python benchmarks/parity.py --photos imagenet-sample --count 30 --out benchmarks/results/parity.json

The reference, PyPI imagecorruptions 1.1.2, draws from NumPy's global generator. Each helper below draws the
same numbers in the same order and lays them out as the fields that our `apply` takes. Prints the table of
docs/corruptions.md; tests/test_corruptions_parity.py holds every cell to its bound.
"""

# ruff: noqa: NPY002 - the reference draws from NumPy's global generator

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

from benchmarks.corruptions import photographs
from benchmarks.environment import environment, write_result
from benchmarks.reference import glass_blur_by_numba, glass_offsets, reference
from pipeline.corruptions import HELD_OUT_KINDS, TRAINING_KINDS, apply, draw, frost
from pipeline.corruptions.fields import noise_parts

Fields = dict[str, torch.Tensor]

SHOT = (60, 25, 12, 5, 3)
IMPULSE = (0.03, 0.06, 0.09, 0.17, 0.27)
GLASS = ((1, 2), (2, 1), (2, 3), (3, 2), (4, 2))
FROST_SIZES = ((660, 991), (347, 616), (347, 616), (386, 580), (545, 727))


def no_fields(x: np.ndarray, severity: int) -> Fields:
    return {}


def gaussian_fields(x: np.ndarray, severity: int) -> Fields:
    return {"normal_HWC": torch.from_numpy(np.random.normal(size=x.shape).astype(np.float32))}


def bits(u: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(u.astype(np.uint32).view(np.int32))


def shot_fields(x: np.ndarray, severity: int) -> Fields:
    """A word in the middle of the interval that inverts to the reference's count."""
    from scipy.stats import poisson

    count = np.random.poisson(x / 255.0 * SHOT[severity - 1])
    # Cumulative probabilities per pixel value, from below a count of 0 on.
    rates = np.arange(256) / 255.0 * SHOT[severity - 1]
    steps = poisson.cdf(np.arange(-1, count.max() + 1), rates[:, None])
    middle = (steps[x, count] + steps[x, count + 1]) / 2
    return {"uniform_bits_HWC": bits(np.clip(middle * 2**32, 0, 2**32 - 1))}


def impulse_fields(x: np.ndarray, severity: int) -> Fields:
    """The reference's two draws, as one word: below p replaced, in the lower half by white."""
    flip = np.random.random(x.shape) <= IMPULSE[severity - 1]
    salt = np.random.random(x.shape) <= 0.5
    p = IMPULSE[severity - 1] * 2**32
    return {"uniform_bits_HWC": bits(np.where(flip, np.where(salt, 0.25 * p, 0.75 * p), (p + 2**32) / 2))}


def glass_fields(x: np.ndarray, severity: int) -> Fields:
    """The reference visits rows and columns from the last to the first."""
    reach, iterations = GLASS[severity - 1]
    height, width = x.shape[:2]
    visited = glass_offsets(height, width, reach, iterations)
    offsets = np.zeros((iterations, height, width, 2), np.int16)
    offsets[:, reach + 1 : height - reach + 1, reach + 1 : width - reach + 1] = visited.reshape(
        iterations, height - 2 * reach, width - 2 * reach, 2
    )[:, ::-1, ::-1]
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
    layer = np.random.normal(size=x.shape[:2])
    return shaped("snow", severity, x, layer, np.array(np.random.uniform(-135, -45)))


def frost_fields(x: np.ndarray, severity: int) -> Fields:
    index = np.random.randint(5)
    row = np.random.randint(0, FROST_SIZES[index][0] - x.shape[0])
    column = np.random.randint(0, FROST_SIZES[index][1] - x.shape[1])
    place = (("index", index), ("row", row), ("column", column))
    return {name: torch.tensor(value, dtype=torch.int32) for name, value in place}


def fog_fields(x: np.ndarray, severity: int) -> Fields:
    levels = [np.random.uniform(-1, 1, 3 * n * n) for n in (1, 2, 4, 8, 16, 32, 64, 128)]
    return shaped("fog", severity, x, np.concatenate(levels))


def elastic_fields(x: np.ndarray, severity: int) -> Fields:
    dx, dy = np.random.uniform(-1, 1, x.shape[:2]), np.random.uniform(-1, 1, x.shape[:2])
    return shaped("elastic_transform", severity, x, np.stack([dx, dy]), np.zeros((3, 2)))


def spatter_fields(x: np.ndarray, severity: int) -> Fields:
    return shaped("spatter", severity, x, np.random.normal(size=x.shape[:2]))


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


def single_precision_normal(size: Any, loc: float = 0.0, scale: float = 1.0) -> np.ndarray:
    drawn = np.random.standard_normal(size).astype(np.float32)
    return np.asarray(loc + scale * drawn.astype(np.float64))


def has_numba() -> bool:
    return importlib.util.find_spec("numba") is not None


def differences(kind: str, severity: int, photos_u8_NHWC: np.ndarray) -> tuple[int, float]:
    """Return the largest and the mean absolute difference in grey levels over photographs.

    Without numba, glass_blur takes two photographs: the package's own loop is half a second each.
    """
    module = reference()
    assert module is not None
    corrupted = getattr(module, kind)
    if kind == "glass_blur":
        corrupted = glass_blur_by_numba if has_numba() else corrupted
        photos_u8_NHWC = photos_u8_NHWC if has_numba() else photos_u8_NHWC[:2]
    largest, means = 0, []
    for number, x in enumerate(photos_u8_NHWC):
        seed = 1000 * severity + number
        # The edges of spatter hang on whole levels of a smoothed layer: both get the same float32 noise.
        with (
            mock.patch.object(np.random, "normal", single_precision_normal) if kind == "spatter" else NOTHING
        ):
            np.random.seed(seed)
            want = np.uint8(corrupted(Image.fromarray(x), severity))
            np.random.seed(seed)
            fields = FIELDS.get(kind, no_fields)(x, severity)
        got = apply(torch.from_numpy(x.copy()), fields, kind, severity, flavour="bethge").numpy()
        difference = np.abs(got.astype(int) - want.astype(int))
        largest = max(largest, int(difference.max()))
        means.append(float(difference.mean()))
    return largest, float(np.mean(means))


NOTHING = contextlib.nullcontext()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=Path, help="folder of *.JPEG photographs (default: scikit-image's)")
    parser.add_argument("--count", type=int, default=30, help="photographs to use")
    parser.add_argument("--out", type=Path, help="write the numbers here as JSON")
    options = parser.parse_args()
    if reference() is None or not frost.found():
        sys.exit("imagecorruptions is not installed: pip install --no-deps imagecorruptions==1.1.2")
    photos = photographs(options.photos, options.count).numpy()
    result: dict[str, Any] = {**environment(), "photographs": len(photos), "cells": {}}
    print("| kind | max | mean, by severity |\n|---|---|---|")
    for kind in (*TRAINING_KINDS, *HELD_OUT_KINDS):
        cells = [differences(kind, severity, photos) for severity in range(1, 6)]
        for severity, (largest, mean) in enumerate(cells, start=1):
            result["cells"][f"{kind} {severity}"] = {"max": largest, "mean": round(mean, 5)}
        means = " ".join(f"{mean:.5f}" for _, mean in cells)
        print(f"| {kind} | {max(largest for largest, _ in cells)} | {means} |", flush=True)
    if options.out:
        write_result(options.out, result)


if __name__ == "__main__":
    main()
