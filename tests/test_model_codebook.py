"""The codebook: how it starts, alone and on two ranks, and what it measures."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from model.codebook import Codebook, codes_used, distance_statistics, perplexity

# Shapes: N = features, K = codes, D = feature dimension.


def _features(n: int = 64, d: int = 6) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(5))


def _rows(book: Codebook) -> set[tuple[float, ...]]:
    return {tuple(row) for row in book.codes.detach().tolist()}


def test_starts_from_distinct_features_of_the_first_training_batch() -> None:
    book, z_ND = Codebook(20, 6), _features()
    assert not book.is_initialised
    book(z_ND)
    assert book.is_initialised
    assert bool(book.initialised)
    assert len(_rows(book)) == 20
    assert _rows(book) <= {tuple(row) for row in z_ND.tolist()}
    before_KD = book.codes.detach().clone()
    book(_features() + 1)
    assert torch.equal(book.codes, before_KD), "only the first batch counts"


def test_the_draw_is_its_own_and_follows_its_seed() -> None:
    books = [Codebook(20, 6, init_seed=seed) for seed in (0, 0, 1)]
    for number, book in enumerate(books):
        torch.manual_seed(number)  # the global generator has no say
        state = torch.get_rng_state()
        book(_features())
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(books[0].codes, books[1].codes)
    assert not torch.equal(books[0].codes, books[2].codes)


def test_more_codes_than_features_repeats_them_with_noise_and_says_so() -> None:
    book, z_ND = Codebook(150, 6), _features()
    with pytest.warns(UserWarning, match="150 codes starts from 64 features"):
        book(z_ND)
    assert len(_rows(book)) == 150
    assert torch.cdist(book.codes.detach(), z_ND).min(1).values.max() < 0.01 * 6 * z_ND.std()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Codebook(64, 6)(z_ND)


@pytest.mark.filterwarnings("ignore:Euclidean search over codes from U")
@pytest.mark.parametrize(
    ("init", "least", "most", "mean"),
    [("uniform03", 0.0, 3.0, 1.5), ("uniform_1n", -1 / 50, 1 / 50, 0.0), ("normal", -6.0, 6.0, 0.0)],
)
def test_random_starts(init: str, least: float, most: float, mean: float) -> None:
    book = Codebook(50, 200, init=init)  # type: ignore[arg-type]
    codes_KD = book.codes.detach()
    assert book.is_initialised
    assert codes_KD.min() >= least
    assert codes_KD.max() <= most
    assert codes_KD.mean().item() == pytest.approx(mean, abs=0.02 * (most - least))
    expected_std = 1.0 if init == "normal" else (most - least) / math.sqrt(12)
    assert codes_KD.std().item() == pytest.approx(expected_std, rel=0.03)
    torch.manual_seed(99)
    assert torch.equal(codes_KD, Codebook(50, 200, init=init).codes)  # type: ignore[arg-type]


def test_choices_that_do_not_exist_or_are_unwise() -> None:
    with pytest.raises(ValueError, match="'zeros'"):
        Codebook(5, 5, init="zeros")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="top_k is 6; choose 1 to the number of codes, 5"):
        Codebook(5, 5, top_k=6)
    with pytest.warns(UserWarning, match=r"Euclidean search over codes from U\(0, 3\) uses few"):
        Codebook(5, 5, init="uniform03")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Codebook(5, 5, init="uniform03", metric="cosine")


def test_a_loaded_codebook_is_not_drawn_again() -> None:
    trained = Codebook(20, 6)
    trained(_features())
    resumed = Codebook(20, 6)
    resumed.load_state_dict(copy.deepcopy(trained.state_dict()))
    assert resumed.is_initialised
    resumed(_features() + 1)
    assert torch.equal(resumed.codes, trained.codes)
    assert set(trained.state_dict()) == {"codes", "initialised"}
    # And one that had not started yet still waits.
    waiting = Codebook(20, 6)
    waiting.load_state_dict(Codebook(20, 6).state_dict())
    assert not waiting.is_initialised


def test_evaluating_an_empty_codebook_is_refused() -> None:
    with pytest.raises(ValueError, match="load a checkpoint, or run one training step"):
        Codebook(20, 6).eval()(_features())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_starting_from_bad_features_is_refused(bad: float) -> None:
    z_ND = _features()
    z_ND[3, 1] = bad
    book = Codebook(20, 6)
    with pytest.raises(ValueError, match="1 values that are not finite"):
        book(z_ND)
    assert not book.is_initialised
    with pytest.raises(ValueError, match="without features"):
        book(_features(0))
    with pytest.raises(ValueError, match="63 features do not divide into 2"):
        book.initialise_from(_features(63), parts=2)


def test_usage_counts_training_only_and_moves_with_the_module() -> None:
    book = Codebook(4, 1, init="normal")
    with torch.no_grad():
        book.codes.copy_(torch.tensor([[0.0], [10.0], [20.0], [30.0]]))
    z_ND = torch.tensor([[1.0], [2.0], [11.0], [29.0], [31.0], [torch.nan]])
    book(z_ND)
    book(z_ND[:1])
    book.eval()(z_ND)
    assert book.usage_K.tolist() == [3, 1, 0, 2]
    assert codes_used(book.usage_K).item() == 3
    shares = [3 / 6, 1 / 6, 2 / 6]
    assert perplexity(book.usage_K).item() == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)))
    sqdist = [1.0, 4.0, 1.0, 1.0, 1.0, 1.0]
    statistics = distance_statistics(book.usage.moments_3, book.usage.farthest)
    assert statistics["sqdist_mean"] == pytest.approx(sum(sqdist) / 6)
    assert statistics["sqdist_std"] == pytest.approx(torch.tensor(sqdist).std(correction=0).item())
    assert statistics["sqdist_max"] == 4
    book.reset_usage()
    assert distance_statistics(book.usage.moments_3, book.usage.farthest)["sqdist_mean"] == 0
    assert book.to("meta").usage_K.is_meta
    book = Codebook(4, 1, init="normal").half()
    assert book.usage_K.dtype == torch.int64
    assert book.usage.moments_3.dtype == torch.float64
    assert codes_used(book.usage_K).item() == 0
    assert perplexity(book.usage_K).item() == 1
    assert perplexity(torch.full((7,), 3)).item() == pytest.approx(7)


def _one_rank(rank: int, ranks: int, parts: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    torch.set_num_threads(1)
    # The stream deals micro-batch 0 to every rank, then micro-batch 1, and so on.
    mine_ND = torch.cat([part.chunk(ranks)[rank] for part in _features().chunk(parts)])
    for codes in (20, 150):
        book = Codebook(codes, 6)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            book.initialise_from(mine_ND, parts)
        torch.save(book.codes.detach(), f"{folder}/{codes}-{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_start_from_the_same_codes_as_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_one_rank, (2, 2, str(tmp_path)), nprocs=2)
    for codes in (20, 150):
        alone = Codebook(codes, 6)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            alone(_features())
        found = [torch.load(tmp_path / f"{codes}-{rank}.pt") for rank in range(2)]
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], alone.codes)
