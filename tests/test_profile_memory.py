"""Trials and sweeps on a machine that runs out of memory: said, agreed on by all processes, and nothing lost."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import TWO_PROCESSES, finish, start
from test_profile_compare import made, spread

from tools import profile_throughput
from tools.profiling import clock, measure, memory, page, sweep, table, trials, words
from tools.profiling.session import Session
from tools.profiling.table import Trial
from tools.profiling.workload import Workload
from tools.runtime.config import RunConfig, read_recipe, validated

TINY = Path(__file__).resolve().parent / "tiny.toml"  # 8 images a batch


@pytest.fixture
def session(picture_shards: Path) -> Iterator[Session]:
    config = validated(RunConfig, {**read_recipe(TINY), "data": picture_shards}, "test")
    made = Session(config, Accelerator(cpu=True), rounds=1, seconds=0.001, progress=lambda name: None)
    yield made
    made.close()


@pytest.fixture
def two_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    def only(config: RunConfig, *_: int) -> Iterator[tuple[str, RunConfig]]:
        yield "16 images", trials.changed(config, batch_per_gpu=16, batch_global=16)
        yield "4 images", trials.changed(config, batch_per_gpu=4, batch_global=4)

    monkeypatch.setattr(trials, "candidates", only)


def room_for(images: int) -> Callable[[Workload, Any], int]:
    """Return a training step that runs out of memory with more images than this."""
    plain = Workload.train_step

    def step(self: Workload, loader: Any) -> int:
        if getattr(loader, "batch_per_rank", 0) > images:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return plain(self, loader)

    return step


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("Critical error in pipeline: CUDA allocation failed"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_which_errors_say_that_memory_ran_out(error: Exception, expected: bool) -> None:
    assert memory.ran_out(error) is expected


def test_other_errors_of_a_step_are_not_hidden() -> None:
    def step() -> None:
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        memory.fits(step, agree=int)


def test_one_trial_that_does_not_fit_stops_no_other(
    session: Session, two_candidates: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Workload, "train_step", room_for(11))
    found = {trial.change: trial for trial in trials.run(session)}
    large = found.pop("16 images")
    assert large.rate_img_s is None
    assert large.note == "does not fit in memory; the largest batch that does is 11"
    assert "4 images" in found
    assert all(trial.rate_img_s is not None for trial in found.values())
    said = made().model_copy(update={"trials": [large]})
    assert "the largest batch that does is 11" in words.everything(said)
    assert "the largest batch that does is 11" in page.page(said)


def mixing(data: Path, **pipeline: object) -> RunConfig:
    recipe = read_recipe(TINY)
    recipe["pipeline"] = {**recipe["pipeline"], "mixup": 0.2, **pipeline}
    return validated(RunConfig, {**recipe, "data": data}, "test")


def test_where_neighbours_are_mixed_only_even_batches_are_tried_and_named(
    picture_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, tried = mixing(picture_shards, batch_global=12), []
    session = Session(config, Accelerator(cpu=True), rounds=1, seconds=0.001, progress=lambda name: None)
    plain = session.work.lone_step

    def step(loader: Any) -> int:
        images = len(next(loader).images)
        tried.append(images)
        if images > 11:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(loader)

    monkeypatch.setattr(session.work, "lone_step", step)
    try:
        with pytest.raises(
            ValueError, match=r"largest that does is 10. Say --pipeline.batch-per-gpu 6: 2 of"
        ):
            session._check_gpu()
    finally:
        session.close()
    assert tried == [12, 6, 8, 10]


def test_not_even_two_mixed_images_fit(picture_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = mixing(picture_shards, batch_global=4)
    session = Session(config, Accelerator(cpu=True), rounds=1, seconds=0.001, progress=lambda name: None)
    monkeypatch.setattr(Workload, "train_step", room_for(1))
    try:
        found = session.loader_that_fits(trials.changed(config, batch_per_gpu=2, batch_global=2))
    finally:
        session.close()
    assert found == (None, "does not fit in memory; the largest batch that does is 0")


def test_refusals_where_neighbours_are_mixed(picture_shards: Path) -> None:
    def said(largest: int, batch_global: int) -> str:
        config = mixing(picture_shards, batch_global=batch_global)
        return str(memory.refuse(config, 1, batch_global, largest, "short"))

    assert "the largest that does is 4. Say --pipeline.batch-per-gpu 2: 9 of them" in said(5, 18)
    assert "not even two images do (mixup and cutmix need an even number)" in said(1, 18)
    assert "15 images per process of the global batch of 15 are odd" in said(9, 15)


def test_on_a_cpu_the_need_is_estimated_first(
    session: Session, two_candidates: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A batch of 16 is asked for only once it is known to fit.
    monkeypatch.setattr("tools.profiling.session.available_bytes", lambda: 1013)
    monkeypatch.setattr(memory, "estimate", lambda config, classes: memory.Need(fixed=13, per_image=100))
    found = {trial.change: trial for trial in trials.run(session)}
    assert found["16 images"].note == "does not fit in memory; the largest batch that does is 10"
    assert found["4 images"].rate_img_s is not None


def test_memory_that_runs_out_in_the_middle(
    session: Session, two_candidates: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "loader_that_fits", lambda config: (session.work.make_loader(config), ""))
    monkeypatch.setattr(Workload, "train_step", room_for(8))
    found = {trial.change: trial for trial in trials.run(session)}
    assert found["16 images"].note == "ran out of memory in training"
    assert sum(trial.rate_img_s is None for trial in found.values()) == 1


def test_a_sweep_says_what_does_not_fit(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Workload, "train_step", room_for(20))
    grown = list(sweep.over_batches(session))
    assert [len(found.points) for found in grown] == [
        1,
        2,
        3,
        4,
        5,
    ]  # each is there as soon as it is measured
    notes = {point.value: point.note for point in grown[-1].points if point.rate_img_s is None}
    assert notes == {32: "does not fit in memory; the largest batch that does is 20"}


def test_what_was_measured_is_on_the_disk_before_memory_runs_out(
    picture_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(session: Session) -> Iterator[Trial]:
        yield Trial(change="--pipeline.threads 4", rate_img_s=spread(5), baseline_img_s=spread(4))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trials, "run", run)
    monkeypatch.setattr(measure, "run", lambda session: made().model_copy(update={"trials": []}))
    arguments = ["--recipe", str(TINY), "--data", str(picture_shards), "--out", str(tmp_path), "--try"]
    monkeypatch.setattr("sys.argv", ["profile_throughput.py", *arguments, "--device", "cpu"])
    with pytest.raises(SystemExit, match=f"memory ran out.*measured before is in {tmp_path}.*batch-per-gpu"):
        profile_throughput.main()
    assert [trial.change for trial in table.read(tmp_path / "profile.json").trials] == [
        "--pipeline.threads 4"
    ]


def test_nothing_waits_for_the_device_between_the_steps_of_a_measurement(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    take = session.watch.take

    def taken() -> Any:
        order.append("wait")
        return take()

    def step() -> int:
        order.append("step")
        return session.work.train_step(session.work.synthetic)

    monkeypatch.setattr(session.watch, "take", taken)
    probe = session.model_probe("model alone", step)
    clock.measure([probe], rounds=2, seconds=0.001, agree=lambda steps: 3)
    measured = ["wait", "step", "step", "step", "wait"]
    assert order == ["step", "step", "wait", "step", "wait", *measured, *measured]
    assert [len(steps) for steps in session.steps["model alone"]] == [1, 3, 3]


ONE_RANK_RUNS_OUT = """
import json, os, sys
from pathlib import Path
import torch
from tools.profiling import trials
from tools.profiling.session import Session
from tools.profiling.workload import Workload
from tools.runtime.config import RunConfig, read_recipe, validated
from tools.runtime.launch import make_accelerator

recipe, data, out = (Path(argument) for argument in sys.argv[1:])
settings = read_recipe(recipe)
settings["model"] = {**settings["model"], "ema": 0.9}  # an update that the ranks exchange
config = validated(RunConfig, {**settings, "data": data}, "test")
accelerator = make_accelerator(config)
session = Session(config, accelerator, rounds=1, seconds=0.001, progress=lambda name: None)
plain = Workload._train_step

def step(self, net, loader):
    if accelerator.process_index == 1 and getattr(loader, "batch_per_rank", 0) > 6:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return plain(self, net, loader)

Workload._train_step = step
found = [trial.model_dump(mode="json") for trial in trials.run(session)]
session.close()
(out / f"{accelerator.process_index}.json").write_text(json.dumps(found))
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_no_process_waits_for_one_that_ran_out_of_memory(picture_shards: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(ONE_RANK_RUNS_OUT)
    finish(start(*TWO_PROCESSES, str(script), str(TINY), str(picture_shards), str(tmp_path)))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert [trial["change"] for trial in first] == [trial["change"] for trial in second]
    for found in (first, second):
        notes = {trial["change"]: trial["note"] for trial in found if trial["rate_img_s"] is None}
        assert notes == {
            "--pipeline.batch-per-gpu 8 --pipeline.batch-global 16": "does not fit in memory; the largest batch "
            "that does is 6"
        }
