"""Quantisation: values, gradients and segment sums against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.codebook import nearest_code, quantize, segment_sum, segment_sum_dense

# Shapes: N = features, K = codes, D = feature dimension.


def _data(n: int = 40, k: int = 12, d: int = 24) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    return torch.randn(n, d, generator=g), torch.randn(k, d, generator=g)


def _reference(
    z_ND: Tensor, codes_KD: Tensor, index_N: Tensor, reduction: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Value and the two losses in float64 by plain autograd; also the straight-through output."""
    code_ND = codes_KD[index_N]
    vq_ND = (code_ND - z_ND.detach()) ** 2
    commit_ND = (z_ND - code_ND.detach()) ** 2
    divisor = z_ND.numel() if reduction == "mean" else len(z_ND)
    return code_ND, vq_ND.sum() / divisor, commit_ND.sum() / divisor, z_ND + (code_ND - z_ND).detach()


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_values_and_gradients_equal_float64(metric: str, reduction: str) -> None:
    z_ND, codes_KD = _data()
    z_ND.requires_grad_()
    codes_KD.requires_grad_()
    weight_ND = torch.randn(z_ND.shape, generator=torch.Generator().manual_seed(1))
    found = quantize(z_ND, codes_KD, metric, reduction)  # type: ignore[arg-type]
    (found.vq_loss + 0.25 * found.commit_loss + (found.quantised_ND * weight_ND).sum()).backward()

    z64_ND = z_ND.detach().double().requires_grad_()
    codes64_KD = codes_KD.detach().double().requires_grad_()
    unit = torch.nn.functional.normalize
    far_NK = (
        torch.cdist(unit(z64_ND), unit(codes64_KD)) if metric == "cosine" else torch.cdist(z64_ND, codes64_KD)
    )
    index_N = far_NK.argmin(1)
    code_ND, vq, commit, through_ND = _reference(z64_ND, codes64_KD, index_N, reduction)
    (vq + 0.25 * commit + (through_ND * weight_ND).sum()).backward()

    assert torch.equal(found.index_N, index_N)
    assert torch.equal(found.quantised_ND, code_ND.float()), "the value is the code to the last bit"
    torch.testing.assert_close(found.vq_loss, vq.float())
    torch.testing.assert_close(found.commit_loss, commit.float())
    assert z_ND.grad is not None
    assert codes_KD.grad is not None
    torch.testing.assert_close(z_ND.grad, z64_ND.grad.float(), rtol=1e-6, atol=1e-7)  # type: ignore[union-attr]
    torch.testing.assert_close(codes_KD.grad, codes64_KD.grad.float(), rtol=1e-5, atol=1e-7)  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_twice_that_of_plain_pytorch(dtype: torch.dtype) -> None:
    """Against float64 of the same stored values; plain is the same formulas with autograd in float32."""
    z_ND, codes_KD = _data(3000, 20, 64)
    z_ND = (z_ND * 3 + 1).to(dtype)
    index_N = nearest_code(z_ND, codes_KD)[0]

    def plain(precision: torch.dtype) -> list[Tensor]:
        z, codes = (t.to(precision, copy=True).requires_grad_() for t in (z_ND, codes_KD))
        code = codes[index_N]
        vq, commit = (code - z.detach()).square().mean(), (z - code.detach()).square().mean()
        (vq + 0.25 * commit).backward()
        assert z.grad is not None
        assert codes.grad is not None
        return [vq, commit, z.grad.to(dtype), codes.grad]

    z, codes = z_ND.clone().requires_grad_(), codes_KD.clone().requires_grad_()
    found = quantize(z, codes)
    (found.vq_loss + 0.25 * found.commit_loss).backward()
    assert z.grad is not None
    assert codes.grad is not None
    ours = [found.vq_loss, found.commit_loss, z.grad, codes.grad]
    for a, b, exact in zip(ours, plain(torch.float32), plain(torch.float64), strict=True):
        rounding = 2.0**-24 * exact.abs().max().double()  # half a unit in the last place of float32
        assert (a.double() - exact).abs().max() <= 2 * (b.double() - exact).abs().max() + rounding


def test_each_loss_moves_only_its_own_side() -> None:
    z_ND, codes_KD = (t.requires_grad_() for t in _data())
    found = quantize(z_ND, codes_KD)
    assert torch.autograd.grad(found.vq_loss, z_ND, allow_unused=True, retain_graph=True)[0] is None
    assert torch.autograd.grad(found.commit_loss, codes_KD, allow_unused=True, retain_graph=True)[0] is None
    assert torch.autograd.grad(found.vq_loss, codes_KD, retain_graph=True)[0].abs().sum() > 0
    assert torch.autograd.grad(found.commit_loss, z_ND, retain_graph=True)[0].abs().sum() > 0
    # Straight through: the output's gradient arrives at z as it is, and the codes get none.
    through_ND = torch.randn_like(z_ND)
    z_grad, codes_grad = torch.autograd.grad(
        found.quantised_ND, (z_ND, codes_KD), through_ND, allow_unused=True
    )
    assert torch.equal(z_grad, through_ND)
    assert codes_grad is None


def test_sum_reduction_is_the_mean_of_squared_norms() -> None:
    z_ND, codes_KD = _data()
    mean, total = quantize(z_ND, codes_KD), quantize(z_ND, codes_KD, reduction="sum")
    torch.testing.assert_close(total.vq_loss, mean.vq_loss * z_ND.shape[1])
    torch.testing.assert_close(total.vq_loss, total.sqdist_N.mean())


def test_float32_island_under_autocast_and_for_half_features() -> None:
    z_ND, codes_KD = _data()
    half_ND = z_ND.bfloat16().requires_grad_()
    expected = quantize(half_ND.detach().float(), codes_KD)
    with torch.autocast("cpu", torch.bfloat16):
        found = quantize(half_ND, codes_KD)
    assert found.quantised_ND.dtype == found.vq_loss.dtype == torch.float32
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    found.commit_loss.backward()
    assert half_ND.grad is not None
    assert half_ND.grad.dtype == torch.bfloat16


def test_non_finite_feature_makes_the_losses_non_finite() -> None:
    z_ND, codes_KD = _data()
    z_ND[3, 1] = torch.nan
    found = quantize(z_ND, codes_KD)
    assert found.index_N[3] == -1
    assert found.vq_loss.isnan()
    assert found.commit_loss.isnan()


def test_a_code_that_is_not_finite_makes_the_losses_non_finite() -> None:
    z_ND, codes_KD = _data()
    codes_KD[3, 1] = torch.inf
    for centre_D in (None, torch.zeros(24)):
        for metric in ("l2", "cosine"):
            found = quantize(z_ND, codes_KD, metric, centre_D=centre_D)
            assert found.index_N.eq(-1).all()
            assert found.vq_loss.isnan()
            assert found.commit_loss.isnan()


def test_unknown_reduction() -> None:
    with pytest.raises(ValueError, match="'max'"):
        quantize(*_data(), reduction="max")  # type: ignore[arg-type]


def test_operators_are_well_formed_and_quantize_compiles_whole() -> None:
    z_ND, codes_KD = _data()
    codes_KD.requires_grad_()
    index_N = torch.randint(12, (40,))
    torch.library.opcheck(torch.ops.vqsa.gather_codes.default, (codes_KD, index_N))
    for metric in ("l2", "cosine"):
        torch.library.opcheck(torch.ops.vqsa.quantize.default, (z_ND.requires_grad_(), codes_KD, metric, 256))
    z_ND = z_ND.detach()
    torch.library.opcheck(torch.ops.vqsa.sum_by_code.default, (z_ND, index_N, 12))

    def grads(step: object) -> list[Tensor]:
        z, codes = z_ND.clone().requires_grad_(), codes_KD.detach().clone().requires_grad_()
        out = step(z, codes)  # type: ignore[operator]
        (out.vq_loss + out.commit_loss + out.quantised_ND.sum()).backward()
        return [out.quantised_ND, z.grad, codes.grad]

    compiled = torch.compile(quantize, fullgraph=True, backend="aot_eager")
    for a, b in zip(grads(quantize), grads(compiled), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("n", "k", "d"), [(0, 3, 4), (1, 1, 1), (63, 5, 7), (1000, 17, 63), (50, 400, 3)])
def test_segment_sum_equals_float64(n: int, k: int, d: int) -> None:
    g = torch.Generator().manual_seed(n)
    z_ND, index_N = torch.randn(n, d, generator=g), torch.randint(-1, k, (n,), generator=g)
    touched_T, sum_TD = segment_sum(z_ND, index_N, k)
    expected_KD = torch.zeros(k, d, dtype=torch.float64)
    for row, code in enumerate(index_N.tolist()):
        if code >= 0:
            expected_KD[code] += z_ND[row].double()
    assert touched_T.tolist() == sorted({code for code in index_N.tolist() if code >= 0})
    torch.testing.assert_close(sum_TD.double(), expected_KD[touched_T], rtol=1e-5, atol=1e-5)
    dense_KD = segment_sum_dense(z_ND, index_N, k)
    assert dense_KD.shape == (k, d)
    assert torch.equal(dense_KD[touched_T], sum_TD)
    assert dense_KD.count_nonzero() == sum_TD.count_nonzero()


def test_segment_sum_is_the_same_bits_every_time_and_adds_in_order() -> None:
    # In order: (1e8 + 1) − 1e8 is 0 in float32; in any other order of the same terms it is 1.
    z_31 = torch.tensor([[1e8], [1.0], [-1e8]])
    assert segment_sum(z_31, torch.zeros(3, dtype=torch.int64), 1)[1].item() == 0
    z_ND, index_N = torch.randn(5000, 16), torch.randint(7, (5000,))
    first = segment_sum(z_ND, index_N, 7)[1]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(first, segment_sum(z_ND, index_N, 7)[1])
    finally:
        torch.set_num_threads(threads)


def test_segment_sum_bad_shapes() -> None:
    with pytest.raises(ValueError, match=r"\(4, 3\), \(5,\)"):
        segment_sum(torch.zeros(4, 3), torch.zeros(5, dtype=torch.int64), 2)


@pytest.mark.gpu
def test_cuda_gradient_is_the_same_bits_every_time() -> None:
    z_ND, codes_KD = (t.cuda() for t in _data(20_000, 12, 64))
    codes_KD.requires_grad_()
    grads = []
    for _ in range(3):
        codes_KD.grad = None
        quantize(z_ND, codes_KD).vq_loss.backward()
        assert codes_KD.grad is not None
        grads.append(codes_KD.grad.clone())
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])
