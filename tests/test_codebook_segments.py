"""Segment sums and usage counts by the CUDA kernels, run on the CPU (codebook_shim.py)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from model.codebook import Codebook, kernels, quantize, segment_sum, segment_sum_dense
from model.codebook.choice import VARIABLE
from model.codebook.kernels import Kernels
from model.codebook.segment_sum import segment_sum_of_differences
from tests.hostile_codebooks import CASES, NAMES, Case, data

# Shapes: N = features, K = codes, D = feature dimension.


@pytest.fixture(autouse=True)
def by_kernels(shim: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "kernels", lambda: shim)
    monkeypatch.setenv(VARIABLE, "mma")


def indices(kind: str, n: int, k: int) -> Tensor:
    g = torch.Generator().manual_seed(n + k)
    index_N = torch.randint(-1, k, (n,), generator=g)
    if kind == "one":  # a collapsed codebook: one code spans many runs of 64 features
        index_N.fill_(k // 2)
    elif kind == "left out":
        index_N.fill_(-1)
    elif kind == "few":  # segments that begin and end anywhere in a run
        index_N = (index_N % min(4, k)).sort(descending=True)[0]
    elif kind == "runs":  # segments that end where runs do
        index_N = (torch.arange(n) // 64) % k
    return index_N


def exact_sums(z_ND: Tensor, index_N: Tensor, k: int) -> Tensor:
    some_N = index_N >= 0
    return torch.zeros(k, z_ND.shape[1], dtype=torch.float64).index_add_(
        0, index_N[some_N], z_ND[some_N].double()
    )


@pytest.mark.parametrize("kind", ["any", "one", "left out", "few", "runs"])
@pytest.mark.parametrize(("n", "k", "d"), [(0, 3, 5), (1, 1, 1), (63, 7, 1000), (64, 3, 130), (700, 20, 129)])
def test_sums_equal_float64(kind: str, n: int, k: int, d: int) -> None:
    index_N = indices(kind, n, k)
    z_ND = torch.randn(n, d, generator=torch.Generator().manual_seed(1))
    expected_KD = exact_sums(z_ND, index_N, k)
    dense_KD = segment_sum_dense(z_ND, index_N, k)
    torch.testing.assert_close(dense_KD, expected_KD.float(), rtol=1.2e-7, atol=1e-12)
    touched_T, sum_TD = segment_sum(z_ND, index_N, k)
    assert touched_T.dtype == torch.int64
    assert torch.equal(touched_T, index_N[index_N >= 0].unique())
    assert torch.equal(sum_TD, dense_KD[touched_T])
    assert torch.equal(segment_sum_dense(z_ND, index_N, k), dense_KD), "the same bits again"
    exact_KD = segment_sum_dense(z_ND.double(), index_N, k)
    assert exact_KD.dtype == torch.float64
    torch.testing.assert_close(exact_KD, expected_KD, rtol=1e-14, atol=1e-13)


def test_sums_come_in_the_order_of_the_features() -> None:
    z_N1 = torch.tensor([1e300, 1.0, -1e300] + [0.0] * 100, dtype=torch.float64)[:, None]
    assert segment_sum_dense(z_N1, torch.zeros(103, dtype=torch.int64), 1).item() == 0
    assert segment_sum_dense(z_N1[[0, 2, 1]], torch.zeros(3, dtype=torch.int64), 1).item() == 1


def test_codes_that_do_not_exist_are_left_out(shim: Kernels) -> None:
    """Not written beyond the result's end."""
    out_SD = torch.full((5, 3), torch.nan)
    out_SD[4] = 7
    order_N, slot_N = torch.arange(80), torch.tensor([0] * 2 + [4] * 77 + [9]).int()
    shim.segment_sum(torch.ones(80, 3), order_N, slot_N, out_SD[:4])
    assert out_SD[:, 0].tolist() == [2, 0, 0, 0, 7]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_of_differences(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(2)
    z_ND, code_ND = torch.randn(300, 40, generator=g).to(dtype), torch.randn(300, 40, generator=g)
    index_N, scale = indices("any", 300, 5), torch.tensor(0.37, dtype=torch.float64)
    found_KD = segment_sum_of_differences(code_ND, z_ND, scale, index_N, 5)
    expected_KD = scale * exact_sums(code_ND.double() - z_ND.double(), index_N, 5)
    torch.testing.assert_close(found_KD, expected_KD.float(), rtol=1.2e-7, atol=1e-12)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_usage_from_the_kernels_is_the_count_of_the_index(case: Case, metric: str) -> None:
    z_ND, codes_KD = data(case, 70, 150, 33)
    z_ND[3, 2] = torch.nan
    found = quantize(z_ND, codes_KD, metric)  # type: ignore[arg-type]
    chosen_M = found.index_N[found.index_N >= 0]
    assert len(chosen_M) == 69
    assert torch.equal(found.usage_K, chosen_M.bincount(minlength=150))


def test_codebook_takes_its_usage_and_moving_average_from_the_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Usage, moving average and revival with the kernels' counts equal those of torch alone."""
    z_ND = torch.randn(90, 6, generator=torch.Generator().manual_seed(3))

    def after_steps() -> list[Tensor]:
        book = Codebook(20, 6, init="normal", ema=0.9, revive_after=2)
        for part in z_ND.split(30):
            found = book(part)
            book.update(part, found.index_N, usage_K=found.usage_K)
        return [book.codes.detach(), book.usage_K, *book.upkeep.buffers()]  # type: ignore[union-attr]

    fused = after_steps()
    monkeypatch.setattr(kernels, "kernels", lambda: None)
    for a, b in zip(fused, after_steps(), strict=True):
        assert torch.equal(a, b)
    assert fused[1].sum() == 90


@pytest.mark.parametrize("dense", [False, True])
def test_index_on_another_device_is_refused_before_a_pointer_is_taken(
    dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Recorder:
        device_type, max_dim = "cuda", 100

        def usable(self, device: torch.device) -> bool:
            return True

        def segment_sum(self, *tensors: Tensor) -> Tensor:
            raise AssertionError(f"kernel with tensors on {[t.device.type for t in tensors[:4]]}")

    recorder = Recorder()
    monkeypatch.setattr(kernels, "kernels", lambda: recorder)
    with FakeTensorMode():
        z_ND, index_N = torch.zeros(4, 3, device="cuda"), torch.zeros(4, dtype=torch.int64)
        with pytest.raises(ValueError, match=r"one device, got cuda:0 and cpu"):
            (segment_sum_dense if dense else segment_sum)(z_ND, index_N, 2)
        code_ND, scale = torch.zeros(4, 3), torch.ones((), dtype=torch.float64, device="cuda")
        with pytest.raises(
            ValueError, match=r"codes \(4, 3\) on cuda:0, .* got torch.float32 \(4, 3\) on cpu"
        ):
            segment_sum_of_differences(code_ND, z_ND, scale, index_N.cuda(), 2)
        with pytest.raises(
            ValueError, match=r"float64 scalar on cuda:0 as scale, got torch.float64 \(\) on cpu"
        ):
            segment_sum_of_differences(code_ND.cuda(), z_ND, scale.cpu(), index_N.cuda(), 2)


@pytest.mark.parametrize(("z", "index"), [(torch.float32, torch.int32), (torch.int64, torch.int64)])
def test_other_types_are_refused(z: torch.dtype, index: torch.dtype) -> None:
    with pytest.raises(TypeError, match=rf"index int64, got {z} and {index}; convert first"):
        segment_sum(torch.zeros(4, 3, dtype=z), torch.zeros(4, dtype=index), 2)
