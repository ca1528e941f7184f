"""The operators and the built library with the codebook kernels inside, on the CPU (codebook_shim.py)."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

from model.codebook import PreparedCodebook, kernels, nearest_code, quantize
from model.codebook.choice import VARIABLE
from model.codebook.kernels import Kernels
from tests.hostile_codebooks import CASES, data, relu


@pytest.fixture(autouse=True)
def mma_where_nothing_else_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "mma")


def test_quantize_and_nearest_code_through_the_kernels(
    shim: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operators with the kernels inside, forward and backward, equal those with torch inside."""
    z_ND, codes_KD = data(relu, 40, 60, 48)

    def step(metric: str) -> list[Tensor]:
        z, codes = z_ND.clone().requires_grad_(), codes_KD.clone().requires_grad_()
        found = quantize(z, codes, metric)  # type: ignore[arg-type]
        (found.vq_loss + 0.25 * found.commit_loss + found.quantised_ND.square().sum()).backward()
        assert z.grad is not None
        assert codes.grad is not None
        return [*found, *nearest_code(z, codes, metric), z.grad, codes.grad]  # type: ignore[arg-type]

    expected = [*step("l2"), *step("cosine")]
    used = []

    def kernels_in_use() -> Kernels:
        used.append(1)
        return shim

    monkeypatch.setattr(kernels, "kernels", kernels_in_use)
    found = [*step("l2"), *step("cosine")]
    assert len(used) == 6  # two forward passes and two searches, and the codebook's gradient
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)  # the kernels sum gradients in float64


def test_prepared_codebook(shim: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "kernels", lambda: shim)
    z_ND, codes_KD = data(CASES[0], 30, 50, 24)
    prepared = PreparedCodebook(codes_KD)
    expected_N = nearest_code(z_ND, codes_KD)[0]
    assert torch.equal(nearest_code(z_ND, codes_KD, prepared=prepared)[0], expected_N)
    assert torch.equal(quantize(z_ND, codes_KD, prepared=prepared).index_N, expected_N)
    with pytest.raises(ValueError, match="prepared for 'l2', the search is by 'cosine'"):
        nearest_code(z_ND, codes_KD, "cosine", prepared=prepared)
    with pytest.raises(ValueError, match=r"of other codes \(\(50, 24\) torch.float32\)"):
        nearest_code(z_ND, codes_KD.half(), prepared=prepared)
    codes_KD[2] = z_ND[0]
    with pytest.raises(ValueError, match=r"written to since .* refresh\(\)"):
        nearest_code(z_ND, codes_KD, prepared=prepared)
    prepared.refresh(torch.tensor([2]))
    assert nearest_code(z_ND, codes_KD, prepared=prepared)[0][0] == 2
    with pytest.raises(ValueError, match="needs contiguous codes"):
        PreparedCodebook(codes_KD.T)


@pytest.mark.parametrize("impl", ["cuda", "hopper"])
def test_impl_for_cuda_without_cuda_says_so(impl: Literal["cuda", "hopper"]) -> None:
    with pytest.raises(ValueError, match=rf"impl '{impl}' needs CUDA tensors .* on cpu"):
        nearest_code(torch.zeros(2, 3), torch.zeros(4, 3), impl=impl)


def test_a_library_built_for_another_device_says_that_it_is_of_no_use(
    shim: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    usable = shim._lib.vqsa_codebook_usable
    assert usable() == 1
    monkeypatch.setenv("VQSA_SHIM_FAULT", "foreign")
    assert usable() == 0


def test_built_library_loads_without_a_driver_and_says_what_is_missing() -> None:
    built = kernels.kernels()
    if built is None:
        pytest.skip("built without nvcc: there is no libvqsa_codebook.so")
    if torch.cuda.is_available():
        pytest.skip("there is a driver")
    assert built.max_dim >= 2048
    assert built._lib.vqsa_codebook_usable() == 0
    with pytest.raises(RuntimeError, match="codebook kernels: asking for the device: "):
        built.workspace_bytes(1, 1, 1, False)
