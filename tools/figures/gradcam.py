"""Where models look, on clean and corrupted images (Fig. 1 of the paper), by Grad-CAM (arXiv:1610.02391)."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.normalise import normalise
from tools.evaluation.models import Classifier
from tools.figures.samples import Samples
from tools.figures.style import Picture, contact_sheet, jpeg
from tools.runtime.results import CellName

log = logging.getLogger(__name__)

CELL: CellName = ("defocus_blur", 3)
"""The paper's choice."""


def last_map(net: nn.Module) -> nn.Module | None:
    """Return the layer whose output is the last feature map: the trunk's last stage, else the last convolution."""
    trunk = getattr(net, "trunk", net)
    for name in ("layer4", "features"):
        stage = getattr(trunk, name, None)
        if isinstance(stage, nn.Sequential) and len(stage):
            return stage[-1]
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    return convolutions[-1] if convolutions else None


def overlays(classifier: Classifier, images_u8_BHWC: Tensor, output_B: Sequence[int]) -> list[Picture]:
    """Return the images with the map of what speaks for their own class laid over them."""
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.image import show_cam_on_image
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    layer = last_map(classifier.net)
    if layer is None:
        raise ValueError(f"{classifier.name} has no convolution, so there is no feature map to look at")
    config = classifier.preprocessing.pipeline(1)
    targets = [ClassifierOutputTarget(output) for output in output_B]
    with GradCAM(model=classifier.net, target_layers=[layer]) as cam, torch.enable_grad():
        maps_BHW = cam(input_tensor=normalise(images_u8_BHWC, config), targets=targets)
    return [
        show_cam_on_image(image.astype(np.float32) / 255, grey, use_rgb=True, image_weight=0.55)
        for image, grey in zip(images_u8_BHWC.cpu().numpy(), maps_BHW, strict=True)
    ]


def grid(classifiers: Sequence[Classifier], samples: Samples, outputs: Sequence[Tensor]) -> bytes:
    """Return a JPEG: a row per image, the image and each model's map on it, clean and then corrupted.

    Args:
        classifiers: shown the same pixels.
        samples: one image per row.
        outputs: per classifier, its output for each class of the data.
    """
    columns: list[list[Picture]] = []
    heads: list[str] = []
    for words, images in (("clean", samples.images_u8), ("corrupted", samples.corrupted(CELL))):
        columns.append(list(images.cpu().numpy()))
        heads.append(words)
        for classifier, index in zip(classifiers, outputs, strict=True):
            columns.append(overlays(classifier, images, index[samples.label_B].tolist()))
            heads.append(classifier.name[:14])
    rows = [("", list(row)) for row in zip(*columns, strict=True)]
    return jpeg(contact_sheet(rows, heads, 124, 2))
