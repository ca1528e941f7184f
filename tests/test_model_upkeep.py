"""Keeping a codebook in use: k-means start, moving average, revival and centre, alone and on two ranks."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import scipy.cluster.vq
import torch
import torch.distributed as dist
from torch import Tensor

from model.codebook import Codebook, nearest_code
from model.codebook.global_batch import GlobalBatch
from model.codebook.kmeans import kmeans

# Shapes: N = features, K = codes, D = feature dimension.


def _features(n: int = 64, d: int = 6, seed: int = 5) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).exp()


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(8)


def _step(book: Codebook, z_ND: Tensor) -> Tensor:
    index_N = book(z_ND).index_N
    book.update(z_ND, index_N)
    return index_N


@pytest.mark.parametrize("seed", range(3))
def test_kmeans_equals_scipys(seed: int) -> None:
    z_ND = _features(400, 5, seed)
    start_KD = z_ND[:12]
    expected_KD, index_N = scipy.cluster.vq.kmeans2(
        z_ND.double().numpy(), start_KD.double().numpy(), iter=7, minit="matrix", missing="raise"
    )
    found_KD = kmeans(GlobalBatch(z_ND), start_KD, 7)
    torch.testing.assert_close(found_KD.double(), torch.from_numpy(expected_KD), rtol=1e-5, atol=1e-6)
    assert len(set(index_N.tolist())) == 12


def test_kmeans_stops_where_nothing_moves_and_gives_empty_centres_work() -> None:
    z_ND = torch.tensor([[0.0], [1.0], [10.0], [11.0], [100.0]])
    # The third centre has no feature: it goes to the one farthest from its own centre.
    found_KD = kmeans(GlobalBatch(z_ND), torch.tensor([[0.0], [30.0], [-500.0]]), 10)
    assert sorted(found_KD.flatten().tolist()) == [0.5, 10.5, 100.0]
    assert torch.equal(kmeans(GlobalBatch(z_ND), found_KD, 10), found_KD)
    # Fewer distinct features than centres: some stay without, none is lost or NaN.
    same_KD = kmeans(GlobalBatch(torch.ones(3, 2)), torch.rand(2, 2), 4)
    assert same_KD.isfinite().all()


def test_a_kmeans_start_lowers_the_distance_of_a_drawn_one() -> None:
    z_ND = _features(500, 8)
    drawn, clustered = Codebook(20, 8), Codebook(20, 8, init="kmeans")
    sqdist = [float(nearest_code(z_ND, b.codes)[1].mean()) for b in (drawn, clustered) if b(z_ND) is not None]
    assert sqdist[1] < 0.8 * sqdist[0]
    assert clustered.is_initialised
    with pytest.warns(UserWarning, match="600 codes starts from 500 features"):
        Codebook(600, 8, init="kmeans")(z_ND)


def test_moving_average_is_the_fields_formula() -> None:
    decay, epsilon, codes = 0.9, 0.01, 7
    book = Codebook(codes, 6, ema=decay, ema_epsilon=epsilon)
    assert not book.codes.requires_grad
    book(_features())
    sums = book.codes.detach().double().clone()
    numbers = torch.ones(codes, dtype=torch.float64)
    for seed in range(4):
        z_ND = _features(50, 6, seed)
        index_N = _step(book, z_ND)
        for code in range(codes):
            mine = z_ND[index_N == code].double()
            numbers[code] = decay * numbers[code] + (1 - decay) * len(mine)
            sums[code] = decay * sums[code] + (1 - decay) * mine.sum(0)
        smoothed = (numbers + epsilon) / (numbers.sum() + codes * epsilon) * numbers.sum()
        torch.testing.assert_close(book.codes.double(), sums / smoothed[:, None], rtol=1e-5, atol=1e-6)
    z_ND = _features().requires_grad_()
    out = book(z_ND)
    (out.vq_loss + out.commit_loss).backward()
    assert book.codes.grad is None
    assert z_ND.grad is not None
    torch.testing.assert_close(z_ND.grad, 2 * (z_ND - out.quantised_ND).detach() / z_ND.numel())


def test_unused_codes_come_back_as_features_of_the_batch() -> None:
    book = Codebook(10, 6, init="normal", revive_after=3, ema=0.9)
    with torch.no_grad():
        book.codes[:4] = _features(40, 6, 1)[:4]
        book.codes[4:] += 1e4
        book.upkeep.restart(book.codes)  # type: ignore[union-attr]
    start_KD = book.codes.detach().clone()
    for step in range(1, 4):
        z_ND = _features(40, 6, step)
        _step(book, z_ND)
        far = (book.codes.detach()[4:].abs() > 5e3).all(1)
        assert bool(far.all()) == (step < 3), "only after three steps"
    upkeep = book.upkeep
    assert upkeep is not None
    assert upkeep.revived == 6
    rows = {tuple(row) for row in z_ND.tolist()}
    assert {tuple(row) for row in book.codes.detach()[4:].tolist()} <= rows
    assert len({tuple(row) for row in book.codes.detach()[4:].tolist()}) == 6
    assert upkeep.ema_count_K[4:].eq(1).all()
    assert not torch.equal(book.codes[:4], start_KD[:4])
    with torch.no_grad():  # a code that was in use in the first three steps, and is not in the next three
        upkeep.ema_sum_KD[0] += 1e6
        book.codes[0] += 1e6
    for _ in range(3):
        _step(book, z_ND)
    assert upkeep.revived == 7, "the six sit on features of this batch, so they are in use"
    assert (book.codes[0] < 1e5).all()


def test_fewer_features_than_dead_codes_revives_as_many() -> None:
    book = Codebook(50, 6, init="uniform_1n", revive_after=1)
    with torch.no_grad():
        book.codes += 1e4
        book.codes[0] = 0
    z_ND = _features(8)
    _step(book, z_ND)
    assert book.upkeep is not None
    assert book.upkeep.revived == 8
    z_ND[:] = torch.nan
    _step(book, z_ND)
    assert book.upkeep.revived == 8
    assert book.codes.isfinite().all()


def test_centre_follows_the_features_and_changes_the_cosine_search_only() -> None:
    book = Codebook(9, 6, metric="cosine", centre=True, init="normal")
    seen = []
    for seed in range(3):
        z_ND = _features(30, 6, seed)
        seen.append(z_ND.double().mean(0))
        _step(book, z_ND)
        # The first hundred batches count alike.
        torch.testing.assert_close(book.upkeep.centre_D.double(), torch.stack(seen).mean(0))  # type: ignore[union-attr]
    book.eval()
    centre_D = book.upkeep.centre_D.double()  # type: ignore[union-attr]
    z_ND = _features(200, 6, 9)
    found = book(z_ND)
    a, b = z_ND.double() - centre_D, book.codes.detach().double() - centre_D
    cosine_NK = torch.nn.functional.normalize(a) @ torch.nn.functional.normalize(b).T
    assert torch.equal(found.index_N, cosine_NK.argmax(1))
    plain_N = nearest_code(z_ND, book.codes, "cosine")[0]
    assert (found.index_N != plain_N).any()
    assert torch.equal(found.quantised_ND, book.codes[found.index_N]), "the raw codes are gathered"
    started = Codebook(9, 6, metric="cosine", centre=True)
    started.train()(z_ND)
    torch.testing.assert_close(started.upkeep.centre_D.double(), z_ND.double().mean(0))  # type: ignore[union-attr]


def test_a_feature_that_is_not_finite_is_left_out() -> None:
    books = [
        Codebook(5, 6, metric="cosine", init="normal", ema=0.9, revive_after=2, centre=True) for _ in range(2)
    ]
    z_ND = _features(20)
    broken_ND = torch.cat([z_ND, torch.full((1, 6), torch.nan), torch.full((1, 6), torch.inf)])
    for _ in range(3):
        _step(books[0], z_ND)
        _step(books[1], broken_ND)
        books[0].update(z_ND[:0].new_zeros(1, 6).fill_(torch.nan), torch.tensor([-1]))
        books[1].update(z_ND[:0].new_zeros(1, 6).fill_(torch.nan), torch.tensor([-1]))
    assert torch.equal(books[0].upkeep.ema_count_K, books[1].upkeep.ema_count_K)  # type: ignore[union-attr]
    assert books[1].codes.isfinite().all()
    assert books[1].upkeep.centre_D.isfinite().all()  # type: ignore[union-attr]


OPTIONS: dict[str, Any] = {
    "ema": 0.9,
    "revive_after": 2,
    "centre": True,
    "metric": "cosine",
    "init": "kmeans",
}


def test_resumed_upkeep_goes_on_bit_for_bit_and_has_no_state_where_off() -> None:
    book = Codebook(12, 6, **OPTIONS)
    for seed in range(3):
        _step(book, _features(64, 6, seed))
    resumed = Codebook(12, 6, **OPTIONS)
    resumed.load_state_dict(copy.deepcopy(book.state_dict()))
    for seed in range(3, 8):
        for b in (book, resumed):
            _step(b, _features(64, 6, seed))
    state = resumed.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in book.state_dict().items())
    assert set(state) == {"codes", "initialised"} | {
        f"upkeep.{name}" for name in ("steps", "ema_count_K", "ema_sum_KD", "recent_K", "centre_D")
    }
    assert set(Codebook(12, 6).state_dict()) == {"codes", "initialised"}
    assert set(Codebook(12, 6, revive_after=2).state_dict()) == {
        "codes", "initialised", "upkeep.steps", "upkeep.recent_K",
    }  # fmt: skip


@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e15])
def test_sums_are_exact_and_in_any_order(scale: float) -> None:
    # Twelve orders of magnitude: plain float64 sums of these depend on the order.
    z_ND = _features(301, 300) * scale * 10 ** torch.empty(301, 300).uniform_(-9, 3, generator=_generator())
    index_N = torch.randint(-1, 7, (301,), generator=torch.Generator().manual_seed(0))
    sums_KD = GlobalBatch(z_ND).sums(index_N, 7)
    order = torch.randperm(301, generator=torch.Generator().manual_seed(1))
    assert torch.equal(GlobalBatch(z_ND[order]).sums(index_N[order], 7), sums_KD)
    for code in range(7):
        exact_D = z_ND[index_N == code].double().sum(0)
        torch.testing.assert_close(sums_KD[code], exact_D, rtol=1e-11, atol=1e-12 * float(z_ND.abs().max()))
    mean_D = GlobalBatch(z_ND).mean()
    torch.testing.assert_close(
        mean_D, z_ND.double().mean(0), rtol=1e-11, atol=1e-12 * float(z_ND.abs().max())
    )


# One run of everything: the k-means start from two micro-batches, then steps of two micro-batches each.
def _run(mine: Any, codes: int, options: dict[str, Any]) -> dict[str, Tensor]:
    book = Codebook(codes, 6, **options)
    book.initialise_from(mine(_features(96)), parts=2)
    state = {"start": book.codes.detach().clone()}
    for seed in range(5):
        z_ND = mine(_features(96, 6, seed) + (0.3 * seed))
        index_N = book(z_ND).index_N
        book.update(z_ND, index_N, parts=2)
    assert book.upkeep is not None
    usage_K = book.usage_K.clone()
    if dist.is_initialized():
        dist.all_reduce(usage_K)
    return {**state, **book.state_dict(), "usage": usage_K, "revived": torch.tensor(book.upkeep.revived)}


CASES = [
    (12, OPTIONS),
    (40, {"ema": 0.5, "revive_after": 1, "init": "kmeans"}),
    (120, {"revive_after": 2, "init": "data", "ema": 0.8}),
]


def _one_rank(rank: int, ranks: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    torch.set_num_threads(1)

    # The stream deals micro-batch 0 to every rank, then micro-batch 1, and so on.
    def mine(z_ND: Tensor) -> Tensor:
        return torch.cat([part.chunk(ranks)[rank] for part in z_ND.chunk(2)])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [_run(mine, codes, options) for codes, options in CASES]
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:codebook of")
def test_two_ranks_do_what_one_does_to_the_last_bit(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_one_rank, (2, str(tmp_path)), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for number, (codes, options) in enumerate(CASES):
        alone = _run(lambda z_ND: z_ND, codes, options)
        assert int(alone["revived"]) > 0 or codes == 12
        for rank in range(2):
            for name, value in alone.items():
                assert torch.equal(found[rank][number][name], value), (number, rank, name)
