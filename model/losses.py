"""The training objective: L = L_vq + β·L_cmt + λ·L_ce (paper, eq. 10)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    """Mean cross entropy in float32, under autocast too.

    Args:
        logits_BC: any floating type.
        labels_B: int64 in [0, C).
    """
    with torch.autocast(logits_BC.device.type, enabled=False):
        return F.cross_entropy(logits_BC.float(), labels_B)


def total_loss(ce: Tensor, vq: Tensor, commit: Tensor, beta: float, lambda_ce: float) -> Tensor:
    """L_vq + β·L_cmt + λ·L_ce, scalars."""
    return vq + beta * commit + lambda_ce * ce
