"""The Hopper kernel is chosen only where it is right, and can neither hang nor answer wrongly where it stalls.

On the host shim, which can plant what a device might do wrong (VQSA_SHIM_FAULT).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from model.codebook import choice, kernels, nearest_code, quantize
from model.codebook.choice import VARIABLE, Choice, variant_for
from model.codebook.kernels import TILE_ANY, TILE_AUTO, TILE_HOPPER, Kernels
from model.codebook.search import search_in_blocks
from tests.hostile_codebooks import CASES, NAMES, Case, data, relu

CPU = torch.device("cpu")
FAULT = "VQSA_SHIM_FAULT"


@pytest.fixture(autouse=True)
def small_and_fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(Choice, "shape", (140, 600, 137))
    monkeypatch.delenv(VARIABLE, raising=False)
    choice._choices.clear()
    yield
    choice._choices.clear()


def search_by(
    shim: Kernels, tile: int, z_ND: Tensor, codes_KD: Tensor
) -> tuple[Tensor, Tensor, list[int], int]:
    effort_2, alarm_1 = torch.zeros(2, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    ready = shim.prepare(codes_KD, False)
    found = shim.search(z_ND, codes_KD, False, ready, tile=tile, effort_2=effort_2, alarm_1=alarm_1)
    return found.index_N, found.sqdist_N, effort_2.tolist(), int(alarm_1)


def test_sound_hopper_kernel_is_chosen_after_its_trial(shim: Kernels) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert variant_for(shim, CPU).tile == TILE_ANY
        assert variant_for(shim, CPU).tile == TILE_ANY


@pytest.mark.parametrize("fault", ["lost", "swizzle"])
def test_faulty_hopper_kernel_is_not_chosen_and_the_answer_is_right(
    shim: Kernels, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "kernels", lambda: shim)
    z_ND, codes_KD = data(relu, 140, 600, 137)
    expected = search_in_blocks(z_ND, codes_KD, False, 256)
    monkeypatch.setenv(FAULT, fault)
    with pytest.warns(RuntimeWarning, match=r"Hopper search kernel does not work on cpu: its answers differ"):
        found = nearest_code(z_ND, codes_KD)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        again = quantize(z_ND, codes_KD)
        assert variant_for(shim, CPU).tile == TILE_AUTO
    for index_N, sqdist_N in (found, again[1:3]):
        assert torch.equal(index_N, expected[0])
        assert torch.equal(sqdist_N, expected[1])


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_search_that_stalls_is_exact_and_raises_the_alarm(
    shim: Kernels, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    z_ND, codes_KD = data(case, 130, 200, 130)  # one code tile: no other block answers for the first features
    expected = search_in_blocks(z_ND, codes_KD, False, 256)
    monkeypatch.setenv(FAULT, "lost")
    index_N, sqdist_N, (candidates, scanned), alarm = search_by(shim, TILE_HOPPER, z_ND, codes_KD)
    assert torch.equal(index_N, expected[0])
    assert torch.equal(sqdist_N, expected[1])
    assert (candidates, scanned, alarm) == (0, 130, 1)


def test_fault_planted_in_the_swizzle_gives_wrong_answers(
    shim: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the trial is for: no wait shows it."""
    z_ND, codes_KD = data(relu, 70, 300, 130)
    expected_N = search_in_blocks(z_ND, codes_KD, False, 256)[0]
    monkeypatch.setenv(FAULT, "swizzle")
    index_N, _, _, alarm = search_by(shim, TILE_HOPPER, z_ND, codes_KD)
    assert alarm == 0
    assert not torch.equal(index_N, expected_N)


def test_a_stall_after_the_trial_goes_back_to_mma(shim: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    # More codes than narrow tiles: the plan has a use for the Hopper kernel.
    z_ND, codes_KD = data(relu, 130, 2000, 70)
    expected_N = search_in_blocks(z_ND, codes_KD, False, 256)[0]
    monkeypatch.setattr(kernels, "kernels", lambda: shim)
    assert torch.equal(nearest_code(z_ND, codes_KD)[0], expected_N)
    monkeypatch.setenv(FAULT, "lost")
    assert torch.equal(nearest_code(z_ND, codes_KD)[0], expected_N)
    monkeypatch.delenv(FAULT)
    with pytest.warns(RuntimeWarning, match=r"a search with it stalled"):
        assert variant_for(shim, CPU).tile == TILE_AUTO
    assert torch.equal(nearest_code(z_ND, codes_KD)[0], expected_N)


def test_searches_go_on_with_mma_until_the_outcome_is_there(
    shim: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = torch.full((1,), -1, dtype=torch.int32)
    monkeypatch.setattr(Choice, "_agree", lambda self: late)
    assert variant_for(shim, CPU).tile == TILE_AUTO
    choice._choices[shim, CPU]._outcome_1.fill_(1)
    assert variant_for(shim, CPU).tile == TILE_ANY


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
            r"not tried on cpu: memory ran out in its trial \(CUDA out of memory",
        ),
        (
            RuntimeError("codebook kernels: the driver is too old"),
            r"does not work on cpu: codebook kernels: the dri",
        ),
    ],
    ids=["out of memory", "refused"],
)
def test_a_trial_that_cannot_be_queued_ends_nothing(
    shim: Kernels, monkeypatch: pytest.MonkeyPatch, error: RuntimeError, words: str
) -> None:
    tried: list[Choice] = []

    def agree(self: Choice) -> Tensor:
        tried.append(self)
        raise error

    monkeypatch.setattr(Choice, "_agree", agree)
    monkeypatch.setattr(kernels, "kernels", lambda: shim)
    z_ND, codes_KD = data(relu, 140, 600, 137)
    expected_N = search_in_blocks(z_ND, codes_KD, False, 256)[0]
    with pytest.warns(RuntimeWarning, match=words):
        assert torch.equal(nearest_code(z_ND, codes_KD)[0], expected_N)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert torch.equal(nearest_code(z_ND, codes_KD)[0], expected_N)
        assert variant_for(shim, CPU).tile == TILE_AUTO
    assert len(tried) == 1


def test_other_devices_have_no_trial(shim: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shim, "capability", lambda device: 80)
    monkeypatch.setattr(Choice, "_agree", lambda self: pytest.fail("a trial"))
    assert variant_for(shim, CPU).tile == TILE_AUTO


def test_either_kernel_can_be_forced(shim: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Choice, "_agree", lambda self: pytest.fail("a trial"))
    for value, tile in (("mma", TILE_AUTO), ("hopper", TILE_HOPPER)):
        monkeypatch.setenv(VARIABLE, value)
        assert variant_for(shim, CPU).tile == tile
    assert variant_for(shim, CPU, "cuda").tile == TILE_AUTO
    monkeypatch.setenv(VARIABLE, "mma")
    assert variant_for(shim, CPU, "hopper").tile == TILE_HOPPER
    monkeypatch.setenv(VARIABLE, "wgmma")
    with pytest.raises(ValueError, match="VQSA_CODEBOOK_KERNEL is 'wgmma'; choose 'auto', 'mma' or 'hopper'"):
        variant_for(shim, CPU)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_any_tile_is_exact(shim: Kernels, case: Case) -> None:
    z_ND, codes_KD = data(case, 130, 700, 65)
    index_N, sqdist_N, _, alarm = search_by(shim, TILE_ANY, z_ND, codes_KD)
    expected = search_in_blocks(z_ND, codes_KD, False, 256)
    assert torch.equal(index_N, expected[0])
    assert torch.equal(sqdist_N, expected[1])
    assert alarm == 0
