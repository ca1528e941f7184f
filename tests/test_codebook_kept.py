"""A codebook module prepares its codes once for as long as they stay the same, and never searches old ones.

On the host shim (codebook_shim.py): prepared once for several passes, again after every kind of change, and each
answer is the exact search's.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.codebook import Codebook, PreparedCodebook, kernels, nearest_code
from model.codebook.choice import VARIABLE
from model.codebook.kernels import Kernels
from model.codebook.search import search_in_blocks
from tests.hostile_codebooks import CASES, data

# Shapes: N = features, K = codes, D = feature dimension.


@pytest.fixture(autouse=True)
def prepared_times(shim: Kernels, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many codes each launch of `prepare` did."""
    times: list[int] = []
    itself = shim.prepare

    def counted(codes_KD: Tensor, *rest: Any) -> Tensor:
        times.append(len(codes_KD))
        return itself(codes_KD, *rest)

    monkeypatch.setattr(shim, "prepare", counted)
    monkeypatch.setattr(kernels, "kernels", lambda: shim)
    monkeypatch.setenv(VARIABLE, "mma")
    return times


Z_ND, CODES_KD = data(CASES[0], 30, 50, 24)


def book_of(codes_KD: Tensor = CODES_KD, **choices: Any) -> Codebook:
    book = Codebook(*codes_KD.shape, init="normal", **choices)
    with torch.no_grad():
        book.codes.copy_(codes_KD)
    return book


def assert_exact(book: nn.Module, codes_KD: Tensor) -> None:
    found = book(Z_ND)
    index_N, sqdist_N = search_in_blocks(Z_ND, codes_KD.detach(), False, 256)
    assert torch.equal(found.index_N, index_N)
    assert torch.equal(found.sqdist_N, sqdist_N)


@pytest.mark.parametrize("training", [False, True])
def test_passes_with_the_same_codes_prepare_once(prepared_times: list[int], training: bool) -> None:
    book = book_of().train(training)
    for _ in range(3):  # evaluation, or the micro-batches of a step
        assert_exact(book, book.codes)
        if training:
            book(Z_ND).vq_loss.backward()
    assert prepared_times == [50]


def optimiser_step(make: Callable[..., torch.optim.Optimizer], **choices: Any) -> Callable[[Codebook], None]:
    def step(book: Codebook) -> None:
        book.codes.grad = Z_ND.new_ones(book.codes.shape) * torch.arange(24.0)
        make([book.codes], lr=0.5, **choices).step()

    return step


def data_swap(book: Codebook) -> None:
    book.codes.data = CODES_KD.flip(0).contiguous()


def loading(book: Codebook) -> None:
    book.load_state_dict(book_of(CODES_KD * 2).state_dict())


def loading_by_assignment(book: Codebook) -> None:
    book.load_state_dict(book_of(CODES_KD * 2).state_dict(), assign=True)


def revival(book: Codebook) -> None:
    assert book.upkeep is not None
    index_N = torch.arange(30) % 2
    book.update(Z_ND, index_N)
    assert book.upkeep.revived > 0 or book.upkeep.ema


def written_in_place(book: Codebook) -> None:
    with torch.no_grad():
        book.codes[3] += 1


def another_parameter(book: Codebook) -> None:
    book.codes = nn.Parameter(CODES_KD.flip(0).contiguous())


def unseen_but_said(book: Codebook) -> None:
    book.codes.data.mul_(1.5)
    book.codes_changed()


def unseen_before_evaluation(book: Codebook) -> None:
    book.codes.data.mul_(1.5)
    book.eval()


CHANGES: dict[str, tuple[Callable[[Codebook], object], dict[str, Any]]] = {
    "Adam": (optimiser_step(torch.optim.Adam), {}),
    "fused Adam": (optimiser_step(torch.optim.Adam, fused=True), {}),
    "fused SGD": (optimiser_step(torch.optim.SGD, fused=True), {}),
    "foreach AdamW": (optimiser_step(torch.optim.AdamW, foreach=True), {}),
    ".data": (data_swap, {}),
    "load_state_dict": (loading, {}),
    "load_state_dict, assigned": (loading_by_assignment, {}),
    "revival": (revival, {"revive_after": 1}),
    "moving average": (revival, {"ema": 0.5}),
    "in place": (written_in_place, {}),
    "another parameter": (another_parameter, {}),
    "half": (lambda book: book.half(), {}),
    "unseen, but said": (unseen_but_said, {}),
    "unseen, before evaluation": (unseen_before_evaluation, {}),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_codes_that_changed_are_prepared_again(
    prepared_times: list[int], change: str, training: bool
) -> None:
    made, choices = CHANGES[change]
    book = book_of(**choices).train(training)
    assert_exact(book, book.codes)
    before_KD = book.codes.detach().clone()
    made(book)
    assert not torch.equal(book.codes.float(), before_KD.float()) or change == "half"
    for _ in range(2):
        assert_exact(book, book.codes)
    assert prepared_times == [50, 50]


def test_an_explicit_one_refuses_codes_that_a_fused_optimiser_wrote_to() -> None:
    book = book_of()
    prepared = PreparedCodebook(book.codes)
    optimiser_step(torch.optim.Adam, fused=True)(book)
    with pytest.raises(ValueError, match="or an optimiser has stepped; call refresh"):
        nearest_code(Z_ND, book.codes, prepared=prepared)


def test_it_is_neither_saved_nor_copied_and_copies_are_independent(prepared_times: list[int]) -> None:
    book = book_of().eval()
    assert_exact(book, book.codes)
    assert set(book.state_dict()) == {"codes", "initialised"}
    written = io.BytesIO()
    torch.save(book, written)
    written.seek(0)
    for other in (
        copy.deepcopy(book),
        pickle.loads(pickle.dumps(book)),
        torch.load(written, weights_only=False),
        torch.optim.swa_utils.AveragedModel(book).module,
    ):
        assert other._prepared is None
        with torch.no_grad():
            other.codes.mul_(3)
        assert_exact(other, other.codes)
        assert_exact(book, book.codes)
    assert prepared_times == [50] * 5


def test_memory_is_given_back_when_the_module_moves() -> None:
    book = book_of().eval()
    book(Z_ND)
    assert book._prepared is not None
    assert book.to("meta")._prepared is None


def test_what_inference_mode_prepared_can_be_trained_with(prepared_times: list[int]) -> None:
    book = book_of()
    with torch.inference_mode():
        assert_exact(book, book.codes)
    z_ND = Z_ND.clone().requires_grad_()
    found = book(z_ND)
    (found.vq_loss + found.commit_loss).backward()
    assert book.codes.grad is not None
    assert prepared_times == [50]
    with torch.inference_mode():
        inside = book_of()
        assert_exact(inside, inside.codes)  # its writes are not counted
        inside.codes.mul_(2)
        assert_exact(inside, inside.codes)


def test_stand_ins_for_the_parameter_are_not_remembered() -> None:
    book = book_of().eval()
    expected = book_of(CODES_KD.flip(0)).eval()(Z_ND)
    book(Z_ND)
    stand_in = {"codes": CODES_KD.flip(0).contiguous()}
    assert torch.equal(torch.func.functional_call(book, stand_in, (Z_ND,)).index_N, expected.index_N)
    assert_exact(book, book.codes)


def test_a_compiled_pass_prepares_in_itself(prepared_times: list[int]) -> None:
    book = book_of().eval()
    compiled = torch.compile(book, fullgraph=True, backend="aot_eager")
    for count in (1, 2):
        assert_exact(compiled, book.codes)  # type: ignore[arg-type]
        assert len(prepared_times) == count
    book.codes.data.mul_(2)
    assert_exact(compiled, book.codes)  # type: ignore[arg-type]
    assert_exact(book, book.codes)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_pass_prepares_in_itself(prepared_times: list[int], strict: bool) -> None:
    book = book_of().eval()
    book(Z_ND)
    program = torch.export.export(book, (Z_ND,), strict=strict).module()
    before = len(prepared_times)
    program.codes.data.mul_(2)
    assert_exact(program, program.codes)  # type: ignore[arg-type]
    assert len(prepared_times) == before + 1
