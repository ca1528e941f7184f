"""What a micro-batch is trained towards: views, targets, and what is added to the model's own loss.

Shapes: B = images of the micro-batch, V = views of each image, C = classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from pipeline.loader import TrainingBatch
from pipeline.mixing import Mix


class LossConfig(BaseModel):
    """What is added to the model's own loss."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of every target that is spread evenly over all classes."""

    consistency: float = Field(0.0, ge=0)
    """Weight of the Jensen-Shannon divergence between the predictions for an image's views: clean and corrupted
    (pipeline.paired) or original and two AugMix views (pipeline.augmix = 2; AugMix's authors use 12)."""


class MicroBatch(NamedTuple):
    """A micro-batch as the model takes it."""

    images: Tensor
    """(V * B, 3, S, S), view after view."""

    targets: Tensor
    """See `targets`."""

    labels: Tensor
    """int64 (V * B,): the images' own labels."""

    sample_id: Tensor
    """int64 (B,), on the CPU."""

    views: int
    """V."""


def prepare(batch: TrainingBatch, mix: Mix | None, *, classes: int, smoothing: float) -> MicroBatch:
    """Return a loader's micro-batch as the model takes it; AugMix's views count in the consistency loss alone."""
    views = batch.views if mix is None else tuple(mix.images(view) for view in batch.views)
    counted = [i < len(views) - len(batch.augmented) for i in range(len(views))]
    target = targets(batch.labels, classes=classes, smoothing=smoothing, mix=mix, counted_views=counted)
    images = views[0] if len(views) == 1 else torch.cat(views)
    return MicroBatch(images, target, batch.labels.repeat(len(views)), batch.sample_id, len(views))


def targets(
    labels_B: Tensor, *, classes: int, smoothing: float, mix: Mix | None, counted_views: Sequence[bool]
) -> Tensor:
    """Return what the views of a micro-batch are trained towards.

    Args:
        labels_B: int64 in [0, C).
        smoothing: share of a target that is spread over all classes.
        mix: how the images were mixed with their neighbours, if they were; their targets are too.
        counted_views: for each view, whether the cross entropy counts it.

    Returns:
        int64 (V * B,), the labels, where they say everything; else float32 (V * B, C) probabilities, view after
        view. Rows of views that do not count are zero and the others scaled by V / counted, so that the mean cross
        entropy over all rows is the one over the rows that count.
    """
    views = len(counted_views)
    if not smoothing and mix is None and all(counted_views):
        return labels_B.repeat(views)
    target_BC = F.one_hot(labels_B, classes).float()
    target_BC = target_BC * (1 - smoothing) + smoothing / classes
    if mix is not None:
        target_BC = mix.targets(target_BC)
    scale = views / sum(counted_views)
    return torch.cat([target_BC * (scale * counted) for counted in counted_views])


def consistency(logits_VBC: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergence between the predictions for an image's views, mean over images.

    In nats, float32; 0 where all views get the same probabilities, at most log V. The mixture is kept away from
    zero by 1e-7, as in the published code of AugMix (arXiv:1912.02781), whose loss this is.
    """
    with torch.autocast(logits_VBC.device.type, enabled=False):
        probability_VBC = logits_VBC.float().softmax(2)
        log_mean_BC = probability_VBC.mean(0).clamp(1e-7, 1).log()
        views, images = logits_VBC.shape[:2]
        # KL(p || m) = sum p (log p - log m); log_softmax keeps log p finite where p rounds to zero.
        log_VBC = logits_VBC.float().log_softmax(2)
        return (probability_VBC * (log_VBC - log_mean_BC)).sum() / (views * images)
