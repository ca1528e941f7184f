"""Checkpoints: whole or not there, the right ones kept, damage noticed, everything in them."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from pydantic import BaseModel
from torch import nn

import train
from tools.runtime import checkpoint
from tools.runtime.config import differences, parse_command, validated
from tools.runtime.ema import Ema
from tools.runtime.metrics import read_metrics
from tools.runtime.resume import disagreement
from tools.runtime.state import TrainingState
from tools.runtime.writer import Writer

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tests" / "tiny.toml"


class Settings(BaseModel):
    lr: float = 0.1


FILES: checkpoint.Files = {
    checkpoint.MODEL_FILE: {"weight": torch.arange(6.0).view(2, 3)},
    checkpoint.TRAINING_FILE: {"parts": {"progress": {"step": 3}}},
}


def write(folder: Path, *steps: int) -> None:
    for step in steps:
        checkpoint.write(folder, FILES, step=step, config=Settings(), classes=["a", "b"])


def writer(folder: Path, keep: int = 2, background: bool = False) -> Writer:
    return Writer(
        Accelerator(cpu=True), folder, config=Settings(), classes=["a"], keep=keep, background=background
    )


def steps(folder: Path) -> list[int]:
    return [found.step for found in checkpoint.complete(folder)]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write(tmp_path, 3)
    (found,) = checkpoint.complete(tmp_path)
    assert (found.step, found.classes, found.config) == (3, ["a", "b"], {"lr": 0.1})
    assert torch.equal(found.model_state()["weight"], FILES[checkpoint.MODEL_FILE]["weight"])
    assert not list(tmp_path.glob("*.tmp"))


def test_a_flipped_bit_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, 3, 6)
    file = tmp_path / "step_000006" / checkpoint.MODEL_FILE
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    found = checkpoint.newest_sound(tmp_path)
    assert found is not None
    assert found.step == 3
    assert "skipping a damaged checkpoint" in caplog.text
    with pytest.raises(
        ValueError, match=r"step_000006/model\.safetensors has checksum \w+ and was written with"
    ):
        checkpoint.verify(checkpoint.read(tmp_path / "step_000006"))
    shutil.rmtree(tmp_path / "step_000003")
    assert checkpoint.newest_sound(tmp_path) is None


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    kept = writer(tmp_path, keep=2)
    for step in (2, 4, 6, 8, 10):
        assert kept.save(FILES, step, best=4 if step >= 4 else 0, last=False)
    assert steps(tmp_path) == [4, 8, 10]
    assert checkpoint.read(tmp_path / "best").step == 4
    kept.save(FILES, 12, best=12, last=True)
    assert steps(tmp_path) == [10, 12]
    assert checkpoint.read(tmp_path / "best").step == 12


def test_a_new_best_that_is_not_written_does_not_cost_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = writer(tmp_path, keep=1)
    assert kept.save(FILES, 2, best=2, last=False)

    def full(*arguments: object, **named: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    assert not kept.save(FILES, 4, best=4, last=False)
    monkeypatch.undo()
    assert kept.save(FILES, 6, best=4, last=True)
    assert steps(tmp_path) == [2, 6]
    assert checkpoint.read(tmp_path / "best").step == 2


@pytest.mark.parametrize("killed_at", ["second rename", "deletion"])
def test_one_that_takes_anothers_place_leaves_one_of_them_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: str
) -> None:
    """A kill between any two of its steps: simulated by what stands there then."""
    write(tmp_path, 3)
    rename, rmtree = Path.rename, shutil.rmtree

    def killed(path: Path, target: Path) -> Path:
        if killed_at == "second rename" and path.suffix == ".tmp":
            raise KeyboardInterrupt
        return rename(path, target)

    def kept(path: Path, **named: Any) -> None:
        if path.suffix == ".replaced" and path.exists() and killed_at == "deletion":
            raise KeyboardInterrupt
        rmtree(path, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        patch.setattr(shutil, "rmtree", kept)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, 3)
    found = checkpoint.newest_sound(tmp_path)
    assert found is not None
    assert found.step == 3
    writer(tmp_path)
    assert steps(tmp_path) == [3]
    write(tmp_path, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000003"]


def test_of_two_of_a_step_the_final_one_wins(tmp_path: Path) -> None:
    """The one moved aside is what is left if the other is damaged."""
    write(tmp_path, 3)
    aside, final = tmp_path / "step_000003.replaced", tmp_path / "step_000003"
    shutil.copytree(final, aside)
    assert [found.path for found in checkpoint.complete(tmp_path)] == [aside, final]
    sound = checkpoint.newest_sound(tmp_path)
    assert sound is not None
    assert sound.path == final
    model = final / checkpoint.MODEL_FILE
    model.write_bytes(model.read_bytes()[:-1] + b"?")
    sound = checkpoint.newest_sound(tmp_path)
    assert sound is not None
    assert sound.path == aside
    writer(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000003"]
    checkpoint.verify(checkpoint.read(final))


def test_one_moved_aside_whose_successor_never_came_is_put_back(tmp_path: Path) -> None:
    write(tmp_path, 3)
    (tmp_path / "step_000003").rename(tmp_path / "step_000003.replaced")
    writer(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000003"]
    assert steps(tmp_path) == [3]


def test_what_a_killed_run_left_unfinished_goes(tmp_path: Path) -> None:
    write(tmp_path, 3)
    (tmp_path / "step_000006.tmp").mkdir()
    assert steps(tmp_path) == [3]
    writer(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000003"]


def test_in_the_background_training_goes_on_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    original = checkpoint.write

    def slow(*arguments: Any, **named: Any) -> None:
        assert gate.wait(20)
        original(*arguments, **named)

    monkeypatch.setattr(checkpoint, "write", slow)
    behind = writer(tmp_path, background=True)
    assert behind.save(FILES, 3, best=0, last=False)
    assert steps(tmp_path) == []  # save has returned, the file is not there
    gate.set()
    assert behind.save(FILES, 6, best=0, last=True)  # waits for both
    assert steps(tmp_path) == [3, 6]
    behind.finish()


@pytest.mark.parametrize("background", [False, True])
def test_a_disk_that_fails_costs_the_checkpoint_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, background: bool
) -> None:
    kept = writer(tmp_path, background=background)
    assert kept.save(FILES, 3, best=0, last=True)

    def full(*arguments: object, **named: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    first = kept.save(FILES, 6, best=0, last=False)
    assert first == background  # in the background it is the next call that knows
    assert not kept.save(FILES, 9, best=0, last=True)
    monkeypatch.undo()
    assert kept.save(FILES, 12, best=0, last=True)
    kept.finish()
    assert steps(tmp_path) == [3, 12]
    assert "checkpoint of step 6 not written" in caplog.text
    assert "MiB free in" in caplog.text
    assert "No space left" in caplog.text


def test_settling_waits_and_says_whether_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    behind = writer(tmp_path, background=True, keep=1)
    behind.save(FILES, 3, best=0, last=False)
    assert behind.settled(3)
    assert checkpoint.read(tmp_path / "best").step == 3

    def full(*arguments: object, **named: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    assert behind.save(FILES, 6, best=3, last=False), "in the background"
    assert not behind.settled(6)
    assert checkpoint.read(tmp_path / "best").step == 3
    behind.finish()


def test_an_error_of_ours_is_not_taken_for_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("expected a tensor")

    monkeypatch.setattr(checkpoint, "save_file", broken)
    with pytest.raises(RuntimeError, match="expected a tensor"):
        writer(tmp_path).save(FILES, 3, best=0, last=False)
    assert not list(tmp_path.iterdir())


def test_a_snapshot_does_not_change_with_the_model() -> None:
    accelerator = Accelerator(cpu=True)
    net = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.randn(3, 2)).sum().backward()
    optimizer.step()
    state = TrainingState(accelerator, net, optimizer, Ema(net, 0.9), {})
    copied, shared = state.snapshot(copy=True), state.snapshot(copy=False)
    before = net.weight.detach().clone()
    optimizer.step()
    assert torch.equal(copied[checkpoint.TRAINED_FILE]["weight"], before)
    assert torch.equal(shared[checkpoint.TRAINED_FILE]["weight"], net.weight.detach())
    moments = copied[checkpoint.TRAINING_FILE]["optimizer"]["state"][0]["exp_avg"]
    assert moments.data_ptr() != optimizer.state[net.weight]["exp_avg"].data_ptr()


def test_generators_continue(tmp_path: Path) -> None:
    """Python's, numpy's and torch's: what a user's own code may draw from."""
    import random

    import numpy as np

    accelerator = Accelerator(cpu=True)
    net = nn.Linear(2, 2)
    state = TrainingState(accelerator, net, torch.optim.Adam(net.parameters()), None, {})
    checkpoint.write(tmp_path, state.snapshot(copy=False), step=1, config=Settings(), classes=["a"])

    def drawn() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    first = drawn()
    assert drawn() != first
    state.restore(tmp_path / "step_000001")
    assert drawn() == first


def test_a_model_alone_is_no_run_to_go_on_with(tmp_path: Path) -> None:
    net = nn.Linear(3, 2)
    only = {checkpoint.MODEL_FILE: net.state_dict()}
    checkpoint.write(tmp_path, only, step=1, config=Settings(), classes=["a"])
    state = TrainingState(Accelerator(cpu=True), net, torch.optim.SGD(net.parameters()), None, {})
    with pytest.raises(FileNotFoundError, match=r"has no training\.pt: it holds a model to use"):
        state.restore(tmp_path / "step_000001")


# The loop


def run(shards: Path, out: Path, *more: str) -> int:
    arguments = ["--recipe", str(TINY), "--data", str(shards), "--out", str(out), *more]
    return train.train(parse_command(train.TrainCommand, arguments))


EVERYTHING = (
    *("--optim.ema-decay", "0.9", "--optim.warmup-epochs", "0.2", "--optim.clip-norm", "5"),
    *("--optim.weight-decay", "0.01", "--optim.decay", "weights", "--loss.label-smoothing", "0.1"),
    *("--pipeline.mixup", "0.4", "--pipeline.cutmix", "1", "--pipeline.paired", "--loss.consistency", "2"),
    *("--model.ema", "0.9", "--model.beta", "0.25", "--checkpoint-async", "--log-every", "3"),
    *("--val-every", "4", "--monitor.images", "30", "--monitor.kinds", "fog", "--monitor.patience", "9"),
)


def test_with_everything_on_a_stopped_run_ends_as_an_undisturbed_one(
    picture_shards: Path, tmp_path: Path
) -> None:
    """Every kind of state there is, and a stop inside a logging interval (log_every = 3, stop after 8 of 12)."""
    everything = (*EVERYTHING, "--val", str(picture_shards))
    assert run(picture_shards, tmp_path / "calm", *everything) == 0
    assert run(picture_shards, tmp_path / "first", *everything) == 0
    for path in (tmp_path / "first" / "checkpoints").glob("step_000012"):
        shutil.rmtree(path)  # as if killed between the checkpoints of steps 8 and 12
    assert run(picture_shards, tmp_path / "first", *everything, "--resume", "auto") == 0
    ends = [checkpoint.newest(tmp_path / name).path for name in ("calm", "first")]
    for file in (checkpoint.MODEL_FILE, checkpoint.TRAINED_FILE):
        assert (ends[0] / file).read_bytes() == (ends[1] / file).read_bytes()
    varies = {"rate_img_s", "data_wait_pct", "memory_gib", "host_gib"}
    logs = [
        [
            {k: v for k, v in r.items() if k not in varies}
            for r in read_metrics(tmp_path / name / "metrics.jsonl")
        ]
        for name in ("calm", "first")
    ]
    assert [r["step"] for r in logs[0]] == [3, 4, 6, 8, 9, 12, 12]
    assert logs[0] == logs[1]
    assert "consistency" in logs[0][0]
    averaged, trained = (
        checkpoint.load_file(ends[0] / f) for f in (checkpoint.MODEL_FILE, checkpoint.TRAINED_FILE)
    )
    assert not torch.equal(averaged["head.fc.weight"], trained["head.fc.weight"])


def test_the_best_checkpoint_is_kept_and_a_run_without_progress_stops(
    picture_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A learning rate of nothing: the first validation stays the best, two more and it is over."""
    more = ("--steps", "40", "--val", str(picture_shards), "--val-every", "3", "--monitor.patience", "2")
    still = (
        "--optim.freeze-trunk",
        "--optim.lr",
        "1e-12",
        "--monitor.images",
        "20",
        "--model.init",
        "normal",
    )
    assert run(picture_shards, tmp_path, *more, *still) == 0
    output = capsys.readouterr().out
    assert "best so far" in output
    assert "done: 9 steps (early, best score" in output
    assert checkpoint.read(tmp_path / "checkpoints" / "best").step == 3
    assert run(picture_shards, tmp_path, *more, *still, "--resume", "auto") == 0
    assert "done: 9 steps (early" in capsys.readouterr().out


def test_processes_must_find_the_same_checkpoint() -> None:
    eight, twelve = (8, "aa", "r/step_000008"), (12, "bb", "r/step_000012")
    out = Path("r")
    assert disagreement([None, None], out) == ""
    assert disagreement([eight, (8, "aa", "/mnt/r/step_000008")], out) == ""
    assert disagreement([twelve, twelve, eight, None, None], out).startswith(
        "the processes found different checkpoints to go on from: ranks 0, 1: step 12 (r/step_000012, checksum bb); "
        "rank 2: step 8 (r/step_000008, checksum aa); ranks 3, 4: no checkpoint. --out (r) must be one folder"
    )
    assert "rank 1: step 8 (r/x, checksum cc)" in disagreement([eight, (8, "cc", "r/x")], out)


def test_settings_that_came_later_had_their_default() -> None:
    from tools.runtime.config import RunConfig

    saved = validated(RunConfig, {"steps": 3}, "checkpoint").model_dump(mode="json")
    now = RunConfig(steps=3, optim={"clip_norm": 1.0}).model_dump(mode="json")  # type: ignore[arg-type]
    assert differences(saved, now) == {"optim.clip_norm": "None -> 1.0"}
