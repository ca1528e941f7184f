"""The profiler as users start it: one process with trials and sweeps, two processes, a training run with --profile."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import TWO_PROCESSES, finish, start

from tools.profiling import table

TINY = Path(__file__).resolve().parent / "tiny.toml"
QUICK = ["--rounds", "1", "--seconds", "0.01"]


def command(data: Path, out: Path, *more: str) -> list[str]:
    return [
        "tools/profile_throughput.py",
        "--recipe",
        str(TINY),
        "--data",
        str(data),
        "--out",
        str(out),
        *QUICK,
        *more,
    ]


@pytest.mark.slow
def test_one_process(picture_shards: Path, tmp_path: Path) -> None:
    said = finish(start(*command(picture_shards, tmp_path, "--try", "--trace", "--sweep", "threads")))
    found = table.read(tmp_path / "profile.json")
    assert "Limiting stage: " in said
    assert found.machine.ranks == 1
    # Every stage of the list has a time or says why not.
    missing = {stage.name: stage.note for stage in found.stages if stage.wall_s is None}
    assert missing == {
        "copy to GPU": "no GPU: nothing is copied",
        "all-reduce": "one process: nothing to average",
    }
    names = {stage.name for stage in found.stages}
    assert {"plan", "read", "read, cold", "read, warm", "decode", "resize + flip", "corrupt", "normalise", "forward",
            "codebook search", "backward", "optimiser", "checkpoint", "corrupt: gaussian_noise"} <= names  # fmt: skip
    assert {"loader alone", "model alone", "both"} == found.rates_img_s.keys()
    assert "--precision bf16" in {trial.change for trial in found.trials}
    (sweep,) = found.sweeps
    assert sweep.knee in [point.value for point in sweep.points]
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert {"forward", "backward", "optimiser"} <= {event.get("name") for event in trace["traceEvents"]}
    assert (tmp_path / "profile.html").read_text().startswith("<!doctype html>")
    # Nothing is left of the checkpoints that were written to be timed.
    assert {path.name for path in tmp_path.iterdir()} == {"profile.json", "profile.html", "trace.json"}
    same = str(tmp_path / "profile.json")
    assert "Beyond the spread (0 of " in finish(start("tools/profile_throughput.py", "--compare", same, same))


@pytest.mark.slow
def test_two_processes(picture_shards: Path, tmp_path: Path) -> None:
    finish(start(*TWO_PROCESSES, *command(picture_shards, tmp_path)))
    found = table.read(tmp_path / "profile.json")
    assert found.machine.ranks == 2
    named = {stage.name: stage for stage in found.stages}
    assert named["all-reduce"].counts
    assert named["all-reduce, alone"].wall_s is not None
    assert found.batch_per_rank == 4  # half the recipe's


@pytest.mark.slow
def test_a_training_run_with_a_profile(picture_shards: Path, tmp_path: Path) -> None:
    run = [
        "train.py",
        "--recipe",
        str(TINY),
        "--data",
        str(picture_shards),
        "--out",
        str(tmp_path),
        "--profile",
        "4",
    ]
    said = finish(start(*run))
    found = json.loads((tmp_path / "profile.json").read_text())
    assert found["steps"] == 4
    assert set(found["share_pct"]) == {"data wait", "forward", "backward", "optimiser", "rest"}
    assert "profile of 4 steps: " in said
    assert "done: 12 steps" in said
