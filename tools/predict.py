"""Classifies image files with a trained model.

python tools/predict.py --checkpoint runs/x photo.jpg more.png [--overlays FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import tyro
from matplotlib import colormaps
from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torchvision.transforms import functional

import model
from model.grad_cam import grad_cam
from pipeline.config import PipelineConfig
from pipeline.normalise import normalise
from tools.runtime import checkpoint
from tools.runtime.config import RunConfig, validated


class PredictCommand(BaseModel):
    """Print the most likely classes of each image, and the codes that it used."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    images: tyro.conf.Positional[tuple[Path, ...]]
    """Image files."""

    checkpoint: Path
    """Run folder (its newest checkpoint) or checkpoint folder."""

    top: int = Field(5, ge=1)
    """Classes to print per image."""

    overlays: Path | None = None
    """Folder for pictures of each image, as the model sees it, with Grad-CAM's heat map of its most likely class
    laid over it; made if it is not there. Unset: none."""


class Prediction(NamedTuple):
    """What the model says about one image."""

    path: Path
    classes: list[tuple[str, float]]
    """Most likely first, with their probability (softmax), 0–1."""

    codes: list[tuple[int, int]]
    """Codes used and at how many positions of the map, most used first; empty without a codebook."""

    overlay: Path | None
    """Picture with the heat map, if one was asked for."""


def predict(command: PredictCommand) -> list[Prediction]:
    """Classify each image by itself, cropped as in evaluation (shorter side resized, centre crop).

    Raises:
        FileNotFoundError: no checkpoint, or no such image.
        ValueError: no images named, or a file that is no image.
    """
    if not command.images:
        raise ValueError("no images named; say predict.py --checkpoint runs/x photo.jpg …")
    found = checkpoint.newest(command.checkpoint)
    config = validated(RunConfig, found.config, str(found.path))
    net = model.load(found.path)
    predictions = []
    for number, path in enumerate(command.images):
        image = read_image(path, config.pipeline)
        with torch.no_grad():
            features = net(image, return_features=True)
        assert isinstance(features, model.Features)
        probability_C = features.logits[0].softmax(0)
        best = probability_C.topk(min(command.top, len(net.classes)))
        classes = [
            (net.classes[i], p) for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        picture = None
        if command.overlays is not None:
            # Numbered, since two images may have one name.
            picture = command.overlays / f"{number:03d}_{path.stem}.png"
            picture.parent.mkdir(parents=True, exist_ok=True)
            overlay(pixels(image, config.pipeline), grad_cam(net, image)[0]).save(picture)
        predictions.append(Prediction(path, classes, _codes(features.code_index), picture))
    return predictions


def pixels(image: Tensor, config: PipelineConfig) -> Tensor:
    """Return a normalised image (1, 3, S, S) as float32 (S, S, 3) in 0–1."""
    image_HWC = image[0].permute(1, 2, 0).float()
    return (image_HWC * torch.tensor(config.std) + torch.tensor(config.mean)).clamp(0, 1)


def overlay(image_HWC: Tensor, heat_hw: Tensor) -> Image.Image:
    """Lay a heat map over an image.

    Args:
        image_HWC: float32 (S, S, 3) in 0–1.
        heat_hw: (h, w) in 0–1; enlarged bilinearly, cold where 0.
    """
    size = list(image_HWC.shape[:2])
    heat_HW = torch.nn.functional.interpolate(heat_hw[None, None], size, mode="bilinear")[0, 0]
    colour_HWC = torch.from_numpy(colormaps["inferno"](heat_HW.numpy())[..., :3]).float()
    blended_HWC = 0.5 * image_HWC + 0.5 * colour_HWC
    return Image.fromarray((255 * blended_HWC).round().to(torch.uint8).numpy())


def read_image(path: Path, config: PipelineConfig) -> Tensor:
    """Return the image as evaluation sees it: float32 (1, 3, S, S), normalised.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no image, or a damaged one.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no image {path}")
    try:
        with Image.open(path) as image:
            picture = image.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path} is no readable image ({error}); give a JPEG or PNG file") from None
    resized = functional.resize(
        picture, [config.resize_shorter], functional.InterpolationMode(config.eval_interpolation)
    )
    cropped = functional.center_crop(resized, [config.image_size, config.image_size])
    return normalise(torch.from_numpy(np.array(cropped))[None], config)


def _codes(index: Tensor | None) -> list[tuple[int, int]]:
    if index is None:
        return []
    count_K = index[index >= 0].bincount()  # −1 marks a feature that is not finite
    used = count_K.argsort(descending=True, stable=True)[: int((count_K > 0).sum())]
    return list(zip(used.tolist(), count_K[used].tolist(), strict=True))


def table(predictions: list[Prediction]) -> str:
    """Return the predictions as text."""
    lines = []
    for prediction in predictions:
        lines.append(str(prediction.path))
        lines += [f"  {100 * share:5.1f}%  {name}" for name, share in prediction.classes]
        if prediction.codes:
            lines.append("  codes  " + ", ".join(f"{code} ({count}x)" for code, count in prediction.codes))
        if prediction.overlay is not None:
            lines.append(f"  heat map  {prediction.overlay}")
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    try:
        print(table(predict(tyro.cli(PredictCommand, description=PredictCommand.__doc__))))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"predict.py: {error}")


if __name__ == "__main__":
    main()
