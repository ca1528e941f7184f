"""Twenty steps, held to the losses they had when they were last meant to change; and the fast variants beside them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from golden.make_train_20_steps import GOLDEN, losses


def distance(found: list[float]) -> float:
    """Largest relative difference to the golden losses."""
    golden = json.loads(GOLDEN.read_text())["loss"]
    assert len(found) == len(golden) == 20
    return max(abs(a - b) / b for a, b in zip(found, golden, strict=True))


def test_twenty_steps_have_the_losses_they_had(picture_shards: Path, tmp_path: Path) -> None:
    """Bit-equal on the machine that made them; other processors and library versions round differently."""
    assert distance(losses(picture_shards, tmp_path)) < 2e-3


def test_the_golden_losses_notice_a_change(picture_shards: Path, tmp_path: Path) -> None:
    """A tenth less smoothing is seen."""
    assert distance(losses(picture_shards, tmp_path, "--loss.label-smoothing", "0.09")) > 2e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "bound"),
    [
        (("--precision", "bf16"), 0.1),  # eight bits of mantissa, and some features get another code
        (("--optim.fused", "True"), 1e-2),
        (("--compile",), 2e-2),
    ],
    ids=["bf16", "fused", "compile"],
)
def test_fast_variants_stay_near(
    picture_shards: Path, tmp_path: Path, more: tuple[str, ...], bound: float
) -> None:
    assert distance(losses(picture_shards, tmp_path, *more)) < bound
