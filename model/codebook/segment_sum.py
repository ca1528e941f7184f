"""Sums of the features that share a code, the same bits in every run.

The gradient of the codebook, a moving average of it and k-means all need Σ z over the features of each code.
`index_add` on CUDA adds in the order in which threads arrive; here a stable sort brings each code's features
together in their original order, and each sum runs along its own segment. On CUDA the kernels of csrc/segment.h read
the features where they are and sum in float64, in runs of 64 features so that a code with very many of them keeps the
whole device busy too.

Shapes: N = features, K = codes, D = feature dimension, T = codes that got at least one feature.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.codebook.kernels import Kernels, kernels_for

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def segment_sum(z_ND: Tensor, index_N: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    """Sum the features of each code that has any.

    Args:
        z_ND: features, float32 or float64; N may be 0.
        index_N: int64 on the same device, code of each feature in [0, codes); one with a negative code is left out.
        codes: number of codes K.

    Returns:
        touched_T: int64, the codes that got a feature, ascending.
        sum_TD: dtype of z_ND, the sum of each.

    Raises:
        ValueError, TypeError: the shapes, devices or dtypes do not fit.

    Waits for the device on CUDA, since T is not known before; `segment_sum_dense` does not.
    """
    _check(z_ND, index_N, codes)
    kernels = kernels_for(z_ND, "auto")
    if kernels is not None:
        sorted_N, order_N = _sorted(index_N)
        begins_N = sorted_N >= 0
        begins_N[1:] &= sorted_N[1:] != sorted_N[:-1]
        touched_T = sorted_N[begins_N].long()
        slot_N = torch.where(sorted_N >= 0, begins_N.cumsum(0) - 1, -1).int()
        return touched_T, _fused(kernels, z_ND, order_N, slot_N, len(touched_T))
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
    kernels = kernels_for(z_ND, "auto")
    if kernels is not None:
        sorted_N, order_N = _sorted(index_N)
        return _fused(kernels, z_ND, order_N, sorted_N, codes)
    order_N, bound_K1 = _segments(index_N, codes)
    return _sums(z_ND[order_N], bound_K1)


def segment_sum_of_differences(
    code_ND: Tensor, z_ND: Tensor, scale: Tensor, index_N: Tensor, codes: int
) -> Tensor:
    """scale · Σ (e − z) of each code: the codebook's gradient, without holding the differences on CUDA.

    Args:
        code_ND: float32, the code e of each feature.
        z_ND: features, float16, bfloat16 or float32.
        scale: float64 scalar.
        index_N, codes: as in `segment_sum`.

    Returns:
        sum_KD: float32, zero for a code without features.
    """
    _check(z_ND, index_N, codes)
    if (code_ND.shape, code_ND.device, code_ND.dtype) != (z_ND.shape, z_ND.device, torch.float32):
        raise ValueError(
            f"segment_sum_of_differences needs float32 codes {tuple(z_ND.shape)} on {z_ND.device}, as the features, "
            f"got {code_ND.dtype} {tuple(code_ND.shape)} on {code_ND.device}"
        )
    if (scale.ndim, scale.device, scale.dtype) != (0, z_ND.device, torch.float64):
        raise ValueError(
            f"segment_sum_of_differences needs a float64 scalar on {z_ND.device} as scale, got {scale.dtype} "
            f"{tuple(scale.shape)} on {scale.device}"
        )
    kernels = kernels_for(z_ND, "auto")
    if kernels is not None:
        sorted_N, order_N = _sorted(index_N)
        return _fused(kernels, z_ND, order_N, sorted_N, codes, code_ND.contiguous(), scale)
    return segment_sum_dense((code_ND - z_ND.float()) * scale.float(), index_N, codes)


def _check(z_ND: Tensor, index_N: Tensor, codes: int) -> None:
    if z_ND.ndim != 2 or index_N.shape != z_ND.shape[:1] or codes < 1:
        raise ValueError(
            f"segment_sum needs z (N, D), index (N,) and at least one code, got {tuple(z_ND.shape)}, "
            f"{tuple(index_N.shape)} and {codes}"
        )
    if z_ND.device != index_N.device:
        raise ValueError(
            f"segment_sum needs z and index on one device, got {z_ND.device} and {index_N.device}; move one"
        )
    if z_ND.dtype not in _DTYPES or index_N.dtype != torch.int64:
        raise TypeError(
            f"segment_sum needs z of a floating type (float16, bfloat16, float32 or float64) and index int64, got "
            f"{z_ND.dtype} and {index_N.dtype}; convert first"
        )


def _sorted(index_N: Tensor) -> tuple[Tensor, Tensor]:
    """Codes in ascending order, int32 (half the work of the sort), and whose they are; left out ones negative."""
    sorted_N, order_N = torch.sort(index_N.int(), stable=True)
    return sorted_N, order_N


def _fused(
    kernels: Kernels, z_ND: Tensor, order_N: Tensor, slot_N: Tensor, slots: int,
    code_ND: Tensor | None = None, scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    dtype = z_ND.dtype if z_ND.dtype == torch.float64 else torch.float32
    out_SD = torch.empty(slots, z_ND.shape[1], dtype=dtype, device=z_ND.device)
    return kernels.segment_sum(z_ND.contiguous(), order_N, slot_N, out_SD, code_ND, scale)


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
