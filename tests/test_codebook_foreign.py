"""Where the library has no code for the device, torch searches, sums and counts, and one warning says why."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from model.codebook import (
    PreparedCodebook,
    kernels,
    nearest_code,
    quantize,
    segment_sum,
    segment_sum_dense,
)
from model.codebook.kernels import Kernels
from tests.hostile_codebooks import data, relu

# Shapes: N = features, K = codes, D = feature dimension.


@pytest.fixture
def asked(shim: Kernels, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A library that was built for other devices; any other function of it that is called is an error."""
    asked: list[int] = []

    def usable() -> int:
        asked.append(1)
        return 0

    def architectures() -> bytes:
        return b"80-real;90a-real"

    library = SimpleNamespace(vqsa_codebook_usable=usable, vqsa_codebook_architectures=architectures)
    monkeypatch.setattr(shim, "_lib", library)
    monkeypatch.setattr(shim, "_usable", {})
    monkeypatch.setattr(kernels, "kernels", lambda: shim)
    return asked


def everything(z_ND: Tensor, codes_KD: Tensor) -> list[Tensor]:
    z_ND, codes_KD = z_ND.clone().requires_grad_(), codes_KD.clone().requires_grad_()
    found = quantize(z_ND, codes_KD, prepared=PreparedCodebook(codes_KD))
    (found.vq_loss + found.commit_loss + found.quantised_ND.sum()).backward()
    index_N = found.index_N
    assert z_ND.grad is not None
    assert codes_KD.grad is not None
    return [
        *found, *nearest_code(z_ND, codes_KD, "cosine"), *segment_sum(z_ND.detach(), index_N, len(codes_KD)),
        segment_sum_dense(z_ND.detach(), index_N, len(codes_KD)), z_ND.grad, codes_KD.grad,
    ]  # fmt: skip


def test_torch_does_it_and_one_warning_says_so(asked: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    z_ND, codes_KD = data(relu, 40, 60, 48)
    with pytest.warns(RuntimeWarning) as seen:
        found = everything(z_ND, codes_KD)
    (warning,) = [str(one.message) for one in seen]
    assert "cannot run on cpu: they were built for 80-real;90a-real. Torch searches instead" in warning
    assert "VQSA_CUDA_ARCHS='native' pip install --no-build-isolation --no-deps -e ." in warning
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        everything(z_ND, codes_KD)
    assert asked == [1], "asked once"
    monkeypatch.setattr(kernels, "kernels", lambda: None)
    for a, b in zip(found, everything(z_ND, codes_KD), strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:the codebook kernels cannot run")
@pytest.mark.parametrize("impl", ["cuda", "hopper"])
def test_kernels_that_are_asked_for_by_name_are_an_error(asked: list[int], impl: str) -> None:
    with pytest.raises(ValueError, match=rf"impl '{impl}' needs .* \(built for other devices\)"):
        nearest_code(*data(relu, 4, 6, 8), impl=impl)  # type: ignore[arg-type]


def test_the_shim_that_was_built_for_others_says_so(shim: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shim, "_usable", {})
    monkeypatch.setenv("VQSA_SHIM_FAULT", "foreign")
    with pytest.warns(RuntimeWarning, match="cannot run on cpu: they were built for none"):
        assert not shim.usable(torch.device("cpu"))


def test_the_warning_names_the_gpu_and_what_to_build(
    asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def properties(device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(name="NVIDIA H100", major=9, minor=0)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    shim = kernels.kernels()
    assert shim is not None
    with pytest.warns(
        RuntimeWarning, match=r"cuda:1 \(NVIDIA H100, compute capability 9.0\): .*ARCHS='90a-real'"
    ):
        shim._warn_foreign(torch.device("cuda", 1))


def test_a_library_with_code_for_the_device_is_used(shim: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shim, "_usable", {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert shim.usable(torch.device("cpu"))


def test_a_library_of_older_sources_says_what_to_do() -> None:
    """The C library stands in for one: it has none of the functions."""
    with pytest.raises(RuntimeError, match=r"libc\.so\.6 was built from older sources; build it again"):
        Kernels(Path("libc.so.6"))
