"""The k nearest codes of each feature, and quantisation by their weighted sum.

Shapes: N = features, K = codes, D = feature dimension, k = codes per feature, M = codes on the short list,
R = features of a block.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from model.codebook.quantize import Quantised, about, gather_codes, straight_through, usage_of
from model.codebook.search import _fold, _vectors
from model.config import Metric

Weights = Literal["mean", "softmax"]

_SPARE = 16  # codes on the short list beyond k, for float64 rounding and equal distances
_MIB = 1 << 20


def nearest_codes(
    z_ND: Tensor, codes_KD: Tensor, k: int, metric: Metric = "l2", memory_mib: int = 256
) -> tuple[Tensor, Tensor]:
    """Return the k nearest codes of each feature, nearest first.

    Distances are those of `nearest_code`, measured in the same way for the k + 16 best of a float64 search;
    of codes at the same distance the one with the lower index comes first. So the answer is exact unless more
    than 16 codes share the k-th distance to within float64 rounding.

    Args:
        z_ND, codes_KD, metric: as in `nearest_code`.
        k: 1 to K.
        memory_mib: workspace beside inputs and outputs, about.

    Returns:
        index_Nk: int64, −1 for a feature that is not finite.
        sqdist_Nk: float32 >= 0, NaN where the index is −1.

    Raises:
        ValueError: k is not in 1 to K, or an unknown metric.
    """
    if not 1 <= k <= codes_KD.shape[0]:
        raise ValueError(
            f"the {k} nearest of {codes_KD.shape[0]} codes do not exist; choose k from 1 to that"
        )
    if metric not in ("l2", "cosine"):
        raise ValueError(f"nearest_codes knows the metrics 'l2' and 'cosine', got {metric!r}")
    index_Nk, sqdist_Nk = _nearest_codes(z_ND.detach(), codes_KD.detach(), k, metric, memory_mib)
    return index_Nk, sqdist_Nk


@torch.library.custom_op("vqsa::nearest_codes", mutates_args=())
def _nearest_codes(
    z_ND: Tensor, codes_KD: Tensor, k: int, metric: str, memory_mib: int
) -> tuple[Tensor, Tensor]:
    total, dim = codes_KD.shape
    budget = memory_mib * _MIB
    most = min(total, k + _SPARE)
    columns = max(most, min(total, budget // (4 * 24 * dim)))
    rows = max(1, min(budget // (4 * 24 * (columns + most)), budget // (4 * 24 * most * dim)))
    index_Nk = z_ND.new_empty((z_ND.shape[0], k), dtype=torch.int64)
    sqdist_Nk = z_ND.new_empty((z_ND.shape[0], k), dtype=torch.float32)
    # A shift common to features and codes changes no Euclidean distance and keeps its digits.
    cosine = metric == "cosine"
    centre_D = torch.zeros((), dtype=torch.float64, device=z_ND.device)
    if not cosine:
        centre_D = codes_KD.mean(0, dtype=torch.float64)
    for start in range(0, z_ND.shape[0], rows):
        block = slice(start, start + rows)
        exact_RD, zero_R = _vectors(z_ND[block], cosine)
        found_RM = _short_list(exact_RD, codes_KD, cosine, centre_D, most, columns)
        # Lowest index first, so that a stable sort by distance leaves equals in that order.
        found_RM = found_RM.sort(dim=1).values
        code_PD, zero_P = _vectors(codes_KD[found_RM.flatten()], cosine)
        sqdist_P = _fold((code_PD - exact_RD.repeat_interleave(most, 0)).square_()) + zero_P
        sqdist_RM, order_RM = sqdist_P.view(-1, most).sort(dim=1, stable=True)
        index_Rk, sqdist_Rk = found_RM.gather(1, order_RM)[:, :k], sqdist_RM[:, :k]
        if cosine:  # the cosine to a zero feature is 0 for every code
            index_Rk = torch.where(zero_R[:, None], torch.arange(k, device=z_ND.device), index_Rk)
            sqdist_Rk = torch.where(zero_R[:, None], 2.0, sqdist_Rk)
        broken_R = ~exact_RD.isfinite().all(1) | ~codes_KD.isfinite().all()
        index_Nk[block] = index_Rk.masked_fill(broken_R[:, None], -1)
        sqdist_Nk[block] = sqdist_Rk.masked_fill(broken_R[:, None], torch.nan).float()
    return index_Nk, sqdist_Nk


@_nearest_codes.register_fake
def _(z_ND: Tensor, codes_KD: Tensor, k: int, metric: str, memory_mib: int) -> tuple[Tensor, Tensor]:
    count = z_ND.shape[0]
    return z_ND.new_empty((count, k), dtype=torch.int64), z_ND.new_empty((count, k), dtype=torch.float32)


def _short_list(
    exact_RD: Tensor, codes_KD: Tensor, cosine: bool, centre_D: Tensor, most: int, columns: int
) -> Tensor:
    """Indices of the `most` codes with the least ½‖e‖² − z·e in float64: (R, M), in no order."""
    shifted_RD = exact_RD - centre_D
    best_RM = exact_RD.new_empty((len(exact_RD), 0))
    index_RM = torch.empty(best_RM.shape, dtype=torch.int64, device=best_RM.device)
    for first in range(0, len(codes_KD), columns):
        code_CD, zero_C = _vectors(codes_KD[first : first + columns], cosine)
        code_CD = code_CD - centre_D
        score_RC = torch.addmm(
            (0.5 * (code_CD.square().sum(1) + zero_C.double())), shifted_RD, code_CD.T, alpha=-1
        )
        score_RC.nan_to_num_(nan=torch.inf)
        number_C = torch.arange(first, first + len(code_CD), device=code_CD.device)
        score_RC = torch.cat([best_RM, score_RC], 1)
        index_RC = torch.cat([index_RM, number_C.expand(len(exact_RD), -1)], 1)
        best_RM, at_RM = score_RC.topk(min(most, score_RC.shape[1]), largest=False, sorted=False)
        index_RM = index_RC.gather(1, at_RM)
    return index_RM


def quantize_top_k(
    z_ND: Tensor,
    codes_KD: Tensor,
    k: int,
    weights: Weights = "mean",
    metric: Metric = "l2",
    reduction: Literal["mean", "sum"] = "mean",
    memory_mib: int = 256,
    centre_D: Tensor | None = None,
) -> tuple[Quantised, Tensor]:
    """Replace each feature by a weighted sum of its k nearest codes; k = 1 is `quantize`.

    Args:
        k: codes per feature.
        weights: "mean", or "softmax": of minus each distance as a multiple of the mean of the k distances, so
            that neither the units nor the dimension of the features matter. Constants for the gradient.
        z_ND, codes_KD, metric, reduction, memory_mib, centre_D: as in `quantize`.

    Returns:
        Quantised, with the weighted sum in the code's place: `index_N` and `sqdist_N` are the nearest code's.
        index_Nk: int64, all k, nearest first.
    """
    with torch.autocast(z_ND.device.type, enabled=False):
        index_Nk, sqdist_Nk = nearest_codes(*about(z_ND, codes_KD, centre_D), k, metric, memory_mib)
        weight_Nk = torch.full_like(sqdist_Nk, 1 / k)
        if weights == "softmax":
            scale_N1 = sqdist_Nk.mean(1, keepdim=True)
            weight_Nk = torch.softmax(-sqdist_Nk / torch.where(scale_N1 == 0, 1.0, scale_N1), dim=1)
        code_ND = weight_Nk[:, :1] * gather_codes(codes_KD, index_Nk[:, 0])
        for place in range(1, k):
            code_ND = code_ND + weight_Nk[:, place, None] * gather_codes(codes_KD, index_Nk[:, place])
        index_N, usage_K = index_Nk[:, 0], usage_of(index_Nk[:, 0], len(codes_KD))
        return straight_through(z_ND, code_ND, index_N, sqdist_Nk[:, 0], reduction, usage_K), index_Nk
