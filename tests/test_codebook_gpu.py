"""The fused codebook search on a GPU: exact there too, on any stream, captured in a graph, within its memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from model.codebook import (
    Codebook,
    PreparedCodebook,
    kernels,
    nearest_code,
    quantize,
    segment_sum,
    segment_sum_dense,
    unchanged,
)
from model.codebook.choice import VARIABLE, hostile_problem, variant_for
from model.codebook.kernels import APART, TILE_ANY, TILE_AUTO, TILE_HOPPER, Kernels
from model.codebook.search import search_in_blocks
from tests import test_codebook_accumulation
from tests.hostile_codebooks import CASES, NAMES, Case, all_equal, collapsed, data, near_duplicates, relu
from tests.test_codebook_accumulation import Where, assert_exact_over_cancelling, assert_within_rate
from tests.test_codebook_kernels import TILES, assert_accumulation_within_rate, check

pytestmark = pytest.mark.gpu

# Shapes: N = features, K = codes, D = feature dimension.


@pytest.fixture(scope="module")
def built() -> Kernels:
    found = kernels.kernels()
    assert found is not None, "built without nvcc: reinstall vqsa where nvcc is found"
    return found


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on_gpu(case: Case, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    z_ND, codes_KD = data(case, n, k, d)
    return z_ND.cuda(), codes_KD.cuda()


@pytest.mark.parametrize("case", CASES, ids=NAMES)
@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("tile", TILES)
def test_exact_on_hostile_data(built: Kernels, case: Case, metric: str, tile: str) -> None:
    z_ND, codes_KD = data(case, 163, 1301, 130)
    cosine = metric == "cosine"
    expected = search_in_blocks(z_ND, codes_KD, cosine, 256)
    z_ND, codes_KD = z_ND.cuda(), codes_KD.cuda()
    found = built.search(z_ND, codes_KD, cosine, built.prepare(codes_KD, cosine), tile=TILES[tile])
    assert torch.equal(found.index_N.cpu(), expected[0])
    assert torch.equal(found.sqdist_N.cpu(), expected[1])


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("k", "d"), [(300, 65), (1000, 2048), (100_000, 512)])
def test_few_features_get_the_answers_they_get_among_many(
    built: Kernels, k: int, d: int, tile: str, metric: str
) -> None:
    """Few are converted in the launch of the search, whose blocks wait for each other."""
    z_ND, codes_KD = on_gpu(near_duplicates, 300, k, d)
    cosine = metric == "cosine"
    prepared = built.prepare(codes_KD, cosine)
    expected = built.search(z_ND, codes_KD, cosine, prepared, gather=True, tile=TILES[tile])
    blocks = torch.cuda.get_device_properties().multi_processor_count
    for n in (1, 7, min(128, blocks)):
        for apart in (0, APART):
            few_ND = z_ND[:n].contiguous()
            before = built.together()
            found = built.search(few_ND, codes_KD, cosine, prepared, gather=True, tile=TILES[tile] + apart)
            assert built.together() - before == (apart == 0), "blocks of this device do not run side by side"
            for a, b in zip(found, expected, strict=True):
                assert torch.equal(a, b[:n])


hopper_only = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="not a Hopper GPU"
)


@hopper_only
def test_hopper_kernel_passes_its_trial_and_is_chosen(
    built: Kernels, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    device = torch.device("cuda", torch.cuda.current_device())
    variant_for(built, device)
    torch.cuda.synchronize()
    assert variant_for(built, device).tile == TILE_ANY, [str(w.message) for w in recwarn]


@hopper_only
def test_hopper_kernel_does_not_stall_on_its_trial(built: Kernels) -> None:
    z_ND, codes_KD = hostile_problem(421, 20_000, 328, torch.device("cuda"))
    ready = built.prepare(codes_KD, False)
    alarm_1 = torch.zeros(1, dtype=torch.int32, device="cuda")
    found = built.search(z_ND, codes_KD, False, ready, tile=TILE_HOPPER, alarm_1=alarm_1)
    assert alarm_1.item() == 0, "it waited in vain: tensor maps, bytes expected or phases are wrong"
    expected = built.search(z_ND, codes_KD, False, ready, tile=TILE_AUTO)
    wrong = (found.index_N != expected.index_N).sum().item()
    assert wrong == 0, "its products are wrong: descriptors, swizzle or fragments"
    assert torch.equal(found.sqdist_N, expected.sqdist_N)


@pytest.mark.parametrize("kind", ["any", "one code"])
@pytest.mark.parametrize(("n", "k", "d"), [(700, 20, 129), (6272, 10_000, 2048), (25_088, 1000, 768)])
def test_segment_sums_are_float64s_and_the_same_bits_every_time(kind: str, n: int, k: int, d: int) -> None:
    z_ND = torch.randn(n, d, device="cuda")
    index_N = (
        torch.randint(-1, k, (n,), device="cuda") if kind == "any" else torch.full((n,), 3, device="cuda")
    )
    some_N = index_N >= 0
    exact_KD = torch.zeros(k, d, dtype=torch.float64, device="cuda")
    exact_KD.index_add_(0, index_N[some_N], z_ND[some_N].double())
    found_KD = segment_sum_dense(z_ND, index_N, k)
    torch.testing.assert_close(found_KD, exact_KD.float(), rtol=1.2e-7, atol=1e-10)
    for _ in range(3):
        assert torch.equal(segment_sum_dense(z_ND, index_N, k), found_KD)
    touched_T, sum_TD = segment_sum(z_ND, index_N, k)
    assert torch.equal(sum_TD, found_KD[touched_T])


@hopper_only
@pytest.mark.parametrize("case", CASES, ids=NAMES)
@pytest.mark.parametrize(("n", "k", "d"), [(163, 1301, 130), (1000, 3000, 2048)])
def test_hopper_variant_is_exact(case: Case, n: int, k: int, d: int) -> None:
    z_ND, codes_KD = on_gpu(case, n, k, d)
    found, expected = nearest_code(z_ND, codes_KD, impl="hopper"), nearest_code(z_ND, codes_KD, impl="cuda")
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("case", [*CASES[:8], all_equal], ids=[*NAMES[:8], "all_equal"])
@pytest.mark.parametrize(("n", "k", "d"), [(128, 100_000, 512), (6272, 10_000, 2048), (25_088, 1000, 768)])
def test_exact_at_the_sizes_that_matter(built: Kernels, case: Case, n: int, k: int, d: int) -> None:
    z_ND, codes_KD = on_gpu(case, n, k, d)
    found = quantize(z_ND, codes_KD)
    some_N = torch.arange(0, n, max(1, n // 256), device="cuda")
    index_N, sqdist_N = nearest_code(z_ND[some_N], codes_KD, impl="torch", memory_mib=4096)
    assert torch.equal(found.index_N[some_N], index_N)
    assert torch.equal(found.sqdist_N[some_N], sqdist_N)
    assert torch.equal(found.quantised_ND, codes_KD[found.index_N])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "k", "d"), [(0, 5, 7), (1, 1, 1), (1, 777, 63), (333, 3, 1025)])
def test_dtypes_and_odd_sizes(built: Kernels, dtype: torch.dtype, n: int, k: int, d: int) -> None:
    z_ND, codes_KD = on_gpu(relu, n, k, d)
    check(built, z_ND.to(dtype), codes_KD)
    check(built, z_ND, codes_KD.to(dtype), "cosine")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_flagged(bad: float) -> None:
    z_ND, codes_KD = on_gpu(CASES[0], 300, 500, 64)
    expected_N = nearest_code(z_ND, codes_KD)[0]
    z_ND[7, 3] = bad
    found = quantize(z_ND, codes_KD)
    expected_N[7] = -1
    assert torch.equal(found.index_N, expected_N)
    assert not found.vq_loss.isfinite()
    codes_KD[5, 5] = bad
    assert (nearest_code(z_ND, codes_KD)[0] == -1).all()


@pytest.mark.parametrize("tile", [*TILES, pytest.param("hopper", marks=hopper_only)])
@pytest.mark.parametrize("signs", ["random", "positive"])
def test_accumulation_of_this_gpu_stays_within_its_rate(built: Kernels, tile: str, signs: str) -> None:
    dims = (64, 512, 2048, 8192)
    code = {**TILES, "hopper": TILE_HOPPER}[tile]
    assert_accumulation_within_rate(built, code, signs, torch.device("cuda"), 256, 1024, dims)


@pytest.mark.parametrize("tile", [*TILES, pytest.param("hopper", marks=hopper_only)])
@pytest.mark.parametrize("where", test_codebook_accumulation.CASES, ids=test_codebook_accumulation.NAMES)
def test_large_and_cancelling_products_stay_within_the_rate_of_this_gpu(
    built: Kernels, where: Where, tile: str
) -> None:
    cuda, code = torch.device("cuda"), {**TILES, "hopper": TILE_HOPPER}[tile]
    assert_within_rate(built, code, where, cuda, 130, 300, (32, 64, 512, 2048, 8192))
    assert_exact_over_cancelling(built, code, where, cuda, 300, 3000, 2048)


@pytest.mark.parametrize("n", [100, 500])
def test_no_call_waits_for_the_device(n: int) -> None:
    z_ND, codes_KD = (t.requires_grad_() for t in on_gpu(near_duplicates, n, 2000, 256))

    def step() -> None:
        found = quantize(z_ND, codes_KD, prepared=PreparedCodebook(codes_KD))
        (found.vq_loss + found.commit_loss + found.quantised_ND.sum()).backward()

    step()  # what only a first call does, such as queuing the Hopper kernel's trial, may wait
    with no_waiting():
        step()
        step()


@pytest.mark.parametrize("n", [100, 500])
@pytest.mark.parametrize("case", [relu, collapsed])
def test_runs_in_a_cuda_graph_on_another_stream(case: Case, n: int) -> None:
    z_ND, codes_KD = on_gpu(case, n, 2000, 256)
    other_ND = z_ND.flip(0).contiguous()
    expected = [quantize(z_ND, codes_KD), quantize(other_ND, codes_KD)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert torch.equal(quantize(z_ND, codes_KD).index_N, expected[0].index_N)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    still_ND = z_ND.clone()
    with torch.cuda.graph(graph):
        found = quantize(still_ND, codes_KD)
    for features_ND, right in zip((z_ND, other_ND, z_ND), [*expected, expected[0]], strict=True):
        still_ND.copy_(features_ND)
        graph.replay()
        for a, b in zip(found, right, strict=True):
            assert torch.equal(a, b)


def test_codes_prepared_once_are_exact_on_other_streams_and_not_captured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    z_ND, codes_KD = on_gpu(near_duplicates, 500, 2000, 256)
    book = Codebook(2000, 256, init="normal").cuda().eval()
    prepared: list[Tensor] = []
    itself = Kernels.prepare

    def counted(self: Kernels, codes_KD: Tensor, *rest: Any) -> Tensor:
        prepared.append(codes_KD)
        return itself(self, codes_KD, *rest)

    def assert_exact(index_N: Tensor) -> None:
        assert torch.equal(index_N, nearest_code(z_ND, book.codes.detach(), impl="torch")[0])

    monkeypatch.setattr(Kernels, "prepare", counted)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.no_grad():
        book.codes.copy_(codes_KD)
        assert_exact(book(z_ND).index_N)
        prepared.clear()
        with unchanged(book):
            for _ in range(2):
                assert_exact(book(z_ND).index_N)
            assert len(prepared) == 1
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                aside = book(z_ND)
            torch.cuda.current_stream().wait_stream(stream)
            assert_exact(aside.index_N)
            assert len(prepared) == 2
            with torch.cuda.graph(graph):
                captured = book(z_ND)
        for factor in (1.5, 0.5):
            book.codes.mul_(factor)
            graph.replay()
            assert_exact(captured.index_N)


def test_steps_of_a_fused_optimiser_are_seen_on_cuda() -> None:
    z_ND, codes_KD = on_gpu(near_duplicates, 500, 2000, 256)
    book = Codebook(2000, 256, init="normal").cuda()
    with torch.no_grad():
        book.codes.copy_(codes_KD)
    optimiser = torch.optim.Adam(book.parameters(), lr=0.1, fused=True)
    for _ in range(3):
        with unchanged(book):
            for _ in range(2):  # micro-batches
                found = book(z_ND)
                found.vq_loss.backward()
                assert torch.equal(found.index_N, nearest_code(z_ND, book.codes, impl="torch")[0])
        optimiser.step()


@pytest.mark.parametrize(("n", "k"), [(128, 100_000), (6272, 10_000), (25_088, 10_000)])
def test_memory_beyond_outputs_and_prepared_codebook(built: Kernels, n: int, k: int) -> None:
    d = 2048
    z_ND, codes_KD = torch.rand(n, d, device="cuda"), torch.rand(k, d, device="cuda")
    quantize(z_ND, codes_KD)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    quantize(z_ND, codes_KD)
    outputs = n * (4 * d + 8 + 4 + 8) + 8 * k
    taken = torch.cuda.max_memory_allocated() - before - outputs - built.prepared_bytes(k, d, False)
    assert taken <= 64_000_000


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_losses_and_gradients_are_as_good_as_plain_pytorch(metric: str) -> None:
    """Error against float64 at most twice that of the same formulas in float32 torch."""
    z_ND, codes_KD = on_gpu(relu, 3000, 200, 512)
    index_N = nearest_code(z_ND, codes_KD, metric, impl="torch")[0]  # type: ignore[arg-type]

    def plain(dtype: torch.dtype) -> list[Tensor]:
        z, codes = (t.to(dtype, copy=True).requires_grad_() for t in (z_ND, codes_KD))
        code = codes[index_N]
        vq, commit = (code - z.detach()).square().mean(), (z - code.detach()).square().mean()
        (vq + 0.25 * commit).backward()
        return [vq, commit, z.grad, codes.grad]

    z, codes = (t.detach().clone().requires_grad_() for t in (z_ND, codes_KD))
    found = quantize(z, codes, metric)  # type: ignore[arg-type]
    (found.vq_loss + 0.25 * found.commit_loss).backward()
    ours = [found.vq_loss, found.commit_loss, z.grad, codes.grad]
    for a, b, exact in zip(ours, plain(torch.float32), plain(torch.float64), strict=True):
        spacing = 2.0**-24 * exact.abs().max()  # half a unit in the last place: no float32 answer is nearer
        assert (a - exact).abs().max() <= 2 * (b - exact).abs().max() + spacing


def test_operators_are_well_formed_and_compile_whole_on_cuda() -> None:
    z_ND, codes_KD = on_gpu(relu, 40, 60, 32)
    torch.library.opcheck(torch.ops.vqsa.nearest_code.default, (z_ND, codes_KD, "l2", 256))
    z_ND.requires_grad_()
    codes_KD.requires_grad_()
    torch.library.opcheck(torch.ops.vqsa.quantize.default, (z_ND, codes_KD, "cosine", 256))
    compiled = torch.compile(quantize, fullgraph=True)
    for a, b in zip(compiled(z_ND, codes_KD), quantize(z_ND, codes_KD), strict=True):
        torch.testing.assert_close(a, b)
