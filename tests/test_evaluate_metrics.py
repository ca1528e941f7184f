"""The metrics of an evaluation against torchmetrics, scipy and definitions in float64."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torchmetrics.functional.classification import multiclass_calibration_error

from pipeline.corruptions import TRAINING_KINDS
from tools.evaluation.bootstrap import interval, resampled_means
from tools.evaluation.calibration import expected_calibration_error
from tools.evaluation.cells import cells_from_outcomes, intervals, perplexity, severity_correlations
from tools.evaluation.correlation import correlation, logistic
from tools.evaluation.findings import Findings, joint_intervals
from tools.evaluation.models import Classifier, Preprocessing, Signals
from tools.evaluation.outcomes import VALUES, Outcomes
from tools.evaluation.passes import measure
from tools.evaluation.verdict import verdict
from tools.runtime.results import CLEAN, Cell, summarise

SHOWN = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
LOGITS = 3 * torch.randn(400, 7, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(7, (400,), generator=torch.Generator().manual_seed(1))


def values(rows: torch.Tensor, name: str) -> torch.Tensor:
    return rows[3 + VALUES.index(name)]


def test_values_of_an_image_are_those_of_torch_and_torchmetrics() -> None:
    rows = measure(Signals(LOGITS, None, None), None, LABELS, None)
    nll = torch.nn.functional.cross_entropy(LOGITS.double(), LABELS, reduction="none")
    torch.testing.assert_close(values(rows, "nll").double(), nll, atol=1e-5, rtol=1e-5)
    probability = LOGITS.double().softmax(1)
    brier = (probability - torch.nn.functional.one_hot(LABELS, 7)).square().sum(1)
    torch.testing.assert_close(values(rows, "brier").double(), brier, atol=1e-6, rtol=1e-5)
    ece = expected_calibration_error(values(rows, "confidence").numpy(), rows[1].numpy() > 0)
    theirs = multiclass_calibration_error(LOGITS.softmax(1), LABELS, num_classes=7, n_bins=15, norm="l1")
    assert ece == pytest.approx(float(theirs), abs=1e-6)
    assert torch.equal(rows[0].long(), LOGITS.argmax(1))
    top5 = LOGITS.topk(5).indices.eq(LABELS[:, None]).any(1)
    assert torch.equal(rows[2] > 0, top5)


def test_certain_predictions_have_a_bin_of_their_own() -> None:
    """A confidence of exactly 1 is not averaged with those just below it; torchmetrics does the same."""
    logits = torch.tensor([[200.0, 0], [200.0, 0], [3.4, 0.0], [3.3, 0.0]])
    labels = torch.tensor([0, 1, 0, 1])
    confidence = logits.softmax(1).max(1).values
    assert confidence[0] == 1
    ours = expected_calibration_error(confidence.numpy(), np.array([True, False, True, False]))
    theirs = multiclass_calibration_error(logits.softmax(1), labels, num_classes=2, n_bins=15, norm="l1")
    assert ours == pytest.approx(float(theirs), abs=1e-6)


def test_masked_outputs_take_no_part() -> None:
    """As if the model had only the outputs that are left."""
    left = torch.tensor([1, 2, 5])
    absent = torch.ones(7, dtype=torch.bool)
    absent[left] = False
    labels = torch.randint(3, (400,), generator=torch.Generator().manual_seed(2))
    masked = measure(Signals(LOGITS, None, None), None, left[labels], absent)
    alone = measure(Signals(LOGITS[:, left], None, None), None, labels, None)
    assert torch.equal(masked[0].long(), left[alone[0].long()])
    torch.testing.assert_close(masked[1:6], alone[1:6])
    assert not torch.equal(masked[1], measure(Signals(LOGITS, None, None), None, left[labels], None)[1])


def test_stability_against_the_clean_image() -> None:
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(5, 16, generator=generator) for _ in range(2))
    codes = torch.arange(20).view(5, 4)
    other = codes.clone()
    other[:, 0] += 100
    logits, labels = LOGITS[:5], LABELS[:5]
    clean = Signals(logits, a, a.repeat(1, 2), b, codes)
    same = measure(clean, clean, labels, None)
    assert values(same, "agreement").tolist() == [1] * 5
    assert values(same, "drift_after").abs().max() < 1e-6
    moved = measure(Signals(logits, b, b.repeat(1, 2), b, other), clean, labels, None)
    assert values(moved, "agreement").tolist() == [0.75] * 5
    cosine = (a * b).sum(1) / a.norm(dim=1) / b.norm(dim=1)
    torch.testing.assert_close(values(moved, "drift_before"), 1 - cosine)
    torch.testing.assert_close(values(moved, "drift_after"), 1 - cosine)
    assert values(moved, "residual").abs().max() < 1e-6
    alone = measure(Signals(logits, b, b), None, labels, None)
    assert values(alone, "drift_before").isnan().all()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=6, max_size=30))
def test_rank_correlation_with_ties(pairs: list[tuple[int, int]]) -> None:
    """Against the definition: Pearson's coefficient of average ranks."""
    x, y = np.array(pairs, float).T
    found = correlation(x, y).srcc
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        assert found is None
        return

    def ranks(v: np.ndarray) -> np.ndarray:
        return (v[:, None] > v).sum(1) + ((v[:, None] == v).sum(1) + 1) / 2

    assert found == pytest.approx(np.corrcoef(ranks(x), ranks(y))[0, 1], abs=1e-9)
    assert found == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    assert correlation(np.exp(x), y).srcc == pytest.approx(found)  # only the order counts


@pytest.mark.parametrize("sign", [1, -1])
def test_the_logistic_fit_straightens_its_own_curve(sign: int) -> None:
    x = np.linspace(-2, 3, 60)
    y = logistic(x, 80, 10, 0.4, 0.3)[::sign]
    found = correlation(x, y)
    assert found.plcc == pytest.approx(1, abs=1e-6)
    assert abs(stats.pearsonr(x, y).statistic) < 0.97
    assert found.srcc == pytest.approx(sign)


def test_correlation_of_too_little_is_none() -> None:
    assert correlation([1, 1, 1], [1, 2, 3]) == (None, None, 3)
    assert correlation([1, 2, np.nan], [1, 2, 3]).n == 2
    assert correlation([1, 2, 4, 3], [1, 2, 3, 4]).plcc is None
    with pytest.raises(ValueError, match=r"one length, got \(2,\) and \(3,\)"):
        correlation([1, 2], [1, 2, 3])


def test_bootstrap_intervals_cover_and_repeat() -> None:
    """Mean of Bernoulli draws: the interval has the width of the normal approximation, and the seed repeats it."""
    right = np.random.default_rng(0).random((1, 500)) < 0.7
    means = resampled_means(right, seed=4)
    low, high = interval(means, lambda row: float(row[0]))
    p = right.mean()
    assert (low + high) / 2 == pytest.approx(p, abs=0.005)
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(p * (1 - p) / 500), rel=0.1)
    assert np.array_equal(means, resampled_means(right, seed=4))
    assert not np.array_equal(means, resampled_means(right, seed=5))


def test_cells_share_the_resampled_images() -> None:
    """Two equal cells differ by nothing in every resample."""
    right = np.random.default_rng(0).random((1, 50)) < 0.5
    means = resampled_means(np.concatenate([right, right, ~right]), seed=0)
    assert np.abs(means[:, 0] - means[:, 1]).max() == 0
    np.testing.assert_allclose(means[:, 0] + means[:, 2], 1, atol=1e-6)


def test_cells_leave_damaged_images_out() -> None:
    found = Outcomes.empty(3, 4, codes=4)
    found.prediction_CN[:] = [[0, 1, 2, 0], [0, 1, 1, 0], [1, 1, 1, 0]]
    found.top1_CN[:] = [[1, 1, 1, 0], [1, 1, 0, 0], [0, 1, 0, 0]]
    found.values_VCN[:] = 0.5
    found.damaged_N[3] = True
    found.usage_CK[:] = [[2, 2, 0, 0], [4, 0, 0, 0], [1, 1, 1, 1]]
    names = [(CLEAN, 0), ("fog", 1), ("fog", 2)]
    cells = cells_from_outcomes(names, found)
    assert [c.images for c in cells] == [3, 3, 3]
    assert [c.top1 for c in cells] == pytest.approx([1, 2 / 3, 1 / 3])
    assert [c.consistency for c in cells] == pytest.approx([1, 2 / 3, 1 / 3])
    assert [c.perplexity for c in cells] == pytest.approx([2, 1, 4])
    assert cells[1].nll == 0.5
    found.damaged_N[:] = True
    with pytest.raises(ValueError, match="no sound image was scored for clean"):
        cells_from_outcomes(names, found)


def test_perplexity_is_two_to_the_entropy() -> None:
    usage = np.array([5, 0, 3, 2])
    assert perplexity(usage) == pytest.approx(2 ** stats.entropy(usage / 10, base=2))
    assert perplexity(np.zeros(3, np.int64)) is None


def test_severity_correlations_see_a_trend() -> None:
    names = [(CLEAN, 0), *(("fog", s) for s in range(1, 6))]
    found = Outcomes.empty(6, 30, codes=0)
    found.values_VCN[VALUES.index("confidence")] = 1 - 0.1 * np.arange(6)[:, None]
    found.values_VCN[VALUES.index("drift_before")] = 0.1 * np.arange(6)[:, None]
    by_value = severity_correlations(names, found)["fog"]
    assert by_value["confidence"].srcc == pytest.approx(-1)
    assert by_value["drift_before"].srcc == pytest.approx(1)
    assert "residual" not in by_value


def test_intervals_hold_the_value() -> None:
    rng = np.random.default_rng(1)
    from pipeline.corruptions import KINDS

    names = [(CLEAN, 0), *((k, s) for k in KINDS[1:] for s in range(1, 6))]
    top1 = rng.random((len(names), 200)) < 0.6
    found = intervals(names, top1, seed=0)
    summary = summarise(
        [Cell(k, s, float(row.mean()), 1.0, 200) for (k, s), row in zip(names, top1, strict=True)]
    )
    for name, value in (
        ("clean_top1", summary.clean_top1),
        ("known_top1", summary.known_top1),
        ("unknown_top1", summary.unknown_top1),
        ("mce", summary.mce_pct),
    ):
        low, high = found[name]
        assert value is not None
        assert low < value < high, name


def test_c_bar_does_not_cost_the_intervals() -> None:
    """Its images are others, and none of the aggregates is over it."""
    findings = Findings(Classifier("m", torch.nn.Identity(), Preprocessing.model_validate(SHOWN), ["a"], {}))
    names = [(CLEAN, 0), *((kind, s) for kind in TRAINING_KINDS for s in range(1, 6))]
    own = Outcomes.empty(len(names), 20, 0)
    own.top1_CN[:, ::2] = True
    findings.parts.append((names, [f"{i}" for i in range(20)], own))
    want = joint_intervals(findings, 0)
    assert set(want) >= {"clean_top1", "known_top1", "mce"}
    other = Outcomes.empty(1, 30, 0)
    findings.parts.append(([("perlin_noise", 1)], [f"b{i}" for i in range(30)], other))
    assert joint_intervals(findings, 0) == want


@pytest.mark.parametrize(
    ("trained_on", "words"),
    [
        (None, "training corruptions not known"),
        ((), "trained on none of the test corruptions"),
        (
            ("fog", "snow"),
            r"trained on 2 of the 15 benchmark corruptions \(snow, fog\): Known and mCE are of",
        ),
        (("fog", "spatter"), "LEAK: trained on spatter, so Unknown is not unknown"),
    ],
)
def test_the_verdict_says_what_was_seen(trained_on: tuple[str, ...] | None, words: str) -> None:
    cells = [Cell("fog", s, 0.5, 1.0, 10) for s in range(1, 6)]
    line = verdict("r50", trained_on, summarise(cells))
    assert re.search(words, line), line
    assert "Known 50.00 % (1 of 15 kinds), Unknown not evaluated, mCE not complete" in line


def test_the_verdict_of_a_benchmark_seen_in_part() -> None:
    """Known is neither of seen corruptions nor of new ones."""
    cells = [Cell(k, s, 0.5, 1.0, 10) for k in TRAINING_KINDS for s in range(1, 6)]
    summary = summarise([*cells, *(Cell("spatter", s, 0.4, 1.0, 10) for s in range(1, 6))])
    line = verdict("r50", ("fog", "snow"), summary)
    assert "Known 50.00 %, Unknown 40.00 % (1 of 4 kinds), mCE" in line
    assert "(snow, fog): Known and mCE mix 2 seen and 13 unseen kinds, Unknown of ones it has not" in line
    whole = verdict("r50", TRAINING_KINDS, summary)
    assert (
        "trained on 15 of the 15 benchmark corruptions: Known and mCE are of corruptions it has seen" in whole
    )
    without = verdict("r50", ("snow",), summarise([c for c in cells if c.corruption == "fog"]))
    assert "Known and mCE are of corruptions it has not seen" in without
