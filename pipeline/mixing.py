"""Mixup and CutMix: which images of a global batch are mixed, and how.

Positions 2j and 2j + 1 of the stream are mixed with each other: the stream's order is a random permutation, so
neighbours are a random pair, and a pair is never split between processes or accumulation parts as long as these
hold an even number of images. Whether a global batch is mixed, by which method, with which share and which box
is drawn from (seed, number of the global batch) alone: the same on any number of processes.

Sources: mixup arXiv:1710.09412, CutMix arXiv:1905.04899.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal, localcontext

import numpy as np
from torch import Tensor

from pipeline.config import PipelineConfig
from pipeline.philox import Purpose, draw, unit


@dataclass(frozen=True)
class Mix:
    """How one global batch is mixed.

    share: of an image's own pixels or area, in [0, 1]; the neighbour has the rest.
    box: CutMix's (top, left, bottom, right) in pixels, which the neighbour fills; None for mixup.
    """

    share: float
    box: tuple[int, int, int, int] | None

    def images(self, image_BCHW: Tensor) -> Tensor:
        """Return the mixed images; their memory format is kept, the argument is not changed."""
        other_BCHW = _neighbours(image_BCHW)
        if self.box is None:
            return image_BCHW * self.share + other_BCHW * (1 - self.share)
        top, left, bottom, right = self.box
        mixed_BCHW = image_BCHW.clone()
        mixed_BCHW[:, :, top:bottom, left:right] = other_BCHW[:, :, top:bottom, left:right]
        return mixed_BCHW

    def targets(self, target_BC: Tensor) -> Tensor:
        """Return the targets of the mixed images."""
        return target_BC * self.share + _neighbours(target_BC) * (1 - self.share)


def _neighbours(x: Tensor) -> Tensor:
    """Swap the items at 2j and 2j + 1 along the first axis."""
    return x.view(len(x) // 2, 2, *x.shape[1:]).flip(1).flatten(0, 1)


def draw_mix(config: PipelineConfig, seed: int, batch: int) -> Mix | None:
    """Return how global batch number `batch` is mixed, or None where it is not."""
    if not (config.mixup or config.cutmix):
        return None
    mixed, cut, row, column = unit(draw(seed, 0, batch, Purpose.MIX)[0]).tolist()
    if mixed >= config.mix_probability:
        return None
    use_cutmix = bool(config.cutmix) and (not config.mixup or cut < 0.5)
    share = _beta(config.cutmix if use_cutmix else config.mixup, seed, batch)
    if not use_cutmix:
        return Mix(share, None)
    # The box has (1 - share) of the area around a uniform centre, cut off at the borders; what is left counts.
    side = config.image_size
    half = int(0.5 * float(np.sqrt(1 - share)) * side)
    y, x = int(row * side), int(column * side)
    top, bottom = max(0, y - half), min(side, y + half)
    left, right = max(0, x - half), min(side, x + half)
    return Mix(1 - (bottom - top) * (right - left) / side**2, (top, left, bottom, right))


def _beta(alpha: float, seed: int, batch: int) -> float:
    """Draw from Beta(alpha, alpha) by Jöhnk's method, in decimal arithmetic: the same on every machine."""
    with localcontext() as context:
        context.prec = 30
        exponent = 1 / Decimal(alpha)
        block = 0
        while True:
            block += 1
            u, v, *_ = (Decimal(x) for x in unit(draw(seed, 0, batch, Purpose.MIX, block)[0]).tolist())
            x, y = u**exponent, v**exponent
            if 0 < x + y <= 1:
                return float(x / (x + y))
