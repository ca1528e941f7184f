"""Vector quantisation with the straight-through estimator and its two losses.

Shapes: N = features, K = codes, D = feature dimension.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from model.codebook.choice import variant_for
from model.codebook.kernels import kernels_for
from model.codebook.prepared import Metric, PreparedCodebook
from model.codebook.search import check_vectors, nearest_code, search_in_blocks
from model.codebook.segment_sum import segment_sum_dense, segment_sum_of_differences

_ROWS = 1024  # features whose losses are summed at a time on a CPU


class Quantised(NamedTuple):
    """What `quantize` returns."""

    quantised_ND: Tensor
    """float32, equal to the nearest codes; its gradient goes to the features as if it were them."""

    index_N: Tensor
    """int64 code of each feature; −1 for a feature that is not finite, and for all where a code is not. The
    losses are NaN then."""

    sqdist_N: Tensor
    """float32 distance that the search minimised (of the normalised vectors under "cosine")."""

    vq_loss: Tensor
    """float32 scalar ‖e − sg(z)‖², moves only the codes (paper, eq. 7)."""

    commit_loss: Tensor
    """float32 scalar ‖z − sg(e)‖², moves only the features (paper, eq. 9)."""

    usage_K: Tensor
    """int64, how many features have each code in index_N; a feature with −1 counts for none."""


@torch.library.custom_op("vqsa::gather_codes", mutates_args=())
def gather_codes(codes_KD: Tensor, index_N: Tensor) -> Tensor:
    return codes_KD.index_select(0, index_N.clamp_min(0))


@gather_codes.register_fake
def _(codes_KD: Tensor, index_N: Tensor) -> Tensor:
    return codes_KD.new_empty(index_N.shape[0], codes_KD.shape[1])


def usage_of(index: Tensor, codes: int) -> Tensor:
    """How often each code occurs in an index of any shape: int64 (K,); negative ones are left out.

    Not by bincount: the size of its result would have to be read back from the device.
    """
    index = index.flatten()
    return index.new_zeros(codes).scatter_add_(0, index.clamp_min(0), (index >= 0).long())


@torch.library.custom_op("vqsa::sum_by_code", mutates_args=())
def _sum_by_code(z_ND: Tensor, index_N: Tensor, codes: int) -> Tensor:
    return segment_sum_dense(z_ND, index_N, codes)


@_sum_by_code.register_fake
def _(z_ND: Tensor, index_N: Tensor, codes: int) -> Tensor:
    return z_ND.new_empty(codes, z_ND.shape[1])


@torch.library.custom_op("vqsa::codes_gradient", mutates_args=())
def _codes_gradient(code_ND: Tensor, z_ND: Tensor, scale: Tensor, index_N: Tensor, codes: int) -> Tensor:
    return segment_sum_of_differences(code_ND, z_ND, scale, index_N, codes)


@_codes_gradient.register_fake
def _(code_ND: Tensor, z_ND: Tensor, scale: Tensor, index_N: Tensor, codes: int) -> Tensor:
    return code_ND.new_empty(codes, z_ND.shape[1])


def _remember(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor], output: Tensor
) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.codes = inputs[0].shape[0]  # type: ignore[attr-defined]


def _gather_backward(ctx: torch.autograd.function.FunctionCtx, grad_ND: Tensor) -> tuple[Tensor, None]:
    (index_N,) = ctx.saved_tensors  # type: ignore[attr-defined]
    return _sum_by_code(grad_ND.contiguous(), index_N, ctx.codes), None  # type: ignore[attr-defined]


gather_codes.register_autograd(_gather_backward, setup_context=_remember)


@torch.library.custom_op("vqsa::quantize", mutates_args=())
def _quantize(
    z_ND: Tensor, codes_KD: Tensor, metric: str, memory_mib: int, prepared: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Search, gather, count and Σ‖z − e‖²: quantised, index, sqdist, that sum twice (float64 scalars), usage.

    The sum comes twice because its two gradients go two ways: the first to the codes, the second to the
    features.
    """
    cosine = metric == "cosine"
    fused = kernels_for(z_ND, "auto")
    if fused is not None:
        z_ND, codes_KD = z_ND.contiguous(), codes_KD.contiguous()
        ready = fused.prepare(codes_KD, cosine) if prepared is None else prepared
        usage_K = torch.zeros(len(codes_KD), dtype=torch.int64, device=z_ND.device)
        tile, alarm_1 = variant_for(fused, z_ND.device)
        found = fused.search(z_ND, codes_KD, cosine, ready, True, usage_K, tile, alarm_1=alarm_1)
        total = found.error_N.sum()
        return found.quantised_ND, found.index_N, found.sqdist_N, total, total.clone(), usage_K
    index_N, sqdist_N = search_in_blocks(z_ND, codes_KD, cosine, memory_mib)
    code_ND = codes_KD.index_select(0, index_N.clamp_min(0)).float()
    total = torch.zeros((), dtype=torch.float64, device=z_ND.device)
    for start in range(0, z_ND.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        total += (code_ND[rows].double() - z_ND[rows].double()).square().sum()
    total.masked_fill_((index_N < 0).any(), torch.nan)
    return code_ND, index_N, sqdist_N, total, total.clone(), usage_of(index_N, len(codes_KD))


@_quantize.register_fake
def _(
    z_ND: Tensor, codes_KD: Tensor, metric: str, memory_mib: int, prepared: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    count, dim = z_ND.shape
    return (
        z_ND.new_empty((count, dim), dtype=torch.float32),
        z_ND.new_empty(count, dtype=torch.int64),
        z_ND.new_empty(count, dtype=torch.float32),
        z_ND.new_empty((), dtype=torch.float64),
        z_ND.new_empty((), dtype=torch.float64),
        z_ND.new_empty(codes_KD.shape[0], dtype=torch.int64),
    )


def _remember_vectors(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]
) -> None:
    ctx.set_materialize_grads(False)  # so that a loss has no gradient at all for the other side
    ctx.save_for_backward(inputs[0], output[0], output[1])
    ctx.codes, ctx.codes_dtype = inputs[1].shape[0], inputs[1].dtype  # type: ignore[attr-defined]


def _quantize_backward(
    ctx: torch.autograd.function.FunctionCtx,
    through_ND: Tensor | None,
    _index: Tensor | None,
    _sqdist: Tensor | None,
    vq: Tensor | None,
    commit: Tensor | None,
    _usage: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, None, None, None]:
    z_ND, code_ND, index_N = ctx.saved_tensors  # type: ignore[attr-defined]
    towards_z, towards_codes = ctx.needs_input_grad[:2]  # type: ignore[attr-defined]
    z_grad_ND = codes_grad_KD = None
    if towards_z and commit is not None:
        z_grad_ND = (code_ND - z_ND.float()) * (-2 * commit).float()
    if towards_z and through_ND is not None:
        z_grad_ND = through_ND if z_grad_ND is None else z_grad_ND + through_ND
    if z_grad_ND is not None:
        z_grad_ND = z_grad_ND.to(z_ND.dtype)
    if towards_codes and vq is not None:
        codes_grad_KD = _codes_gradient(code_ND, z_ND, 2 * vq, index_N, ctx.codes)  # type: ignore[attr-defined]
        codes_grad_KD = codes_grad_KD.to(ctx.codes_dtype)  # type: ignore[attr-defined]
    return z_grad_ND, codes_grad_KD, None, None, None


_quantize.register_autograd(_quantize_backward, setup_context=_remember_vectors)


def quantize(
    z_ND: Tensor,
    codes_KD: Tensor,
    metric: Metric = "l2",
    reduction: Literal["mean", "sum"] = "mean",
    memory_mib: int = 256,
    centre_D: Tensor | None = None,
    prepared: PreparedCodebook | None = None,
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
        prepared: as in `nearest_code`; not with a centre.

    Returns:
        Quantised. Everything is computed in float32 or better, under autocast too. The gradient of the codes
        is the same bits in every run; codes that no feature chose get zero.

    Raises:
        ValueError, TypeError: as `nearest_code`; ValueError for another reduction.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"quantize knows the reductions 'mean' and 'sum', got {reduction!r}")
    check_vectors(z_ND, codes_KD, metric, "auto")
    with torch.autocast(z_ND.device.type, enabled=False):
        if centre_D is not None:
            index_N, sqdist_N = nearest_code(*about(z_ND, codes_KD, centre_D), metric, memory_mib=memory_mib)
            code_ND, usage_K = gather_codes(codes_KD, index_N), usage_of(index_N, len(codes_KD))
            return straight_through(z_ND, code_ND, index_N, sqdist_N, reduction, usage_K)
        ready = None if prepared is None else prepared.buffer_for(codes_KD, metric)
        quantised_ND, index_N, sqdist_N, vq_sum, commit_sum, usage_K = _quantize(
            z_ND, codes_KD, metric, memory_mib, ready
        )
        divisor = z_ND.numel() if reduction == "mean" else z_ND.shape[0]
        vq_loss, commit_loss = (vq_sum / divisor).float(), (commit_sum / divisor).float()
        return Quantised(quantised_ND, index_N, sqdist_N, vq_loss, commit_loss, usage_K)


def straight_through(
    z_ND: Tensor, code_ND: Tensor, index_N: Tensor, sqdist_N: Tensor, reduction: str, usage_K: Tensor
) -> Quantised:
    """The output and the two losses, once each feature has its code; float32, outside autocast.

    As in the fused pass, both losses are NaN where a feature has no code: what was gathered for it is none.
    """
    z_ND = z_ND.float()
    without_code = (index_N < 0).any()
    vq_loss = _reduce((code_ND - z_ND.detach()).square(), reduction).masked_fill(without_code, torch.nan)
    commit_loss = _reduce((z_ND - code_ND.detach()).square(), reduction).masked_fill(without_code, torch.nan)
    # z − sg(z) is exactly zero, so the value is the code to the last bit; z + sg(e − z) would be rounded.
    quantised_ND = code_ND.detach() + (z_ND - z_ND.detach())
    return Quantised(quantised_ND, index_N, sqdist_N, vq_loss, commit_loss, usage_K)


def about(z_ND: Tensor, codes_KD: Tensor, centre_D: Tensor | None) -> tuple[Tensor, Tensor]:
    """Features and codes as seen from a centre, float32; as they are without one."""
    return (z_ND, codes_KD) if centre_D is None else (z_ND.float() - centre_D, codes_KD - centre_D)


def _reduce(square_ND: Tensor, reduction: str) -> Tensor:
    return square_ND.mean() if reduction == "mean" else square_ND.sum(1).mean()
