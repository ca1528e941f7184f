"""The k nearest codes and quantisation by their weighted sum, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model.codebook import Codebook, nearest_code, nearest_codes, quantize, quantize_top_k

# Shapes: N = features, K = codes, D = feature dimension, k = codes per feature.


def _data(n: int = 60, k: int = 40, d: int = 24, seed: int = 3) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g), torch.randn(k, d, generator=g)


def _distances(z_ND: Tensor, codes_KD: Tensor, metric: str) -> Tensor:
    a, b = z_ND.double(), codes_KD.double()
    if metric == "cosine":
        return 2 - 2 * torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=-1)
    return (a[:, None] - b).square().sum(-1)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize(
    ("n", "codes", "k", "memory"), [(60, 40, 5, 256), (1, 1, 1, 1), (33, 500, 3, 1), (9, 7, 7, 1)]
)
def test_equals_sorting_the_distances(metric: Any, n: int, codes: int, k: int, memory: int) -> None:
    z_ND, codes_KD = _data(n, codes)
    index_Nk, sqdist_Nk = nearest_codes(z_ND, codes_KD, k, metric, memory)
    expected_Nk, order_Nk = _distances(z_ND, codes_KD, metric).sort(dim=1)
    assert torch.equal(index_Nk, order_Nk[:, :k])
    torch.testing.assert_close(sqdist_Nk, expected_Nk[:, :k].float(), rtol=1e-6, atol=1e-7)
    first_N, first_sqdist_N = nearest_code(z_ND, codes_KD, metric)
    assert torch.equal(index_Nk[:, 0], first_N)
    assert torch.equal(sqdist_Nk[:, 0], first_sqdist_N)


def test_common_offset_and_memory_change_nothing() -> None:
    z_ND, codes_KD = _data(50, 300)
    expected = nearest_codes(z_ND, codes_KD, 4)[0]
    assert torch.equal(nearest_codes(z_ND, codes_KD, 4, memory_mib=1)[0], expected)
    shifted_ND, shifted_KD = z_ND + 128, codes_KD + 128
    order_Nk = _distances(shifted_ND, shifted_KD, "l2").sort(dim=1).indices[:, :4]
    assert torch.equal(nearest_codes(shifted_ND, shifted_KD, 4)[0], order_Nk)


def test_equal_codes_come_in_their_order_and_odd_features_are_defined() -> None:
    codes_KD = torch.tensor([[5.0, 0], [1, 1], [1, 1], [0, 5], [1, 1]])
    z_ND = torch.tensor([[1.0, 1.1], [torch.nan, 0], [torch.inf, 0], [0, 0]])
    index_Nk, sqdist_Nk = nearest_codes(z_ND, codes_KD, 3)
    assert index_Nk.tolist() == [[1, 2, 4], [-1, -1, -1], [-1, -1, -1], [1, 2, 4]]
    assert sqdist_Nk[1:3].isnan().all()
    index_Nk, sqdist_Nk = nearest_codes(z_ND, codes_KD, 3, "cosine")
    assert index_Nk.tolist() == [[1, 2, 4], [-1, -1, -1], [-1, -1, -1], [0, 1, 2]]
    assert sqdist_Nk[3].tolist() == [2, 2, 2]
    assert nearest_codes(z_ND[:0], codes_KD, 2)[0].shape == (0, 2)
    broken_KD = codes_KD.clone()
    broken_KD[1, 0] = torch.nan
    assert nearest_codes(z_ND, broken_KD, 2)[0].eq(-1).all()


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="the 41 nearest of 40 codes"):
        nearest_codes(*_data(), 41)
    with pytest.raises(ValueError, match="'dot'"):
        nearest_codes(*_data(), 2, "dot")  # type: ignore[arg-type]


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("weights", ["mean", "softmax"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_values_and_gradients_equal_float64(metric: Any, weights: Any, reduction: Any) -> None:
    z_ND, codes_KD = (t.requires_grad_() for t in _data())
    k = 3
    found, index_Nk = quantize_top_k(z_ND, codes_KD, k, weights, metric, reduction)
    upstream_ND = torch.randn(z_ND.shape, generator=torch.Generator().manual_seed(1))
    (found.vq_loss + 0.25 * found.commit_loss + (found.quantised_ND * upstream_ND).sum()).backward()

    z64_ND, codes64_KD = (t.detach().double().requires_grad_() for t in (z_ND, codes_KD))
    distance_NK, order_NK = _distances(z64_ND.detach(), codes64_KD.detach(), metric).sort(dim=1)
    near_Nk = distance_NK[:, :k]
    weight_Nk = torch.full_like(near_Nk, 1 / k)
    if weights == "softmax":
        weight_Nk = torch.softmax(-near_Nk / near_Nk.mean(1, keepdim=True), 1)
    code_ND = (weight_Nk[..., None] * codes64_KD[order_NK[:, :k]]).sum(1)
    divisor = z_ND.numel() if reduction == "mean" else len(z_ND)
    vq = (code_ND - z64_ND.detach()).square().sum() / divisor
    commit = (z64_ND - code_ND.detach()).square().sum() / divisor
    through_ND = z64_ND + (code_ND - z64_ND).detach()
    (vq + 0.25 * commit + (through_ND * upstream_ND).sum()).backward()

    assert torch.equal(index_Nk, order_NK[:, :k])
    assert torch.equal(found.index_N, order_NK[:, 0])
    torch.testing.assert_close(found.quantised_ND, code_ND.float())
    torch.testing.assert_close(found.vq_loss, vq.float())
    for mine, exact in ((z_ND, z64_ND), (codes_KD, codes64_KD)):
        assert mine.grad is not None
        assert exact.grad is not None
        torch.testing.assert_close(mine.grad, exact.grad.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weights", ["mean", "softmax"])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_one_code_is_plain_quantisation(weights: Any, metric: Any) -> None:
    found, index_Nk = quantize_top_k(*_data(), 1, weights, metric)
    expected = quantize(*_data(), metric)
    assert torch.equal(index_Nk[:, 0], expected.index_N)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("weights", ["mean", "softmax"])
def test_a_code_that_is_not_finite_makes_the_losses_non_finite(weights: Any) -> None:
    z_ND, codes_KD = _data()
    codes_KD[7, 0] = torch.nan
    found, index_Nk = quantize_top_k(z_ND, codes_KD, 3, weights)
    assert index_Nk.eq(-1).all()
    assert found.vq_loss.isnan()
    assert found.commit_loss.isnan()


def test_a_codebook_counts_all_its_codes_and_compiles() -> None:
    z_ND, codes_KD = _data()
    book = Codebook(40, 24, top_k=3, top_k_weights="softmax", init="normal")
    with torch.no_grad():
        book.codes.copy_(codes_KD)
    found = book(z_ND)
    assert book.usage_K.sum() == 3 * len(z_ND)
    assert torch.equal(found.index_N, nearest_code(z_ND, codes_KD)[0])
    compiled = torch.compile(book, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(z_ND).quantised_ND, found.quantised_ND)
    torch.library.opcheck(torch.ops.vqsa.nearest_codes.default, (z_ND, codes_KD, 3, "l2", 16))
