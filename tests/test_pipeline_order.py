"""The stream of samples: Philox against published vectors, permutations, division over ranks."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.order import Order, batch_positions, permutation
from pipeline.philox import Purpose, below, draw, philox4x32


@pytest.mark.parametrize(
    ("counter", "key", "want"),
    [
        ([0, 0, 0, 0], (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_vectors(
    counter: list[int], key: tuple[int, int], want: list[int]
) -> None:
    """Known answers of Random123 (Salmon et al.), philox4x32-10."""
    got = philox4x32(np.array([counter, counter], np.uint32), key)
    assert got.tolist() == [want, want]


def test_draws_differ_by_every_part_of_their_counter() -> None:
    base = {"seed": 1, "epoch": 2, "index": 3, "purpose": Purpose.CROP, "block": 4}
    variants = [base] + [
        {**base, **change}
        for change in (
            {"seed": 1 + 2**40},
            {"epoch": 3},
            {"index": 3 + 2**40},
            {"purpose": Purpose.FLIP},
            {"block": 5},
        )
    ]
    assert len({tuple(draw(**v)[0].tolist()) for v in variants}) == len(variants)  # type: ignore[arg-type]


@given(st.integers(1, 2000), st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1))
def test_an_epoch_visits_every_sample_once(samples: int, seed: int, epoch: int) -> None:
    assert sorted(permutation(samples, seed, epoch).tolist()) == list(range(samples))


def test_permutations_of_three_are_uniform() -> None:
    counts = Counter(
        tuple(permutation(3, seed, epoch).tolist()) for seed in range(60) for epoch in range(100)
    )
    expected = 6000 / 6
    chi2 = sum((counts[p] - expected) ** 2 / expected for p in counts)
    assert len(counts) == 6
    assert chi2 < 20.5  # 99.9 % point of chi-square with 5 degrees of freedom


@given(
    per_micro=st.integers(1, 4),
    ranks=st.sampled_from([1, 2, 3, 4]),
    micros=st.sampled_from([1, 2, 3]),
)
def test_the_global_batches_do_not_depend_on_the_division(per_micro: int, ranks: int, micros: int) -> None:
    batch = per_micro * ranks * micros
    for step in range(5):
        parts = [
            batch_positions(step, micro, rank, batch=batch, ranks=ranks, micros=micros)
            for micro in range(micros)
            for rank in range(ranks)
        ]
        assert np.concatenate(parts).tolist() == list(range(step * batch, (step + 1) * batch))


@given(st.integers(1, 40), st.integers(1, 100), st.integers(0, 1000))
def test_a_window_of_n_positions_over_whole_epochs_holds_each_sample_once(
    n: int, batch: int, start: int
) -> None:
    order = Order(n, seed=5)
    first = (start // n) * n
    positions = np.arange(first, first + n)
    got = np.concatenate([order.at(positions[i : i + batch])[1] for i in range(0, n, batch)])
    assert sorted(got.tolist()) == list(range(n))
    assert set(order.at(positions)[0].tolist()) == {first // n}


def test_epochs_differ_and_a_batch_may_span_two() -> None:
    order = Order(100, seed=0)
    epoch_B, sample_B = order.at(np.arange(90, 110))
    assert epoch_B.tolist() == [0] * 10 + [1] * 10
    assert sample_B[:10].tolist() == permutation(100, 0, 0)[90:].tolist()
    assert sample_B[10:].tolist() == permutation(100, 0, 1)[:10].tolist()
    assert permutation(100, 0, 0).tolist() != permutation(100, 0, 1).tolist()


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="must divide evenly over 2 processes x 3"):
        batch_positions(0, 0, 0, batch=10, ranks=2, micros=3)


@given(st.integers(1, 2**31), st.lists(st.integers(0, 2**32 - 1), min_size=1))
def test_below_stays_below(bound: int, words: list[int]) -> None:
    got = below(np.array(words, np.uint32), bound)
    assert (got >= 0).all()
    assert (got < bound).all()
