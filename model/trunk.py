"""What every trunk is: images in, a feature map of D channels out."""

from __future__ import annotations

from typing import Self

from torch import nn


class Trunk(nn.Module):
    """Base of the trunks. `forward` takes (B, 3, H, W) and gives (B, D, h, w).

    Args:
        name: see ModelConfig.trunk.
        freeze_bn: batch normalisation keeps its running statistics in training; its weights still learn.

    Attributes:
        dim: D, channels of the map.
    """

    dim: int

    def __init__(self, name: str, freeze_bn: bool) -> None:
        super().__init__()
        self.name = name
        self.freeze_bn = freeze_bn

    def train(self, mode: bool = True) -> Self:
        """Switch between training and evaluation; frozen batch normalisation stays in evaluation."""
        super().train(mode)
        if self.freeze_bn:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self
