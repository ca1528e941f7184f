"""The exact nearest code to each feature, without ever holding the N×K matrix of distances.

A half-exact search would be cheap and wrong on near ties, so each block is searched in two stages: float32
scores with a certified bound on their error leave a few candidates per feature, and only those are measured
in float64. The winner of the exact distances is always among the candidates, however many there are: a
feature with many (equal codes, a collapsed codebook) costs more time, never a wrong answer. The kernels for
CUDA (csrc/) do the same with float16 scores; docs/codebook.md tells how.

Shapes: N = features, K = codes, D = feature dimension, R = features of a block, C = codes of a block,
P = candidate pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from model.codebook.choice import variant_for
from model.codebook.kernels import kernels_for
from model.codebook.prepared import Metric, PreparedCodebook

_UNIT = 2.0**-24  # half a float32 unit in the last place
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MIB = 1 << 20


def nearest_code(
    z_ND: Tensor,
    codes_KD: Tensor,
    metric: Metric = "l2",
    impl: Literal["auto", "torch", "cuda", "hopper"] = "auto",
    memory_mib: int = 256,
    prepared: PreparedCodebook | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the nearest code to each feature, exactly.

    With D_i = Σ(z − e_i)² summed in float64 from the values as stored, the code returned is the one with the
    least D_i, and of several with the same D_i (bit-identical codes always have) the one with the lowest
    index. The sum is folded by halves, an order that depends on D alone, so that the same features and codes
    give the same bits on every device and with every block size.

    Args:
        z_ND: features, float16, bfloat16 or float32; N may be 0.
        codes_KD: codebook, of the same or another of these types, on the same device; K and D >= 1.
        metric: "l2", or "cosine": both sides are normalised first (in float64), so that the squared distance
            is 2 − 2 cos. A zero feature gets index 0; the cosine to a zero code is 0.
        impl: "torch" is the implementation in this file, "cuda" the kernels with mma.sync, "hopper" their variant
            for compute capability 9.0; "auto" takes the kernels where they can be used, and the variant where a
            trial on the device has shown that it is right (choice.py). The answer has the same bits in all.
        memory_mib: limit on the workspace of "torch" in MiB, beside inputs and outputs. The kernels need less
            than 64, and the prepared codebook.
        prepared: what the kernels need to know of these codes, if it is at hand; else they find out first.

    Returns:
        index_N: int64 in [0, K), or −1 for a feature that holds NaN or infinity. A code that does flags every
            feature, since no distance to it is defined.
        sqdist_N: float32 >= 0, NaN where the index is −1.

    Raises:
        ValueError: shapes, devices, metric, implementation, memory or prepared codebook do not fit.
        TypeError: another dtype.

    Not differentiable: `quantize` adds the straight-through step. Runs under autocast and
    `set_float32_matmul_precision` without being changed by either. The kernels queue on the current stream and
    never wait for the device; "torch" on CUDA waits once per block, to learn how many candidates there are.
    """
    check_vectors(z_ND, codes_KD, metric, impl)
    ready = None if prepared is None else prepared.buffer_for(codes_KD, metric)
    index_N, sqdist_N = _nearest_code(z_ND.detach(), codes_KD.detach(), metric, memory_mib, impl, ready)
    return index_N, sqdist_N


def check_vectors(z_ND: Tensor, codes_KD: Tensor, metric: str, impl: str) -> None:
    """Raise what `nearest_code` says it raises."""
    if z_ND.ndim != 2 or codes_KD.ndim != 2 or z_ND.shape[1] != codes_KD.shape[1]:
        raise ValueError(
            f"nearest_code needs z (N, D) and codes (K, D), got {tuple(z_ND.shape)} and "
            f"{tuple(codes_KD.shape)}; flatten feature maps to (B*H*W, D) first"
        )
    if codes_KD.shape[0] == 0 or codes_KD.shape[1] == 0:
        raise ValueError(f"nearest_code needs at least one code and dimension, got {tuple(codes_KD.shape)}")
    if z_ND.dtype not in _DTYPES or codes_KD.dtype not in _DTYPES:
        raise TypeError(
            f"nearest_code takes float16, bfloat16 or float32, got {z_ND.dtype} and {codes_KD.dtype}; "
            "convert first"
        )
    if z_ND.device != codes_KD.device:
        raise ValueError(
            f"nearest_code needs both on one device, got {z_ND.device} and {codes_KD.device}; move one"
        )
    if metric not in ("l2", "cosine"):
        raise ValueError(f"nearest_code knows the metrics 'l2' and 'cosine', got {metric!r}")
    if impl not in ("auto", "torch", "cuda", "hopper"):
        raise ValueError(
            f"nearest_code knows the implementations 'auto', 'torch', 'cuda' and 'hopper', got {impl!r}"
        )


@torch.library.custom_op("vqsa::nearest_code", mutates_args=())
def _nearest_code(
    z_ND: Tensor,
    codes_KD: Tensor,
    metric: str,
    memory_mib: int,
    impl: str = "auto",
    prepared: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    cosine = metric == "cosine"
    fused = kernels_for(z_ND, impl)
    if fused is not None:
        z_ND, codes_KD = z_ND.contiguous(), codes_KD.contiguous()
        ready = fused.prepare(codes_KD, cosine) if prepared is None else prepared
        tile, alarm_1 = variant_for(fused, z_ND.device, impl)
        found = fused.search(z_ND, codes_KD, cosine, ready, tile=tile, alarm_1=alarm_1)
        return found.index_N, found.sqdist_N
    return search_in_blocks(z_ND, codes_KD, cosine, memory_mib)


@_nearest_code.register_fake
def _(
    z_ND: Tensor,
    codes_KD: Tensor,
    metric: str,
    memory_mib: int,
    impl: str = "auto",
    prepared: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    count = z_ND.shape[0]
    return z_ND.new_empty(count, dtype=torch.int64), z_ND.new_empty(count, dtype=torch.float32)


def search_in_blocks(z_ND: Tensor, codes_KD: Tensor, cosine: bool, memory_mib: int) -> tuple[Tensor, Tensor]:
    """`nearest_code` with torch alone, whatever precision products have elsewhere."""
    with torch.autocast(z_ND.device.type, enabled=False), _full_float32():
        return _search(z_ND, codes_KD, cosine, memory_mib)


@contextmanager
def _full_float32() -> Iterator[None]:
    """Hold off TF32 and bfloat16 products: the error bound is float32's."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined, unused-ignore]
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


class _BlockSizes(NamedTuple):
    features: int
    codes: int
    pairs: int


# Bytes that a block costs, per element, at its widest moment.
_BYTES_VECTOR = 20  # R×D and C×D: float64 copies, temporaries, and the float32 one
_BYTES_SCORE = 26  # R×C: two float32 matrices, the mask, and a full list of int64 pairs
_BYTES_PAIR = 32  # P×D: two gathered float64 vectors, with the copies made on the way


def block_sizes(features: int, codes: int, dim: int, memory_mib: int) -> _BlockSizes:
    """Sizes of the blocks whose workspace stays within memory_mib: half vectors, 3/10 scores, 1/5 pairs.

    Raises:
        ValueError: not even one feature and one code fit.
    """
    budget = memory_mib * _MIB
    side = min(int(0.5 * budget / (2 * dim * _BYTES_VECTOR)), int((0.3 * budget / _BYTES_SCORE) ** 0.5))
    pairs = int(0.2 * budget / (dim * _BYTES_PAIR))
    if side < 1 or pairs < 1:
        needed = -(-dim * max(4 * _BYTES_VECTOR, 5 * _BYTES_PAIR) // _MIB)
        raise ValueError(
            f"memory_mib is {memory_mib}, too little for one vector of {dim} dimensions; "
            f"give at least {needed}"
        )
    rows = max(1, min(features, side))
    columns = min(
        codes, int((0.5 * budget - rows * dim * _BYTES_VECTOR) / (dim * _BYTES_VECTOR)),
        int(0.3 * budget / (_BYTES_SCORE * rows)),
    )  # fmt: skip
    return _BlockSizes(rows, max(1, columns), pairs)


def _fold(terms_PD: Tensor) -> Tensor:
    """Sum of each row, in an order that depends on D alone: halves are folded onto each other, in place.

    Equal rows give equal bits wherever they stand and on every device; a library's own sum promises neither.
    """
    width = terms_PD.shape[1]
    while width > 1:
        half = (width + 1) // 2
        terms_PD[:, : width - half] += terms_PD[:, half:width]
        width = half
    return terms_PD[:, 0]


def _sqrt(square_R: Tensor) -> Tensor:
    """IEEE's square root, as a GPU and the kernels have it.

    Torch's own on a CPU is the vector library's, off by a unit in the last place for 1 % of numbers (MKL's, torch
    2.15): enough to change the distance of a code almost parallel to the feature. Numpy takes the processor's.
    """
    return (
        torch.from_numpy(np.sqrt(square_R.detach().numpy()))
        if square_R.device.type == "cpu"
        else square_R.sqrt()
    )


def _vectors(stored_RD: Tensor, cosine: bool) -> tuple[Tensor, Tensor]:
    """The vectors that are compared, in float64, and which of them are zero (only cosine asks)."""
    exact_RD = stored_RD.double()
    if not cosine:
        return exact_RD, torch.zeros_like(exact_RD[:, 0], dtype=torch.bool)
    norm_R = _sqrt(_fold(exact_RD.square()))
    zero_R = norm_R == 0
    return exact_RD.div_(norm_R.masked_fill(zero_R, 1.0)[:, None]), zero_R


class _Codes(NamedTuple):
    """A block of codes as the float32 stage wants it."""

    shifted_CD: Tensor  # float32, centred and scaled
    norm_C: Tensor  # float32
    half_square_C: Tensor  # float32, ½‖e‖² plus the surcharge of a zero code
    cosine: bool


def _prepare(stored_CD: Tensor, cosine: bool, centre_D: Tensor, scale: Tensor) -> _Codes:
    exact_CD, zero_C = _vectors(stored_CD, cosine)
    shifted_CD = exact_CD.sub_(centre_D).mul_(scale).float()
    norm_C = torch.linalg.vector_norm(shifted_CD, dim=1, dtype=torch.float64)
    half_square_C = 0.5 * (norm_C.square() + zero_C * scale.square())
    return _Codes(shifted_CD, norm_C.float(), half_square_C.float(), cosine)


def _search(z_ND: Tensor, codes_KD: Tensor, cosine: bool, memory_mib: int) -> tuple[Tensor, Tensor]:
    count, dim = z_ND.shape
    total = codes_KD.shape[0]
    sizes = block_sizes(count, total, dim, memory_mib)
    index_N = torch.full((count,), total, dtype=torch.int64, device=z_ND.device)
    best_N = torch.full((count,), torch.inf, dtype=torch.float64, device=z_ND.device)
    if count == 0:
        return index_N, best_N.float()

    # A shift common to features and codes changes no distance, but would drown the differences in float32.
    centre_D = torch.zeros(dim, dtype=torch.float64, device=z_ND.device)
    for stored_CD in torch.split(codes_KD, sizes.codes):
        centre_D += _vectors(stored_CD, cosine)[0].sum(0)
    centre_D /= total
    # Scaled so that codes are of order one and features at most one: no float32 product can overflow.
    if cosine:
        scale = torch.ones((), dtype=torch.float64, device=z_ND.device)
    else:
        least, most = torch.aminmax(codes_KD)
        largest = torch.maximum(-least, most).double()
        scale = torch.where(largest == 0, 1.0, 1.0 / largest)

    blocks = torch.split(codes_KD, sizes.codes)
    only = _prepare(codes_KD, cosine, centre_D, scale) if len(blocks) == 1 else None
    for start in range(0, count, sizes.features):
        rows = slice(start, start + sizes.features)
        exact_RD, zero_R = _vectors(z_ND[rows], cosine)
        shifted_RD = exact_RD - centre_D
        norm_R = torch.linalg.vector_norm(shifted_RD, dim=1)
        divisor_R = torch.maximum(norm_R, 1.0 / scale)
        features_RD = shifted_RD.div_(divisor_R[:, None]).float()
        del shifted_RD
        length_R = (norm_R / divisor_R).float()
        weight_R = (1.0 / (scale * divisor_R)).float()
        limit_R = torch.full_like(length_R, torch.inf)
        first = 0
        for stored_CD in blocks:
            prepared = only or _prepare(stored_CD, cosine, centre_D, scale)
            pairs_P2 = _candidates(features_RD, length_R, weight_R, limit_R, zero_R, prepared)
            for pair_P2 in torch.split(pairs_P2, sizes.pairs):
                _resolve(exact_RD, stored_CD, cosine, pair_P2, first, total, best_N[rows], index_N[rows])
            first += stored_CD.shape[0]
        if cosine:
            index_N[rows].masked_fill_(zero_R, 0)
            best_N[rows].masked_fill_(zero_R, 2.0)
        broken_R = ~norm_R.isfinite()
        index_N[rows].masked_fill_(broken_R, -1)
        best_N[rows].masked_fill_(broken_R, torch.nan)
    return index_N, best_N.float()


def _candidates(
    features_RD: Tensor, length_R: Tensor, weight_R: Tensor, limit_R: Tensor, zero_R: Tensor, codes: _Codes
) -> Tensor:
    """Pairs (feature, code of the block) that may be the nearest; lowers limit_R, the score that must be
    met."""
    least_RC = _least_scores(features_RD, length_R, weight_R, codes)
    low_R, winner_R = least_RC.min(dim=1)
    dim = features_RD.shape[1]
    norm_R = codes.norm_C[winner_R]
    most_R = low_R + _margin(dim, length_R, weight_R, norm_R, codes.half_square_C[winner_R])
    # A code that is farther in truth may be nearer once both distances are rounded to float64: let it compete
    # too, so that the answer never depends on the blocks. It matters for features 1e8 times larger than the
    # codes.
    rounding = 1.01 * (dim.bit_length() + 3) * 2.0**-53
    most_R += rounding * (length_R.square() / weight_R + 2 * length_R * norm_R + weight_R * norm_R.square())
    if codes.cosine:
        # Dividing by the norms rounds each number: a distance may be off by 2^-51 of the unit vectors' length.
        most_R += 2.0**-49 * (length_R + 2 * weight_R)
    torch.minimum(limit_R, most_R, out=limit_R)
    # A zero feature under cosine is settled without a search; NaN compares false and leaves no candidate.
    return (least_RC <= limit_R.masked_fill(zero_R, -torch.inf)[:, None]).nonzero()


def _error_rates(dim: int) -> tuple[float, float, float]:
    """Bound on the error of a float32 score: (a, b, tiny) of a·‖z‖‖e‖ + b·weight·½‖e‖² + tiny.

    a counts one rounding (2^-24) for each of the D terms, in whatever order they are added, and some for
    rounding both inputs, the norms and the last steps; b the roundings of ½‖e‖²; tiny covers underflow,
    gradual or to zero.
    """
    return 1.01 * (dim + 16) * _UNIT, 1.01 * 24 * _UNIT, (dim + 16) * 2.0**-124


def _least_scores(features_RD: Tensor, length_R: Tensor, weight_R: Tensor, codes: _Codes) -> Tensor:
    """The least value that each pair's score, weight·½‖e‖² − z·e, can truly have (to within tiny).

    In these scaled units the score is the squared distance but for a factor and a term of the feature's own.
    """
    product_rate, square_rate, _ = _error_rates(features_RD.shape[1])
    least_RC = features_RD @ codes.shifted_CD.T
    least_RC.addr_(weight_R, codes.half_square_C * (1 - square_rate), beta=-1)
    return least_RC.addr_(length_R, codes.norm_C, alpha=-product_rate)


def _margin(dim: int, length_R: Tensor, weight_R: Tensor, norm_R: Tensor, half_square_R: Tensor) -> Tensor:
    """How far the true score of a pair can lie above its least value."""
    product_rate, square_rate, tiny = _error_rates(dim)
    return 2 * (product_rate * length_R * norm_R + square_rate * weight_R * half_square_R + tiny)


def _resolve(
    exact_RD: Tensor, stored_CD: Tensor, cosine: bool, pair_P2: Tensor, first: int, total: int,
    best_R: Tensor, index_R: Tensor,
) -> None:  # fmt: skip
    """Measure the candidates in float64 and keep, per feature, the least distance and its lowest index."""
    row_P, column_P = pair_P2.unbind(1)
    code_PD, zero_P = _vectors(stored_CD[column_P], cosine)
    difference_PD = code_PD.sub_(exact_RD[row_P])
    sqdist_P = _fold(difference_PD.square_())
    if cosine:
        sqdist_P = sqdist_P + zero_P  # |z/‖z‖ − 0|² is 1, but 2 − 2 cos is 2
    before_R = best_R.clone()
    best_R.scatter_reduce_(0, row_P, sqdist_P, "amin")
    index_R.masked_fill_(best_R < before_R, total)
    chosen_P = torch.where(sqdist_P == best_R[row_P], column_P + first, total)
    index_R.scatter_reduce_(0, row_P, chosen_P, "amin")
