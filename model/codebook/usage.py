"""What a codebook is used for: which codes, how evenly, and how far features are from their codes.

Shapes: N = features, K = codes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Usage:
    """Counts since `reset`, of one rank, on the codebook's device; no wait for the device.

    Plain tensors: as buffers they would be overwritten by DistributedDataParallel and saved.
    """

    def __init__(self, codes: int) -> None:
        self.usage_K = torch.zeros(codes, dtype=torch.int64)
        """How many features chose each code; sum over ranks for the global one."""
        self.moments_3 = torch.zeros(3, dtype=torch.float64)
        """Number of finite features, sum of their distances and of the squared distances; sum over ranks."""
        self.farthest = torch.zeros(1, dtype=torch.float64)
        """Largest distance; maximum over ranks."""

    @torch.no_grad()
    def add(self, usage_K: Tensor, sqdist_N: Tensor) -> None:
        """Take in how often a batch's features chose each code, and their distances to the nearest."""
        self.usage_K += usage_K
        sound_N = sqdist_N.isfinite()
        sqdist_N = torch.where(sound_N, sqdist_N, 0.0).double()
        self.moments_3 += torch.stack([sound_N.sum().double(), sqdist_N.sum(), sqdist_N.square().sum()])
        self.farthest.copy_(torch.maximum(self.farthest, torch.cat([self.farthest, sqdist_N]).amax()))

    def reset(self) -> None:
        """Start counting anew."""
        for count in (self.usage_K, self.moments_3, self.farthest):
            count.zero_()

    def moved(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Follow the module to another device; types stay."""
        self.usage_K = fn(self.usage_K)
        self.moments_3, self.farthest = (fn(t).double() for t in (self.moments_3, self.farthest))


def codes_used(usage_K: Tensor) -> Tensor:
    """How many codes were chosen at least once: int64 scalar."""
    return (usage_K > 0).sum()


def perplexity(usage_K: Tensor) -> Tensor:
    """exp of the entropy of the codes' shares: float64 scalar in [1, K], K for even use; 1 if nothing was
    counted."""
    share_K = usage_K.double() / usage_K.sum().clamp_min(1)
    entropy: Tensor = torch.special.entr(share_K).sum()
    return entropy.exp()


def distance_statistics(moments_3: Tensor, farthest: Tensor) -> dict[str, float]:
    """Mean, standard deviation and maximum of the distance that the search minimised; zeros for no features."""
    count, total, squares = moments_3.tolist()
    mean = total / max(count, 1)
    variance = max(squares / max(count, 1) - mean * mean, 0.0)
    return {"sqdist_mean": mean, "sqdist_std": variance**0.5, "sqdist_max": float(farthest)}
