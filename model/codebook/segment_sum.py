"""Sums of the features that share a code, the same bits in every run.

The gradient of the codebook, a moving average of it and k-means all need Σ z over the features of each code.
`index_add` on CUDA adds in the order in which threads arrive; here a stable sort brings each code's features
together in their original order, and each sum runs along its own segment.

Shapes: N = features, K = codes, D = feature dimension, T = codes that got at least one feature.
"""

from __future__ import annotations

import torch
from torch import Tensor


def segment_sum(z_ND: Tensor, index_N: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    """Sum the features of each code that has any.

    Args:
        z_ND: features, float32 or float64; N may be 0.
        index_N: int64 code of each feature in [0, codes); a feature with a negative one is left out.
        codes: number of codes K.

    Returns:
        touched_T: int64, the codes that got a feature, ascending.
        sum_TD: dtype of z_ND, the sum of each.

    Raises:
        ValueError: the shapes do not fit.

    Waits for the device on CUDA, since T is not known before; `segment_sum_dense` does not.
    """
    _check(z_ND, index_N, codes)
    order_N, bound_K1 = _segments(index_N, codes)
    touched_T = (bound_K1.diff() > 0).nonzero()[:, 0]
    bound_T1 = torch.cat([bound_K1[touched_T], bound_K1[-1:]])
    return touched_T, _sums(z_ND[order_N], bound_T1)


def segment_sum_dense(z_ND: Tensor, index_N: Tensor, codes: int) -> Tensor:
    """Like `segment_sum`, but a row for every code (zero where it has no feature), without waiting for the
    device.

    Returns:
        sum_KD: dtype of z_ND.
    """
    _check(z_ND, index_N, codes)
    order_N, bound_K1 = _segments(index_N, codes)
    return _sums(z_ND[order_N], bound_K1)


def _check(z_ND: Tensor, index_N: Tensor, codes: int) -> None:
    if z_ND.ndim != 2 or index_N.shape != z_ND.shape[:1] or codes < 1:
        raise ValueError(
            f"segment_sum needs z (N, D), index (N,) and at least one code, got {tuple(z_ND.shape)}, "
            f"{tuple(index_N.shape)} and {codes}"
        )


def _segments(index_N: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    """Features in the order of their codes, and where each code's begin (and the last one's end).

    Features that are left out come before the first code's.
    """
    sorted_N, order_N = torch.sort(index_N, stable=True)
    return order_N, torch.searchsorted(sorted_N, torch.arange(codes + 1, device=index_N.device))


def _sums(sorted_ND: Tensor, bound_K1: Tensor) -> Tensor:
    if sorted_ND.shape[0] == 0 or sorted_ND.shape[1] == 0:
        return sorted_ND.new_zeros(bound_K1.shape[0] - 1, sorted_ND.shape[1])
    return torch.segment_reduce(sorted_ND, "sum", offsets=bound_K1, axis=0, unsafe=True)
