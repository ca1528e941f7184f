"""Two-token attention against the published form, written out literally and independently."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from model.attention import TwoTokenAttention

# Shapes: B = samples, D = feature dimension, 2 = tokens (code, feature).


def _literal(
    module: TwoTokenAttention, code_BD: Tensor, feature_BD: Tensor, divisor: float
) -> tuple[Tensor, Tensor]:
    """Column vectors, one batched product per matrix with the matrix repeated for each sample."""
    batch = len(code_BD)
    tokens_BD2 = torch.stack([code_BD, feature_BD], dim=2)
    key_BD2, query_BD2, value_BD2 = (
        torch.bmm(matrix.expand(batch, -1, -1), tokens_BD2) for matrix in (module.K, module.Q, module.V)
    )
    attention_B22 = torch.softmax(torch.bmm(key_BD2.mT, query_BD2) / divisor, dim=1)
    return torch.bmm(value_BD2, attention_B22).mT, attention_B22


@pytest.mark.parametrize("scale", ["sqrt2", "one", "sqrt_d"])
@pytest.mark.parametrize("dim", [1, 63, 256])
def test_equals_the_published_form(scale: str, dim: int) -> None:
    torch.manual_seed(0)
    module = TwoTokenAttention(dim, scale)  # type: ignore[arg-type]
    code_BD, feature_BD = torch.rand(9, dim) * 0.2, torch.rand(9, dim) * 0.2
    divisor = {"sqrt2": math.sqrt(2), "one": 1, "sqrt_d": math.sqrt(dim)}[scale]
    tokens_B2D, attention_B22 = module(code_BD, feature_BD)
    expected_B2D, weights_B22 = _literal(module, code_BD, feature_BD, divisor)
    assert tokens_B2D.shape == (9, 2, dim)
    torch.testing.assert_close(attention_B22, weights_B22, rtol=0, atol=1e-5)
    torch.testing.assert_close(tokens_B2D, expected_B2D, rtol=0, atol=1e-5)
    torch.testing.assert_close(attention_B22.sum(1), torch.ones(9, 2))


def test_gradients_equal_float64_of_the_published_form() -> None:
    torch.manual_seed(0)
    module = TwoTokenAttention(24)
    tokens = [torch.rand(5, 24).requires_grad_() for _ in range(2)]
    weight_B2D = torch.randn(5, 2, 24)
    (module(*tokens)[0] * weight_B2D).sum().backward()
    exact = TwoTokenAttention(24).double()
    exact.load_state_dict(module.state_dict())
    tokens64 = [t.detach().double().requires_grad_() for t in tokens]
    (_literal(exact, *tokens64, math.sqrt(2))[0] * weight_B2D).sum().backward()
    for found, expected in zip(
        [*tokens, *module.parameters()], [*tokens64, *exact.parameters()], strict=True
    ):
        assert found.grad is not None
        assert expected.grad is not None
        torch.testing.assert_close(found.grad, expected.grad.float(), rtol=1e-4, atol=1e-5)


def test_evaluation_quirk_of_the_authors_code_is_off_unless_asked() -> None:
    torch.manual_seed(0)
    code_BD, feature_BD = torch.rand(3, 16) * 0.3, torch.rand(3, 16) * 0.3
    plain, quirky = TwoTokenAttention(16), TwoTokenAttention(16, unscaled_eval=True)
    quirky.load_state_dict(plain.state_dict())
    trained_B22 = plain(code_BD, feature_BD)[1]
    assert torch.equal(quirky(code_BD, feature_BD)[1], trained_B22)
    plain.eval()
    quirky.eval()
    assert torch.equal(plain(code_BD, feature_BD)[1], trained_B22)
    unscaled_B22 = _literal(plain, code_BD, feature_BD, 1.0)[1]
    torch.testing.assert_close(quirky(code_BD, feature_BD)[1], unscaled_B22)
    assert not torch.allclose(unscaled_B22, trained_B22, atol=1e-3)


def test_matrices_start_as_kaiming_normal() -> None:
    torch.manual_seed(0)
    for matrix in TwoTokenAttention(512).parameters():
        assert matrix.shape == (512, 512)
        assert matrix.std().item() == pytest.approx(math.sqrt(2 / 512), rel=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_softmax_is_float32_under_autocast(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = TwoTokenAttention(512)
    code_BD, feature_BD = torch.rand(4, 512) * 20, torch.rand(4, 512) * 20
    with torch.autocast("cpu", dtype):
        tokens_B2D, attention_B22 = module(code_BD, feature_BD)
    assert attention_B22.dtype == torch.float32
    # Scores here reach 1e6, beyond float16's 65504.
    assert attention_B22.isfinite().all()
    assert tokens_B2D.isfinite().all()
