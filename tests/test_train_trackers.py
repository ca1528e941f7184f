"""What TensorBoard and W&B are told, also by a run that goes on."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from pathlib import Path

import pytest
from accelerate import Accelerator

import train
from tools.runtime import trackers
from tools.runtime.config import parse_command
from tools.runtime.metrics import read_metrics
from tools.runtime.trackers import Trackers

TINY = Path(__file__).resolve().parent / "tiny.toml"


def run(shards: Path, out: Path, *more: str) -> int:
    arguments = ["--recipe", str(TINY), "--data", str(shards), "--out", str(out), *more]
    return train.train(parse_command(train.TrainCommand, arguments))


def scalar_steps(folder: Path) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [event.step for event in events.Scalars("loss")]


def test_a_resumed_run_repeats_no_step_in_tensorboard(picture_shards: Path, tmp_path: Path) -> None:
    """As if killed between the checkpoints of steps 8 and 12, of which 9 and 12 were logged."""
    assert run(picture_shards, tmp_path, "--log-every", "3") == 0
    shutil.rmtree(tmp_path / "checkpoints" / "step_000012")
    assert run(picture_shards, tmp_path, "--log-every", "3", "--resume", "auto") == 0
    assert scalar_steps(tmp_path / "tensorboard") == [3, 6, 9, 12]


FAKE_WANDB = """
import json, os

class Run:
    def log(self, values, step=None):
        tell("log", [step, values])

    def finish(self):
        tell("finish", None)

def tell(what, value):
    with open(os.environ["WANDB_TOLD"], "a") as file:
        file.write(json.dumps([what, value]) + "\\n")

def init(**how):
    tell("init", how)
    return Run()
"""


def test_a_wandb_run_is_named_after_its_folder_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside TensorBoard, which stays in its own folder. Not W&B itself: a module that only notes its calls."""
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "__init__.py").write_text(FAKE_WANDB)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.setenv("WANDB_TOLD", str(tmp_path / "told"))
    out = tmp_path / "runs" / "r50"
    for step in (0, 6, 0):
        accelerator = Accelerator(cpu=True)
        accelerator.log_with = ["tensorboard", "wandb"]
        told_to = Trackers(accelerator, out, step)
        told_to.log({"loss": 2.0}, step + 3)
        told_to.close()
    told = [json.loads(line) for line in (tmp_path / "told").read_text().splitlines()]
    assert [what for what, _ in told] == ["init", "log", "finish"] * 3
    first, resumed, anew = (how for what, how in told if what == "init")
    assert first == {
        "project": "vqsa",
        "name": "r50",
        "resume": "allow",
        "dir": str(out),
        "id": first["id"],
    }
    assert resumed == first
    assert anew["id"] != first["id"]
    assert [step for what, values in told if what == "log" for step in values[:1]] == [3, 9, 3]
    assert scalar_steps(out / "tensorboard") == [3]
    assert sorted(os.listdir(out)) == ["tensorboard", "wandb_id"]


def test_pictures_and_codes_reach_tensorboard(picture_shards: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run(picture_shards, tmp_path, "--steps", "4", "--images-every", "2") == 0
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    tags = events.Tags()
    assert {"loss", "gradient_norm", "lr", "skipped_steps", "host_gib"} <= set(tags["scalars"])
    assert tags["histograms"] == ["code_usage"]
    assert tags["images"] == ["batch"]
    pictures = events.Images("batch")
    assert [event.step for event in pictures] == [2, 4]
    assert {(event.width, event.height) for event in pictures} == {(8 * 32, 32)}, "eight side by side"


def test_a_tracker_that_cannot_write_is_left_alone(
    picture_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from torch.utils.tensorboard import SummaryWriter

    def full(*arguments: object, **named: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    assert run(picture_shards, tmp_path, "--steps", "3") == 0
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3
    stops = [r for r in caplog.records if r.name == trackers.__name__ and r.levelno == logging.ERROR]
    assert len(stops) == 1
    assert "No space left on device; metrics.jsonl goes on" in stops[0].getMessage()
