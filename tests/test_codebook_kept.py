"""Inside `unchanged` a codebook prepares its codes once, and nowhere else are prepared codes used again.

On the host shim (codebook_shim.py), every answer held to the exact search's.
"""

from __future__ import annotations

import copy
import io
import pickle
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

import model
from model.codebook import Codebook, codebook, kernels, unchanged
from model.codebook.choice import VARIABLE
from model.codebook.kernels import Kernels
from model.codebook.search import search_in_blocks
from pipeline.loader import EvaluationBatch, TrainingBatch
from tests.hostile_codebooks import CASES, data
from tools.runtime.config import RunConfig, read_recipe, validated
from tools.runtime.meter import Meter
from tools.runtime.results import CLEAN
from tools.runtime.scoring import score
from tools.runtime.step import train_step

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
def test_passes_inside_prepare_once_and_outside_each(prepared_times: list[int], training: bool) -> None:
    book = book_of().train(training)
    outer = nn.Sequential(book)
    for count in (1, 2):
        with unchanged(outer, nn.Linear(2, 2)):
            for _ in range(3):  # evaluation, or the micro-batches of a step
                assert_exact(book, book.codes)
                if training:
                    book(Z_ND).vq_loss.backward()
                with unchanged(book):
                    assert_exact(book, book.codes)
        assert prepared_times == [50] * count
    for _ in range(2):
        assert_exact(book, book.codes)
    assert prepared_times == [50] * 4


def test_it_ends_with_an_error_too(prepared_times: list[int]) -> None:
    book = book_of().eval()

    def fail() -> None:
        with unchanged(book):
            assert_exact(book, book.codes)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    book.codes.data.mul_(2)
    assert_exact(book, book.codes)
    assert prepared_times == [50, 50]


def test_a_start_from_data_inside_is_before_the_first_preparation(prepared_times: list[int]) -> None:
    book = Codebook(20, 24)
    with unchanged(book):
        for _ in range(2):
            assert_exact(book, book.codes)
    assert prepared_times == [20]


def optimiser_step(make: Callable[..., torch.optim.Optimizer], **choices: Any) -> Callable[[Codebook], None]:
    def step(book: Codebook) -> None:
        book.codes.grad = Z_ND.new_ones(book.codes.shape) * torch.arange(24.0)
        make([book.codes], lr=0.5, **choices).step()

    return step


def data_swap(book: Codebook) -> None:
    book.codes.data = book.codes.detach().flip(0).contiguous()


def loading(book: Codebook) -> None:
    book.load_state_dict(book_of(book.codes.detach() * 2).state_dict())


def loading_by_assignment(book: Codebook) -> None:
    book.load_state_dict(book_of(book.codes.detach() * 2).state_dict(), assign=True)


def revival(book: Codebook) -> None:
    assert book.upkeep is not None
    index_N = torch.arange(30) % 2
    book.update(Z_ND, index_N)
    assert book.upkeep.revived > 0 or book.upkeep.ema


def written_in_place(book: Codebook) -> None:
    with torch.no_grad():
        book.codes[3] += 1


def another_parameter(book: Codebook) -> None:
    book.codes = nn.Parameter(book.codes.detach().flip(0).contiguous())


def unseen(book: Codebook) -> None:
    book.codes.data.mul_(1.5)


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
    "unseen": (unseen, {}),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_codes_that_change_between_two_blocks_or_passes_are_always_seen(change: str, training: bool) -> None:
    """Fused optimisers do not raise a tensor's version, nor do writes into `.data`."""
    made, choices = CHANGES[change]
    book = book_of(**choices).train(training)
    for opened in (unchanged, lambda book: nullcontext()):
        with opened(book):
            assert_exact(book, book.codes)
        before_KD = book.codes.detach().clone()
        made(book)
        assert change == "half" or not torch.equal(book.codes, before_KD)
        with opened(book):
            assert_exact(book, book.codes)
            assert_exact(book, book.codes)


COUNTED = [
    "Adam", "foreach AdamW", "load_state_dict", "load_state_dict, assigned", "revival", "moving average", "in place",
    "another parameter",
]  # fmt: skip


@pytest.mark.parametrize("change", COUNTED)
def test_codes_that_change_inside_are_an_error(change: str) -> None:
    made, choices = CHANGES[change]
    book = book_of(**choices)
    with unchanged(book):
        assert_exact(book, book.codes)
        made(book)
        with pytest.raises(
            ValueError, match=r"written to or replaced inside `unchanged\(\)`; leave it before an opt"
        ):
            book(Z_ND)
    assert_exact(book, book.codes)


@pytest.mark.parametrize("change", ["half", ".data"])
def test_codes_that_moved_inside_are_prepared_again(prepared_times: list[int], change: str) -> None:
    book = book_of()
    with unchanged(book):
        assert_exact(book, book.codes)
        CHANGES[change][0](book)
        assert_exact(book, book.codes)
        assert_exact(book, book.codes)
    assert prepared_times == [50, 50]


def test_copies_made_inside_know_nothing_of_it(prepared_times: list[int]) -> None:
    book = book_of().eval()
    with unchanged(book):
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
            for factor in (2, 3):
                other.codes.data.mul_(factor)
                assert_exact(other, other.codes)
            assert_exact(book, book.codes)
    assert prepared_times == [50] * 9


def test_memory_is_given_back_at_the_end() -> None:
    book = book_of().eval()
    with unchanged(book):
        book(Z_ND)
        kept = codebook._unchanged[book]
        assert kept is not None
        buffer = weakref.ref(kept.buffer_for(book.codes, "l2"))  # type: ignore[arg-type]
        del kept
        assert buffer() is not None
    assert buffer() is None


def test_what_inference_mode_prepared_can_be_trained_with(prepared_times: list[int]) -> None:
    book = book_of()
    with unchanged(book):
        with torch.inference_mode():
            assert_exact(book, book.codes)
        z_ND = Z_ND.clone().requires_grad_()
        found = book(z_ND)
        (found.vq_loss + found.commit_loss).backward()
    assert book.codes.grad is not None
    assert prepared_times == [50]
    with torch.inference_mode():
        inside = book_of()
        with unchanged(inside):
            assert_exact(inside, inside.codes)  # its writes are not counted
            inside.codes.mul_(2)
            assert_exact(inside, inside.codes)


def test_stand_ins_for_the_parameter_are_not_remembered() -> None:
    book = book_of().eval()
    expected = book_of(CODES_KD.flip(0)).eval()(Z_ND)
    stand_in = {"codes": CODES_KD.flip(0).contiguous()}
    with unchanged(book):
        assert_exact(book, book.codes)
        assert torch.equal(torch.func.functional_call(book, stand_in, (Z_ND,)).index_N, expected.index_N)
        assert_exact(book, book.codes)


def test_a_compiled_pass_prepares_in_itself(prepared_times: list[int]) -> None:
    book = book_of().eval()
    compiled = torch.compile(book, fullgraph=True, backend="aot_eager")
    with unchanged(compiled):  # type: ignore[arg-type]
        for count in (1, 2):
            assert_exact(compiled, book.codes)  # type: ignore[arg-type]
            assert len(prepared_times) == count
        book.codes.data.mul_(2)
        assert_exact(compiled, book.codes)  # type: ignore[arg-type]


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_pass_prepares_in_itself(prepared_times: list[int], strict: bool) -> None:
    book = book_of().eval()
    with unchanged(book):
        book(Z_ND)
        program = torch.export.export(book, (Z_ND,), strict=strict).module()
    before = len(prepared_times)
    program.codes.data.mul_(2)
    assert_exact(program, program.codes)  # type: ignore[arg-type]
    assert len(prepared_times) == before + 1


@pytest.mark.parametrize("choices", [{"top_k": 2}, {"metric": "cosine", "centre": True}])
def test_other_searches_keep_nothing(choices: dict[str, Any]) -> None:
    book = book_of(**choices).eval()
    with unchanged(book):
        first, again = book(Z_ND), book(Z_ND)
        assert codebook._unchanged[book] is None
    assert torch.equal(first.index_N, again.index_N)


def tiny() -> tuple[RunConfig, model.VQSA]:
    settings = read_recipe(Path(__file__).parent / "tiny.toml")
    settings["model"]["init"] = "normal"
    run = validated(RunConfig, {**settings, "data": "unused", "out": "unused"}, "test")
    return run, model.build(run.model, 3)


def test_validations_prepare_once(prepared_times: list[int]) -> None:
    run, net = tiny()
    sample_id = torch.arange(4)
    images_u8, none = torch.zeros(4, 32, 32, 3, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
    batch = EvaluationBatch(images_u8, none, sample_id, none.bool())
    device = torch.device("cpu")
    score(net, [batch] * 3, run.pipeline, [(CLEAN, 0)], seed=1, flavour="bethge", device=device)
    assert prepared_times == [run.model.codes]


class TwoMicroBatches:
    micros = 2

    def __next__(self) -> TrainingBatch:
        none = torch.zeros(4, dtype=torch.int64)
        return TrainingBatch(
            images=torch.randn(4, 3, 32, 32),
            labels=none,
            kind=none.int(),
            severity=none.int(),
            sample_id=none,
            position=none,
            clean_images=None,
            augmented=(),
            damaged=none.bool(),
        )


def test_steps_prepare_once(prepared_times: list[int]) -> None:
    run, net = tiny()
    accelerator = Accelerator(cpu=True)
    optimizer = accelerator.prepare(torch.optim.SGD(net.parameters(), lr=0.1, fused=True))
    meter = Meter(accelerator)
    for step in range(2):
        train_step(accelerator, net, optimizer, TwoMicroBatches(), meter, run, step=step)
    assert prepared_times == [run.model.codes] * 2
