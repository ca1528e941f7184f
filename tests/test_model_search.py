"""The nearest code is exact: on every hostile input the choice equals a float64 brute force."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model.codebook import nearest_code, search
from model.codebook.kernels import Kernels
from tests.hostile_codebooks import (
    CASES,
    NAMES,
    Case,
    all_equal,
    collapsed,
    data,
    near_duplicates,
    offset,
    relu,
)

# Shapes: N = features, K = codes, D = feature dimension.


def _brute_force(z_ND: Tensor, codes_KD: Tensor, metric: str = "l2") -> Tensor:
    """Squared distances (N, K), summed in float64 from the stored values."""
    z_ND, codes_KD = z_ND.double(), codes_KD.double()
    if metric == "cosine":
        z_ND = z_ND / z_ND.norm(dim=1, keepdim=True).clamp_min(1e-300)
        codes_KD = codes_KD / codes_KD.norm(dim=1, keepdim=True).clamp_min(1e-300)
        # A zero vector has cosine 0 to everything.
        return torch.where(
            (z_ND == 0).all(1)[:, None] | (codes_KD == 0).all(1)[None],
            2.0,
            (z_ND[:, None] - codes_KD[None]).square().sum(-1),
        )
    return torch.stack([(z_D - codes_KD).square().sum(1) for z_D in z_ND])


def _folded(z_ND: Tensor, codes_KD: Tensor) -> Tensor:
    """The documented sum: the second half of the terms is added onto the first, until one is left."""
    terms_NKD = (z_ND.double()[:, None] - codes_KD.double()[None]).square()
    while terms_NKD.shape[-1] > 1:
        half = (terms_NKD.shape[-1] + 1) // 2
        padded_NKD = torch.nn.functional.pad(terms_NKD, (0, 2 * half - terms_NKD.shape[-1]))
        terms_NKD = padded_NKD[..., :half] + padded_NKD[..., half:]
    return terms_NKD[..., 0]


def _assert_exact(z_ND: Tensor, codes_KD: Tensor, metric: str = "l2", memory_mib: int = 256) -> None:
    index_N, sqdist_N = nearest_code(z_ND, codes_KD, metric, memory_mib=memory_mib)  # type: ignore[arg-type]
    assert index_N.dtype == torch.int64
    assert sqdist_N.dtype == torch.float32
    assert index_N.shape == sqdist_N.shape == z_ND.shape[:1]
    exact_NK = _brute_force(z_ND, codes_KD, metric)
    least_N = exact_NK.min(1).values
    chosen_N = exact_NK.gather(1, index_N[:, None])[:, 0]
    # Under cosine the reference normalises on its own, which moves each number by some 1e-16.
    slack = 1e-15 if metric == "cosine" else 0.0
    assert torch.all(chosen_N <= least_N * (1 + 1e-12) + slack)
    if metric == "l2":
        assert torch.equal(index_N, _folded(z_ND, codes_KD).argmin(1)), (
            "not the least of the sums as documented"
        )
    for row, index in enumerate(index_N.tolist()):
        same_K = (codes_KD == codes_KD[index]).all(1)
        assert index == int(same_K.nonzero()[0]), f"row {row}: a lower index holds the same code"
    torch.testing.assert_close(
        sqdist_N, least_N.float(), rtol=1e-6, atol=1e-14 if metric == "cosine" else 1e-37
    )


@pytest.mark.parametrize("case", CASES, ids=NAMES)
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_exact_on_hostile_data(case: Case, metric: str) -> None:
    _assert_exact(*data(case, 63, 301, 130), metric=metric)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_exact_in_many_blocks(case: Case) -> None:
    z_ND, codes_KD = data(case, 250, 333, 65)
    sizes = search.block_sizes(250, 333, 65, memory_mib=1)
    assert sizes.features < 250
    assert sizes.codes < 333
    _assert_exact(z_ND, codes_KD, memory_mib=1)
    small = nearest_code(z_ND, codes_KD, memory_mib=1)
    large = nearest_code(z_ND, codes_KD)
    assert torch.equal(small[0], large[0])
    assert torch.equal(small[1], large[1])


@pytest.mark.parametrize("case", [CASES[0], near_duplicates, offset, collapsed])
def test_exact_at_the_trunk_dimension(case: Case) -> None:
    _assert_exact(*data(case, 40, 300, 2048))


@pytest.mark.parametrize(
    ("n", "k", "d"), [(0, 5, 3), (1, 1, 1), (1, 1000, 63), (1000, 1, 7), (63, 2, 1), (5, 3, 1000)]
)
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_odd_and_smallest_sizes(n: int, k: int, d: int, metric: str) -> None:
    z_ND, codes_KD = data(CASES[0], n, k, d)
    if n:
        _assert_exact(z_ND, codes_KD, metric)
    else:
        index_N, sqdist_N = nearest_code(z_ND, codes_KD, metric)  # type: ignore[arg-type]
        assert index_N.shape == sqdist_N.shape == (0,)


@pytest.mark.parametrize("z_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("codes_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_may_differ_and_stored_values_count(z_dtype: torch.dtype, codes_dtype: torch.dtype) -> None:
    z_ND, codes_KD = data(relu, 64, 200, 96)
    _assert_exact(z_ND.to(z_dtype), codes_KD.to(codes_dtype))


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_error_bound_holds(case: Case) -> None:
    """The certificate itself: least score <= true score <= least score + margin, for every pair."""
    z_ND, codes_KD = data(case, 50, 200, 512)
    centre_D = codes_KD.double().mean(0)
    scale = 1 / codes_KD.abs().max().double()
    codes = search._prepare(codes_KD, False, centre_D, scale)
    shifted_ND = z_ND.double() - centre_D
    divisor_N = shifted_ND.norm(dim=1).maximum(1 / scale)
    length_N = (shifted_ND.norm(dim=1) / divisor_N).float()
    weight_N = (1 / (scale * divisor_N)).float()
    least_NK = search._least_scores(
        (shifted_ND / divisor_N[:, None]).float(), length_N, weight_N, codes
    ).double()
    margin_NK = search._margin(512, length_N[:, None], weight_N[:, None], codes.norm_C, codes.half_square_C)
    code_KD = codes_KD.double() - centre_D
    true_NK = (0.5 * code_KD.square().sum(1) - shifted_ND @ code_KD.T) * scale / divisor_N[:, None]
    tiny = search._error_rates(512)[2]
    # The true scores are themselves rounded, in float64.
    rounding_NK = 1e-12 * (true_NK.abs() + margin_NK)
    assert torch.all(least_NK <= true_NK + tiny + rounding_NK)
    assert torch.all(true_NK <= least_NK + margin_NK + rounding_NK)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_reduced_precision_elsewhere_changes_nothing(precision: str) -> None:
    z_ND, codes_KD = data(near_duplicates, 200, 300, 512)
    expected = nearest_code(z_ND, codes_KD)
    torch.set_float32_matmul_precision(precision)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            found = nearest_code(z_ND, codes_KD)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(expected[0], found[0])
    assert torch.equal(expected[1], found[1])
    _assert_exact(z_ND, codes_KD)


def test_products_are_full_float32_inside_and_as_before_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not every CPU and GPU has a faster product to fall for, so look at the switches themselves."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined, unused-ignore]
    inside = []
    search_itself = search._search

    def spy(*args: Any) -> tuple[Tensor, Tensor]:
        inside.extend(backend.fp32_precision for backend in backends)
        return search_itself(*args)

    monkeypatch.setattr(search, "_search", spy)
    torch.set_float32_matmul_precision("medium")
    try:
        before = [backend.fp32_precision for backend in backends]
        nearest_code(*data(CASES[0], 3, 4, 5))
        assert [backend.fp32_precision for backend in backends] == before
        assert "ieee" not in before
    finally:
        torch.set_float32_matmul_precision("highest")
    assert inside == ["ieee", "ieee"]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_non_finite_features_are_flagged(bad: float, metric: str) -> None:
    z_ND, codes_KD = data(CASES[0], 9, 20, 33)
    expected_N, _ = nearest_code(z_ND, codes_KD, metric)  # type: ignore[arg-type]
    z_ND[4, 7] = bad
    index_N, sqdist_N = nearest_code(z_ND, codes_KD, metric)  # type: ignore[arg-type]
    assert index_N[4] == -1
    assert sqdist_N[4].isnan()
    others_N = torch.arange(9) != 4
    assert torch.equal(index_N[others_N], expected_N[others_N])
    assert sqdist_N[others_N].isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_non_finite_code_flags_every_feature(bad: float, metric: str) -> None:
    z_ND, codes_KD = data(CASES[0], 9, 20, 33)
    codes_KD[3, 2] = bad
    index_N, sqdist_N = nearest_code(z_ND, codes_KD, metric)  # type: ignore[arg-type]
    assert index_N.tolist() == [-1] * 9
    assert sqdist_N.isnan().all()


def test_cosine_of_zero_vectors() -> None:
    z_ND, codes_KD = data(CASES[0], 6, 8, 5)
    z_ND[2] = 0
    codes_KD[3] = 0
    index_N, sqdist_N = nearest_code(z_ND, codes_KD, "cosine")
    assert index_N[2] == 0
    assert sqdist_N[2] == 2
    _assert_exact(
        -codes_KD[4:5], codes_KD[[3, 4]], "cosine"
    )  # the zero code (cosine 0) beats the opposite one (−1)
    assert nearest_code(-codes_KD[4:5], codes_KD[[3, 4]], "cosine")[0].item() == 0
    # A distance to the zero code of 1 instead of 2 would wrongly beat a cosine of 0.1.
    turned_1D = torch.tensor([[0.1, 0.99498743710662]])
    assert nearest_code(turned_1D, torch.tensor([[0.0, 0.0], [1.0, 0.0]]), "cosine")[0].item() == 1


def test_cosine_is_two_minus_two_cos() -> None:
    z_ND, codes_KD = data(CASES[0], 30, 40, 64)
    index_N, sqdist_N = nearest_code(z_ND, codes_KD, "cosine")
    cos_NK = torch.nn.functional.cosine_similarity(z_ND[:, None].double(), codes_KD[None].double(), dim=-1)
    assert torch.equal(index_N, cos_NK.argmax(1))
    torch.testing.assert_close(sqdist_N, (2 - 2 * cos_NK.max(1).values).float())


def test_vectors_of_cosine_have_ieee_norms() -> None:
    """Torch's square root on a CPU is not IEEE's, which CUDA, the kernels and numpy have."""
    z_ND = torch.randn(100_000, 3, generator=torch.Generator().manual_seed(4))
    x, y, z = (z_ND[:, column].double().numpy() for column in range(3))
    norm_N = np.sqrt((x * x + z * z) + y * y)  # folded by halves
    found_ND, zero_N = search._vectors(z_ND, True)
    assert not zero_N.any()
    for column, values_N in enumerate((x, y, z)):
        assert np.array_equal(found_ND[:, column].numpy(), values_N / norm_N)


@pytest.mark.parametrize("dim", [2, 3, 40])
def test_cosine_of_almost_parallel_vectors_has_the_bits_of_the_kernels(shim: Kernels, dim: int) -> None:
    g = torch.Generator().manual_seed(dim)
    codes_KD = torch.randn(500, dim, generator=g)
    z_ND = codes_KD[torch.randint(500, (4000,), generator=g)] * (0.1 + 3 * torch.rand(4000, 1, generator=g))
    index_N, sqdist_N = search.search_in_blocks(z_ND, codes_KD, True, 256)
    found = shim.search(z_ND, codes_KD, True, shim.prepare(codes_KD, True))
    assert torch.equal(found.index_N, index_N)
    assert torch.equal(found.sqdist_N, sqdist_N)


def _peak_bytes(work: Callable[[], object]) -> int:
    """Most bytes that tensors made by `work` held at one time."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as seen:
        work()
    live = peak = 0
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize(
    ("case", "n", "k", "d", "memory_mib"),
    [(CASES[0], 100, 3000, 4, 1), (all_equal, 100, 3000, 4, 1), (CASES[0], 30, 400, 2048, 6)],
)
def test_workspace_stays_within_the_budget(
    case: Case, metric: str, n: int, k: int, d: int, memory_mib: int
) -> None:
    z_ND, codes_KD = data(case, n, k, d)
    sizes = search.block_sizes(n, k, d, memory_mib)
    assert sizes.features < n or sizes.codes < k
    peak = _peak_bytes(lambda: search._search(z_ND, codes_KD, metric == "cosine", memory_mib))
    assert 4 * sizes.features * sizes.codes < peak <= memory_mib << 20


def test_too_small_a_budget_says_what_is_needed() -> None:
    with pytest.raises(ValueError, match="give at least 4"):
        nearest_code(torch.zeros(1, 20_000), torch.zeros(1, 20_000), memory_mib=1)
    nearest_code(torch.zeros(1, 20_000), torch.zeros(1, 20_000), memory_mib=4)


def test_operator_is_well_formed_and_compiles_whole() -> None:
    z_ND, codes_KD = data(CASES[0], 13, 17, 8)
    torch.library.opcheck(torch.ops.vqsa.nearest_code.default, (z_ND, codes_KD, "l2", 256))
    compiled = torch.compile(nearest_code, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(z_ND, codes_KD)[0], nearest_code(z_ND, codes_KD)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=NAMES)
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_cuda_gives_the_same_bits(case: Case, metric: str) -> None:
    z_ND, codes_KD = data(case, 63, 301, 130)
    expected = nearest_code(z_ND, codes_KD, metric)  # type: ignore[arg-type]
    found = nearest_code(z_ND.cuda(), codes_KD.cuda(), metric)  # type: ignore[arg-type]
    assert torch.equal(expected[0], found[0].cpu())
    assert torch.equal(expected[1], found[1].cpu())


@pytest.mark.parametrize(
    ("z", "codes", "kwargs", "error", "match"),
    [
        (torch.zeros(2, 3), torch.zeros(4, 5), {}, ValueError, r"\(2, 3\) and \(4, 5\)"),
        (torch.zeros(2, 3, 1), torch.zeros(4, 3), {}, ValueError, "flatten feature maps"),
        (torch.zeros(2, 3), torch.zeros(0, 3), {}, ValueError, "at least one code"),
        (torch.zeros(2, 0), torch.zeros(4, 0), {}, ValueError, "at least one code"),
        (torch.zeros(2, 3).double(), torch.zeros(4, 3), {}, TypeError, "float64"),
        (torch.zeros(2, 3), torch.zeros(4, 3, device="meta"), {}, ValueError, "one device"),
        (torch.zeros(2, 3), torch.zeros(4, 3), {"metric": "l1"}, ValueError, "'l1'"),
        (torch.zeros(2, 3), torch.zeros(4, 3), {"impl": "magic"}, ValueError, "'magic'"),
    ],
)
def test_bad_input(z: Tensor, codes: Tensor, kwargs: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        nearest_code(z, codes, **kwargs)
