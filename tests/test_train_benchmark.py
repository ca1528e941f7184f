"""The benchmark of training sees what it is for: a loader that does not keep up."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

import shards
from benchmarks.training import BOTH, LOADER, MODEL, PLAIN, TrainingBenchmark, run, table

TINY = Path(__file__).resolve().parent / "tiny.toml"


def test_a_loader_that_does_not_keep_up_is_seen(
    picture_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0.4 s for each batch of 4, read by one thread: 10 images/s at most, also with the model, which is faster."""
    fetch = shards.Store.fetch

    def slowly(store: shards.Store, *arguments: Any, **named: Any) -> Any:
        time.sleep(0.4)
        return fetch(store, *arguments, **named)

    recipe = tmp_path / "recipe.toml"
    recipe.write_text(TINY.read_text().replace("[pipeline]", "[pipeline]\nread_ahead = 1\nprefetch = 1"))
    command = TrainingBenchmark(data=picture_shards, recipe=recipe, batch=4, steps=2, repeats=1, threads=1)
    fast = run(command)
    assert set(fast["img_per_s"]) == {LOADER, MODEL, BOTH, PLAIN}
    assert "resnet10, 16 codes, fp32, 32 px, 3 corruptions, batch 4, 1 threads" in table(fast)
    assert fast["peak_memory_gib"] > 0.1
    monkeypatch.setattr(shards.Store, "fetch", slowly)
    slow = run(command.model_copy(update={"baseline": False}))
    for name in (LOADER, BOTH):
        assert slow["img_per_s"][name]["p80"] < 10.1 < fast["img_per_s"][name]["p20"]
    assert slow["img_per_s"][MODEL]["p50"] > 10.1
    assert slow["data_wait_pct"]["p50"] > 20 + fast["data_wait_pct"]["p50"]
    assert slow["both_pct_of_model_alone"]["p50"] < 90
