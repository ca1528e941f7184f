"""From the fused feature to class scores.

Shapes: B = samples, D = feature dimension, F = fused dimension (2D for two tokens side by side), C = classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Head(nn.Module):
    """One linear layer, or two for a fused pair: fuse (2D → D, ReLU), then fc (D → C) (paper, section 3.4).

    A single token (fusion "replace" or "add", or no codebook) goes straight to fc, as in the commented-out
    variants of the authors' code; the paper does not say.
    """

    def __init__(self, dim: int, classes: int, paired: bool) -> None:
        super().__init__()
        self.fuse = nn.Linear(2 * dim, dim) if paired else None
        self.fc = nn.Linear(dim, classes)

    def forward(self, fused_BF: Tensor) -> Tensor:
        """Return logits (B, C)."""
        hidden_BD = fused_BF if self.fuse is None else torch.relu(self.fuse(fused_BF))
        logits_BC: Tensor = self.fc(hidden_BD)
        return logits_BC
