"""Self-attention over the two tokens of a sample: its code and its feature.

Shapes: B = samples, D = feature dimension, 2 = tokens (code, feature).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

AttentionScale = Literal["sqrt2", "one", "sqrt_d"]


class TwoTokenAttention(nn.Module):
    """softmax(K·Qᵀ / scale)·V with bias-free D×D matrices (paper, eq. 8).

    As in the authors' code the softmax runs over K's token: each output token q is Σ_k A[k, q]·V_k, where the
    weights of a q add up to one. There the matrices are repeated for every sample (6 GB per forward pass at
    D = 2048 and 128 samples); products of the token rows with the matrices are the same numbers.

    Args:
        dim: D.
        scale: divisor of the scores: √2 (paper), 1 or √D.
        unscaled_eval: leave the divisor out in evaluation, as the authors' code does.
    """

    def __init__(self, dim: int, scale: AttentionScale = "sqrt2", unscaled_eval: bool = False) -> None:
        super().__init__()
        self.divisor = {"sqrt2": math.sqrt(2), "one": 1.0, "sqrt_d": math.sqrt(dim)}[scale]
        self.unscaled_eval = unscaled_eval
        self.K = nn.Parameter(torch.empty(dim, dim))
        self.Q = nn.Parameter(torch.empty(dim, dim))
        self.V = nn.Parameter(torch.empty(dim, dim))
        for matrix_DD in (self.K, self.Q, self.V):
            nn.init.kaiming_normal_(matrix_DD)

    def forward(self, code_BD: Tensor, feature_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Mix the two tokens.

        Returns:
            tokens_B2D: the mixed tokens, code first, in the type of the products (autocast's, else float32).
            attention_B22: float32 weights A[b, k, q]; they add up to 1 over k.
        """
        tokens_B2D = torch.stack([code_BD, feature_BD], dim=1)
        key_B2D = F.linear(tokens_B2D, self.K)
        query_B2D = F.linear(tokens_B2D, self.Q)
        value_B2D = F.linear(tokens_B2D, self.V)
        divisor = 1.0 if self.unscaled_eval and not self.training else self.divisor
        with torch.autocast(tokens_B2D.device.type, enabled=False):
            # Scores add up D products of order one: float16 would overflow, bfloat16 would round them to
            # whole numbers.
            score_B22 = key_B2D.float() @ query_B2D.float().transpose(1, 2) / divisor
            attention_B22 = score_B22.softmax(dim=1)
        mixed_B2D = attention_B22.transpose(1, 2).to(value_B2D.dtype) @ value_B2D
        return mixed_B2D, attention_B22
