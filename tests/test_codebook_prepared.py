"""A prepared codebook is used only for codes as they are now, and takes over changes by number.

On the host shim (codebook_shim.py), where a wrong pointer or a stale copy shows as on a GPU.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from model.codebook import PreparedCodebook, kernels, nearest_code
from model.codebook.choice import VARIABLE
from model.codebook.kernels import Kernels
from model.codebook.search import search_in_blocks
from tests.hostile_codebooks import CASES, data

# Shapes: N = features, K = codes, D = feature dimension, T = codes that changed.


@pytest.fixture(autouse=True)
def by_kernels(shim: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "kernels", lambda: shim)
    monkeypatch.setenv(VARIABLE, "mma")


def assert_exact(z_ND: Tensor, prepared: PreparedCodebook) -> None:
    codes_KD = prepared.codes_KD.detach()
    found = nearest_code(z_ND, codes_KD, prepared=prepared)
    expected = search_in_blocks(z_ND, codes_KD, False, 256)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize(
    ("changed", "error", "match"),
    [
        (torch.tensor([1, 2], dtype=torch.int32), TypeError, r"as int64 \(T,\), got torch.int32 \(2,\)"),
        (torch.tensor([[1, 2]]), TypeError, r"as int64 \(T,\), got torch.int64 \(1, 2\)"),
        (torch.tensor([1.0]), TypeError, r"got torch.float32"),
        (torch.tensor([1, 2], device="meta"), ValueError, r"on the codes' device, cpu, got them on meta"),
    ],
)
def test_numbers_that_the_kernels_cannot_read_are_refused(
    changed: Tensor, error: type[Exception], match: str
) -> None:
    prepared = PreparedCodebook(data(CASES[0], 3, 20, 8)[1])
    with pytest.raises(error, match=match):
        prepared.refresh(changed)


def test_numbers_may_be_strided_repeated_or_of_no_code() -> None:
    z_ND, codes_KD = data(CASES[0], 30, 50, 24)
    prepared = PreparedCodebook(codes_KD)
    codes_KD[7, 1] = torch.inf
    codes_KD[40] = z_ND[0]
    strided_T = torch.tensor([[40, 0], [7, 0], [7, 0], [-1, 0], [50, 0], [7, 0], [10**12, 0]])[:, 0]
    assert not strided_T.is_contiguous()
    prepared.refresh(strided_T)
    assert (nearest_code(z_ND, codes_KD, prepared=prepared)[0] == -1).all()
    codes_KD[7] = z_ND[1]
    prepared.refresh(torch.tensor([7]))
    assert_exact(z_ND, prepared)
    assert nearest_code(z_ND, codes_KD, prepared=prepared)[0][:2].tolist() == [40, 7]


def test_no_numbers_do_nothing() -> None:
    _, codes_KD = data(CASES[0], 30, 50, 24)
    prepared = PreparedCodebook(codes_KD)
    before = prepared.buffer_for(codes_KD, "l2").clone()  # type: ignore[union-attr]
    codes_KD += 1
    prepared.refresh(torch.empty(0, dtype=torch.int64))
    assert torch.equal(prepared.buffer_for(codes_KD, "l2"), before)  # type: ignore[arg-type]


def swapped(module: nn.Module, codes_KD: Tensor) -> None:
    module.codes.data = codes_KD  # type: ignore[union-attr, assignment]


@pytest.mark.parametrize("kind", ["memory", "half", "memory, twice"])
def test_codes_that_were_moved_or_converted_are_not_searched_as_they_were(kind: str) -> None:
    """As `module.to` and `module.half` do it: the same Parameter, without a write that torch counts."""
    z_ND, codes_KD = data(CASES[0], 30, 50, 24)
    module = nn.Module()
    module.codes = nn.Parameter(codes_KD.clone())
    prepared = PreparedCodebook(module.codes)
    version = module.codes._version
    if kind == "half":
        module.half()
    else:
        swapped(module, codes_KD.flip(0).contiguous())
        if kind == "memory, twice":  # the memory of the first may be given out again
            swapped(module, codes_KD.roll(1, 0).contiguous())
    assert module.codes._version == version
    with pytest.raises(
        ValueError, match=r"moved or converted since they were prepared \(now torch.float.* on cpu\)"
    ):
        nearest_code(z_ND, module.codes, prepared=prepared)
    # One number is not enough: what else differs is not known.
    prepared.refresh(torch.tensor([3]))
    assert_exact(z_ND, prepared)


def test_codes_of_another_size_get_a_buffer_of_their_own() -> None:
    module = nn.Module()
    module.codes = nn.Parameter(data(CASES[0], 30, 50, 24)[1])
    prepared = PreparedCodebook(module.codes)
    z_ND, larger_KD = data(CASES[0], 30, 900, 40)
    swapped(module, larger_KD)
    prepared.refresh()
    assert_exact(z_ND, prepared)


def test_codes_that_are_no_longer_contiguous_are_refused() -> None:
    module = nn.Module()
    module.codes = nn.Parameter(torch.randn(5, 5))
    prepared = PreparedCodebook(module.codes)
    swapped(module, torch.randn(5, 5).T)
    with pytest.raises(ValueError, match="needs contiguous codes"):
        prepared.refresh()


class Recorder:
    """Kernels for tensors without memory, which keep what they are given."""

    device_type, max_dim = "meta", 100

    def __init__(self) -> None:
        self.changed: list[Tensor | None] = []

    def usable(self, device: torch.device) -> bool:
        return True

    def prepare(
        self, codes_KD: Tensor, cosine: bool, buffer: Tensor | None, changed_T: Tensor | None
    ) -> Tensor:
        self.changed.append(changed_T)
        return codes_KD.new_empty(1)


def test_numbers_on_another_device_are_refused_before_a_pointer_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorder = Recorder()
    monkeypatch.setattr(kernels, "kernels", lambda: recorder)
    prepared = PreparedCodebook(torch.zeros(5, 4, device="meta"))
    with pytest.raises(ValueError, match="on the codes' device, meta, got them on cpu"):
        prepared.refresh(torch.tensor([1]))
    assert recorder.changed == [None]


def test_kernels_get_each_number_once(shim: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks at one code at the same time would both count it as broken."""
    given: list[list[int]] = []
    itself = shim.prepare

    def spy(codes_KD: Tensor, cosine: bool, buffer: Tensor | None, changed_T: Tensor | None) -> Tensor:
        if changed_T is not None:
            assert changed_T.is_contiguous()
            given.append(changed_T.tolist())
        return itself(codes_KD, cosine, buffer, changed_T)

    monkeypatch.setattr(shim, "prepare", spy)
    PreparedCodebook(data(CASES[0], 3, 20, 8)[1]).refresh(
        torch.tensor([[9, 3, 9, 9, -1, 3, 4]]).expand(2, 7)[0]
    )
    assert given == [[-1, 3, -1, 4, 9, -1, -1]]
