"""Vector quantisation with the straight-through estimator and its two losses.

Shapes: N = features, K = codes, D = feature dimension.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from model.codebook.search import Metric, nearest_code
from model.codebook.segment_sum import segment_sum_dense


class Quantised(NamedTuple):
    """What `quantize` returns."""

    quantised_ND: Tensor
    """float32, equal to the nearest codes; its gradient goes to the features as if it were them."""

    index_N: Tensor
    """int64 code of each feature; −1 for a feature that is not finite (its losses are not either)."""

    sqdist_N: Tensor
    """float32 distance that the search minimised (of the normalised vectors under "cosine")."""

    vq_loss: Tensor
    """float32 scalar ‖e − sg(z)‖², moves only the codes (paper, eq. 7)."""

    commit_loss: Tensor
    """float32 scalar ‖z − sg(e)‖², moves only the features (paper, eq. 9)."""


@torch.library.custom_op("vqsa::gather_codes", mutates_args=())
def gather_codes(codes_KD: Tensor, index_N: Tensor) -> Tensor:
    return codes_KD.index_select(0, index_N.clamp_min(0))


@gather_codes.register_fake
def _(codes_KD: Tensor, index_N: Tensor) -> Tensor:
    return codes_KD.new_empty(index_N.shape[0], codes_KD.shape[1])


@torch.library.custom_op("vqsa::sum_by_code", mutates_args=())
def _sum_by_code(z_ND: Tensor, index_N: Tensor, codes: int) -> Tensor:
    return segment_sum_dense(z_ND, index_N, codes)


@_sum_by_code.register_fake
def _(z_ND: Tensor, index_N: Tensor, codes: int) -> Tensor:
    return z_ND.new_empty(codes, z_ND.shape[1])


def _remember(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor], output: Tensor
) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.codes = inputs[0].shape[0]  # type: ignore[attr-defined]


def _gather_backward(ctx: torch.autograd.function.FunctionCtx, grad_ND: Tensor) -> tuple[Tensor, None]:
    (index_N,) = ctx.saved_tensors  # type: ignore[attr-defined]
    return _sum_by_code(grad_ND.contiguous(), index_N, ctx.codes), None  # type: ignore[attr-defined]


gather_codes.register_autograd(_gather_backward, setup_context=_remember)


def quantize(
    z_ND: Tensor,
    codes_KD: Tensor,
    metric: Metric = "l2",
    reduction: Literal["mean", "sum"] = "mean",
    memory_mib: int = 256,
    centre_D: Tensor | None = None,
) -> Quantised:
    """Replace each feature by its nearest code, with gradients for training.

    Args:
        z_ND: features, float16, bfloat16 or float32.
        codes_KD: codebook, float32.
        metric: what "nearest" means; the losses are of the raw vectors under either.
        reduction: "mean" over vectors and dimensions, or "sum" over dimensions and mean over vectors.
        memory_mib: workspace of the search.
        centre_D: subtracted from features and codes before they are compared, and only there; changes
            nothing under "l2" but rounding.

    Returns:
        Quantised. Everything is computed in float32, under autocast too. The gradient of the codes is the
        same bits in every run; codes that no feature chose get zero.

    Raises:
        ValueError, TypeError: as `nearest_code`; ValueError for another reduction.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"quantize knows the reductions 'mean' and 'sum', got {reduction!r}")
    with torch.autocast(z_ND.device.type, enabled=False):
        index_N, sqdist_N = nearest_code(*about(z_ND, codes_KD, centre_D), metric, memory_mib=memory_mib)
        return straight_through(z_ND, gather_codes(codes_KD, index_N), index_N, sqdist_N, reduction)


def straight_through(
    z_ND: Tensor, code_ND: Tensor, index_N: Tensor, sqdist_N: Tensor, reduction: str
) -> Quantised:
    """The output and the two losses, once each feature has its code; float32, outside autocast."""
    z_ND = z_ND.float()
    vq_loss = _reduce((code_ND - z_ND.detach()).square(), reduction)
    commit_loss = _reduce((z_ND - code_ND.detach()).square(), reduction)
    # z − sg(z) is exactly zero, so the value is the code to the last bit; z + sg(e − z) would be rounded.
    quantised_ND = code_ND.detach() + (z_ND - z_ND.detach())
    return Quantised(quantised_ND, index_N, sqdist_N, vq_loss, commit_loss)


def about(z_ND: Tensor, codes_KD: Tensor, centre_D: Tensor | None) -> tuple[Tensor, Tensor]:
    """Features and codes as seen from a centre, float32; as they are without one."""
    return (z_ND, codes_KD) if centre_D is None else (z_ND.float() - centre_D, codes_KD - centre_D)


def _reduce(square_ND: Tensor, reduction: str) -> Tensor:
    return square_ND.mean() if reduction == "mean" else square_ND.sum(1).mean()
