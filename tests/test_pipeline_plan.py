"""The plan of a batch: crop windows as torchvision's, sampling laws, keys, evaluation arithmetic."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats
from torchvision import transforms

from pipeline.config import PipelineConfig
from pipeline.corruptions import HELD_OUT_KINDS, kind_id
from pipeline.plan import (
    SEVERITIES,
    TrainingPlanner,
    _exp,
    bag_cells,
    centre_crop_plan,
    crop_windows,
    evaluation_keys,
)

KINDS = ("gaussian_noise", "brightness", "contrast")
IDS = {kind_id(kind) for kind in KINDS}


def planner(samples: int = 1000, **settings: object) -> TrainingPlanner:
    config = PipelineConfig(**{"kinds": KINDS, **settings})  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    return TrainingPlanner(config, 7, rng.integers(40, 600, samples), rng.integers(40, 600, samples))


def plan_of(planned: TrainingPlanner, ids: np.ndarray, epoch: int = 0):  # type: ignore[no-untyped-def]
    return planned.plan(ids + 10_000 * epoch, np.full(len(ids), epoch), ids)


def test_exp_is_exact_to_a_few_ulp() -> None:
    x = np.linspace(-3, 3, 10_001)
    np.testing.assert_allclose(_exp(x), np.exp(x), rtol=4e-15)


@given(
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
    low=st.floats(0.01, 1.0),
    aspect=st.floats(0.2, 1.0),
    seed=st.integers(0, 2**64 - 1),
)
@settings(max_examples=60)
def test_windows_lie_inside_the_image(height: int, width: int, low: float, aspect: float, seed: int) -> None:
    ids = np.arange(20)
    anchor, window = crop_windows(
        seed,
        np.zeros(20, np.int64),
        ids,
        np.full(20, height),
        np.full(20, width),
        (low, 1.0),
        (aspect, 1 / aspect),
    )
    assert (window > 0).all()
    assert (anchor >= 0).all()
    assert (anchor + window <= [height, width]).all()


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (100, 900)])
def test_windows_have_torchvisions_distribution(height: int, width: int) -> None:
    """Two-sample Kolmogorov-Smirnov of every coordinate; 100 x 900 often needs the fallback."""
    n = 4000
    scale, ratio = (0.08, 1.0), (3 / 4, 4 / 3)
    anchor, window = crop_windows(
        3, np.zeros(n, np.int64), np.arange(n), np.full(n, height), np.full(n, width), scale, ratio
    )
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    reference = np.array(
        [transforms.RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(n)]
    )
    for ours, theirs in zip(np.concatenate([anchor, window], axis=1).T, reference.T, strict=True):
        assert stats.ks_2samp(ours, theirs).pvalue > 1e-4


def test_the_fallback_is_torchvisions() -> None:
    """No window of the whole area fits a 10 x 1000 image, so both take the central one."""
    image = torch.empty(3, 10, 1000)
    want = transforms.RandomResizedCrop.get_params(image, [1.0, 1.0], [3 / 4, 4 / 3])
    anchor, window = crop_windows(
        0, np.zeros(1, np.int64), np.arange(1), np.array([10]), np.array([1000]), (1.0, 1.0), (3 / 4, 4 / 3)
    )
    assert (*anchor[0], *window[0]) == tuple(want)


@given(st.permutations(range(30)), st.integers(1, 29))
@settings(max_examples=25)
def test_a_samples_plan_does_not_depend_on_its_batch(ids: list[int], cut: int) -> None:
    planned = planner()
    whole = plan_of(planned, np.arange(30))
    for part in (ids[:cut], ids[cut:]):
        got = plan_of(planned, np.array(part))
        for name in ("anchor_B2", "window_B2", "flip_B", "kind_B", "severity_B", "key_B"):
            assert np.array_equal(getattr(got, name), getattr(whole, name)[part]), name


def test_epochs_and_seeds_change_every_choice() -> None:
    planned, ids = planner(), np.arange(500)
    a, b = plan_of(planned, ids, 0), plan_of(planned, ids, 1)
    assert not np.intersect1d(a.key_B, b.key_B).size
    for name in ("anchor_B2", "flip_B", "kind_B", "severity_B"):
        assert 0.05 < (getattr(a, name) != getattr(b, name)).mean() < 1, name
    assert len(np.unique(a.key_B)) == 500


def test_the_uniform_law() -> None:
    plan = plan_of(planner(40_000), np.arange(40_000))
    kinds = Counter(plan.kind_B.tolist())
    assert set(kinds) == IDS | {0}
    assert stats.chisquare(list(kinds.values())).pvalue > 1e-4  # clean is one more kind
    assert (plan.severity_B[plan.kind_B == 0] == 0).all()
    severities = Counter(plan.severity_B[plan.kind_B != 0].tolist())
    assert set(severities) == {1, 2, 3, 4, 5}
    assert stats.chisquare(list(severities.values())).pvalue > 1e-4
    assert stats.binomtest(int(plan.flip_B.sum()), 40_000, 0.5).pvalue > 1e-4


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_the_clean_share_is_an_option(fraction: float) -> None:
    plan = plan_of(planner(5000, clean_fraction=fraction), np.arange(5000))
    clean = int((plan.kind_B == 0).sum())
    assert (
        stats.binomtest(clean, 5000, fraction).pvalue > 1e-4 if 0 < fraction < 1 else clean == 5000 * fraction
    )


def test_no_kinds_means_clean() -> None:
    assert not plan_of(planner(kinds=()), np.arange(50)).kind_B.any()


def test_a_bag_holds_every_cell_once() -> None:
    planned = planner(law="bag")
    cells = 4 * SEVERITIES
    plan = planned.plan(np.arange(3 * cells), np.zeros(3 * cells, np.int64), np.arange(3 * cells))
    for bag in range(3):
        part = slice(bag * cells, (bag + 1) * cells)
        seen = Counter(zip(plan.kind_B[part].tolist(), plan.severity_B[part].tolist(), strict=True))
        assert seen == {**{(k, s): 1 for k in IDS for s in range(1, 6)}, (0, 0): SEVERITIES}


def test_bags_do_not_depend_on_batches() -> None:
    planned = planner(law="bag")
    ids = np.arange(100)
    whole = plan_of(planned, ids)
    parts = [plan_of(planned, ids[i : i + 7]) for i in range(0, 100, 7)]
    assert np.array_equal(whole.kind_B, np.concatenate([p.kind_B for p in parts]))
    assert np.array_equal(whole.severity_B, np.concatenate([p.severity_B for p in parts]))


def test_the_authors_law_inside_a_bag() -> None:
    """Kind uniform among those left: the second cell repeats the first's kind with chance 1/16, not 4/79."""
    bags = [bag_cells(0, bag, 15, True)[0] for bag in range(6000)]
    assert stats.chisquare(np.bincount([bag[0] for bag in bags], minlength=16)).pvalue > 1e-4
    repeats = sum(int(bag[0] == bag[1]) for bag in bags)
    assert stats.binomtest(repeats, 6000, 1 / 16).pvalue > 1e-3
    assert stats.binomtest(repeats, 6000, 4 / 79).pvalue < 1e-2


@pytest.mark.parametrize("law", ["uniform", "bag"])
def test_paired_mode_draws_no_clean_sample(law: str) -> None:
    plan = plan_of(planner(law=law, paired=True), np.arange(300))
    assert set(plan.kind_B.tolist()) == IDS


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kinds": (HELD_OUT_KINDS[0],)}, "held out for testing"),
        ({"kinds": ("gausian_noise",)}, "gaussian_noise"),
        ({"kinds": ("identity",)}, "say clean_fraction"),
        ({"kinds": ("contrast", "contrast")}, "names a kind twice"),
        ({"law": "bag", "clean_fraction": 0.5}, "use law = 'uniform'"),
        ({"crop_scale": (0.5, 0.1)}, "lowest <= highest"),
        ({"crop_scale": (0.5, 1.5)}, "above the whole image"),
        ({"paired": True, "clean_fraction": 0.5}, "no sample is drawn clean"),
        ({"kinds": (), "paired": True}, "at least one corruption"),
        ({"eval_resize": 100}, "smaller than image_size"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PipelineConfig(**{"kinds": KINDS, **settings})  # type: ignore[arg-type]


def test_held_out_kinds_can_be_asked_for() -> None:
    assert PipelineConfig(kinds=HELD_OUT_KINDS[:1], allow_held_out=True).kinds == HELD_OUT_KINDS[:1]


@given(
    st.integers(1, 2000),
    st.integers(1, 2000),
    st.sampled_from([(256, 224), (128, 112), (73, 64), (232, 224)]),
)
@settings(max_examples=100)
def test_evaluation_follows_torchvisions_arithmetic(height: int, width: int, sizes: tuple[int, int]) -> None:
    resize, size = sizes
    if max(height, width) > 20 * min(height, width):
        return
    plan = centre_crop_plan(
        np.zeros(1, np.int64), np.array([height]), np.array([width]), resize=resize, size=size
    )
    image = Image.new("L", (width, height))
    resized = transforms.Resize(resize)(image)
    assert tuple(plan.size_B2[0]) == (resized.height, resized.width)
    ramp = Image.fromarray(
        np.add.outer(np.arange(resized.height) * 3, np.arange(resized.width) * 5).astype(np.int32)
    )
    cropped = np.asarray(transforms.CenterCrop(size)(ramp))
    row, col = plan.offset_B2[0]
    assert np.array_equal(cropped, np.asarray(ramp)[row : row + size, col : col + size])


def test_evaluation_keys_differ_by_cell_and_not_by_batch() -> None:
    ids = np.arange(50)
    cells = [(kind, severity) for kind in range(1, 20) for severity in range(1, 6)]
    keys = np.stack([evaluation_keys(1, ids, *cell) for cell in cells])
    assert len(np.unique(keys)) == keys.size
    assert np.array_equal(evaluation_keys(1, ids[10:20], 3, 2), evaluation_keys(1, ids, 3, 2)[10:20])
