"""How a run stops: signals, memory, crashes, also in the middle of a validation; and that it goes on exactly."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import environment

import train
from pipeline.loader import EvaluationLoader
from tools.runtime import checkpoint, heartbeat, scoring
from tools.runtime.config import parse_command
from tools.runtime.interrupt import Stop, StopRequest
from tools.runtime.meter import Meter
from tools.runtime.metrics import MetricsFile, read_metrics

TINY = Path(__file__).resolve().parent / "tiny.toml"


def run(shards: Path, out: Path, *more: str) -> int:
    arguments = ["--recipe", str(TINY), "--data", str(shards), "--out", str(out), *more]
    return train.train(parse_command(train.TrainCommand, arguments))


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)]
)
def test_signals_save_and_exit_with_their_code(
    picture_shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    code: int,
) -> None:
    before = signal.getsignal(number)
    original = StopRequest.agreed
    calls = []

    def agreed(self: StopRequest) -> Stop:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        return original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopRequest, "agreed", agreed)
        assert run(picture_shards, tmp_path, "--steps", "20") == code
    assert "stopped after step 2 of 20; go on with --resume auto" in capsys.readouterr().out
    assert [c.step for c in checkpoint.complete(tmp_path / "checkpoints")] == [2]
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["exit_code"], status["step"], status["total"]) == (code, 2, 20)
    assert signal.getsignal(number) == before


VALIDATED = ("--val-every", "3", "--monitor.images", "40", "--optim.ema-decay", "0.9")


def signal_in_validation(patch: pytest.MonkeyPatch, batch_number: int = 1) -> list[int]:
    """SIGTERM comes in a batch of the first validation; returns the batches scored."""
    batches, scored = EvaluationLoader.__iter__, []

    def signalled(loader: EvaluationLoader) -> Any:
        for number, batch in enumerate(batches(loader)):
            scored.append(number)
            if number == batch_number:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    patch.setattr(EvaluationLoader, "__iter__", signalled)
    return scored


def test_a_signal_in_a_validation_is_answered_between_its_batches(
    picture_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At a step without a checkpoint: one is made then; and the run goes on with this validation, exactly."""
    settings = ("--val", str(picture_shards), *VALIDATED)
    assert run(picture_shards, tmp_path / "calm", *settings) == 0
    out = tmp_path / "stopped"
    with pytest.MonkeyPatch.context() as patch:
        scored = signal_in_validation(patch)
        assert run(picture_shards, out, *settings) == 75
    assert scored == [0, 1], "of five"
    assert "stopped after step 3 of 12; go on with --resume auto" in capsys.readouterr().out
    assert [c.step for c in checkpoint.complete(out / "checkpoints")] == [3]
    assert [r["step"] for r in read_metrics(out / "metrics.jsonl")] == [1, 2, 3]
    assert run(picture_shards, out, *settings, "--resume", "auto") == 0
    assert_same_runs(tmp_path / "calm", out)


def test_a_signal_in_the_last_batch_costs_no_scores(picture_shards: Path, tmp_path: Path) -> None:
    """They are reported, and the run stops after the next step."""
    with pytest.MonkeyPatch.context() as patch:
        scored = signal_in_validation(patch, batch_number=4)
        assert run(picture_shards, tmp_path, "--val", str(picture_shards), *VALIDATED) == 75
    assert scored == [0, 1, 2, 3, 4]
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [(r["step"], "val_score_pct" in r) for r in records] == [
        (1, False), (2, False), (3, False), (3, True), (4, False)
    ]  # fmt: skip
    assert checkpoint.newest(tmp_path).step == 4


def test_a_validation_before_the_loop_is_no_training_time(
    picture_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is left out of the rate as the others are."""
    settings = ("--val", str(picture_shards), *VALIDATED, "--steps", "4")
    with monkeypatch.context() as patch:
        signal_in_validation(patch)
        assert run(picture_shards, tmp_path, *settings) == 75
    validate, train_step, exclude = train.validate, train.train_step, Meter.exclude
    done: list[Any] = []

    def validating(*arguments: Any, **named: Any) -> Any:
        time.sleep(0.2)
        return validate(*arguments, **named)

    def training(*arguments: Any, **named: Any) -> None:
        done.append("step")
        train_step(*arguments, **named)

    def excluding(meter: Meter, seconds: float) -> None:
        done.append(seconds)
        exclude(meter, seconds)

    monkeypatch.setattr(train, "validate", validating)
    monkeypatch.setattr(train, "train_step", training)
    monkeypatch.setattr(Meter, "exclude", excluding)
    assert run(picture_shards, tmp_path, *settings, "--resume", "auto") == 0
    before, step, _ = done
    assert before > 0.2
    assert step == "step"


@pytest.mark.parametrize("interrupted", ["in", "after"])
def test_a_due_checkpoint_is_there_before_its_validation(
    picture_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: str
) -> None:
    """What a crash in a validation, or just after one, leaves: the step's checkpoint; its validation is made again."""
    settings = ("--val", str(picture_shards), "--val-every", "4", "--monitor.images", "40")
    assert run(picture_shards, tmp_path / "calm", *settings) == 0
    out = tmp_path / "crashed"
    validate, calls, write = train.validate, [], MetricsFile.write

    def crashing(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 2 and interrupted == "in":
            raise KeyboardInterrupt
        return validate(*arguments, **named)

    def written(file: MetricsFile, record: Any) -> None:
        write(file, record)
        if record["step"] == 8 and "val_score_pct" in record and interrupted == "after":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "validate", crashing)
        patch.setattr(MetricsFile, "write", written)
        with pytest.raises(KeyboardInterrupt):
            run(picture_shards, out, *settings)
    assert len(read_metrics(out / "metrics.jsonl")) == 8 + 1 + (interrupted == "after")
    assert [c.step for c in checkpoint.complete(out / "checkpoints")] == [4, 8]
    assert run(picture_shards, out, *settings, "--resume", "auto") == 0
    assert_same_runs(tmp_path / "calm", out)


def assert_same_runs(one: Path, other: Path) -> None:
    ends = [checkpoint.newest(out).path for out in (one, other)]
    for file in ends[0].glob("*.safetensors"):
        assert file.read_bytes() == (ends[1] / file.name).read_bytes()
    parts = [torch.load(end / checkpoint.TRAINING_FILE, weights_only=True)["parts"] for end in ends]
    assert parts[0]["best"] == parts[1]["best"]
    assert parts[0]["progress"] == parts[1]["progress"] == {"step": 12, "skipped": 0, "unvalidated": False}
    assert (one / "checkpoints" / "best").resolve().name == (other / "checkpoints" / "best").resolve().name
    varies = {"rate_img_s", "data_wait_pct", "memory_gib", "host_gib"}
    logs = [[{k: v for k, v in r.items() if k not in varies} for r in read_metrics(out / "metrics.jsonl")]
            for out in (one, other)]  # fmt: skip
    assert logs[0] == logs[1]


def test_an_earlier_end_is_not_taken_for_this_ones(
    picture_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = tmp_path / "status.json"
    assert run(picture_shards, tmp_path, "--host-limit-gib", "0.01", "--log-every", "3") == 75
    assert json.loads(status.read_text())["exit_code"] == 75
    with pytest.raises(ValueError, match="already holds a run"):
        run(picture_shards, tmp_path)
    assert status.is_file(), "a command that is refused changes nothing"

    assert run(picture_shards, tmp_path, "--resume", "auto", "--dry-run") == 0
    assert status.is_file(), "nor does one that only looks"

    def crashing(*arguments: Any, **named: Any) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(train, "TrainingLoader", crashing)  # long before the first step
    with pytest.raises(RuntimeError, match="planted"):
        run(picture_shards, tmp_path, "--resume", "auto")
    assert not status.exists()


def test_a_process_that_cannot_close_says_its_error_and_ends() -> None:
    """Alone, too: what it closes waits for ever."""
    code = (
        "import time\n"
        "from contextlib import ExitStack\n"
        "from tools.runtime import heartbeat\n"
        "heartbeat._CLEAN_UP_S = 0\n"
        "with ExitStack() as opened, heartbeat.Heartbeat(lost_after_s=0.5):\n"
        "    opened.callback(time.sleep, 600)\n"
        "    raise ValueError('planted')\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=TINY.parent.parent,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ended.returncode == 1
    assert "ValueError: planted" in ended.stderr
    assert re.search(r"rank 0 \(process \d+ on .*\) could not close what it had open", ended.stderr)


def test_a_process_that_has_closed_all_is_not_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(heartbeat, "_CLEAN_UP_S", 0)
    monkeypatch.setattr(os, "_exit", ended.append)
    alone = heartbeat.Heartbeat(lost_after_s=0.2)
    with suppress(ValueError), ExitStack() as opened, alone:
        opened.callback(alone.all_closed)
        raise ValueError
    time.sleep(0.6)
    assert not ended


def test_after_an_error_in_a_validation_its_loader_is_closed_when_others_know(
    picture_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    leave, close = heartbeat.Heartbeat.__exit__, EvaluationLoader.close

    def failing(*arguments: Any, **named: Any) -> None:
        raise OSError(5, "Input/output error")

    def leaving(self: heartbeat.Heartbeat, *error: Any) -> None:
        leave(self, *error)
        done.append("told")

    def closing(loader: EvaluationLoader) -> None:
        close(loader)
        done.append("closed")

    monkeypatch.setattr(scoring, "score", failing)
    monkeypatch.setattr(heartbeat.Heartbeat, "__exit__", leaving)
    monkeypatch.setattr(EvaluationLoader, "close", closing)
    with pytest.raises(OSError, match="Input/output error"):
        run(picture_shards, tmp_path, "--val", str(picture_shards), *VALIDATED)
    assert done == ["told", "closed"]


def test_too_much_memory_saves_and_stops(
    picture_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(picture_shards, tmp_path, "--host-limit-gib", "0.01", "--log-every", "3") == 75
    assert "stopped after step 3 of 12: a process holds more than 0.01 GiB" in capsys.readouterr().out
    assert [c.step for c in checkpoint.complete(tmp_path / "checkpoints")] == [3]


def test_the_most_serious_reason_counts() -> None:
    stop = StopRequest()
    for reason in (Stop.PREEMPTED, Stop.NOT_FINITE, Stop.INTERRUPTED):
        stop.request(reason)
    assert stop.agreed() is Stop.NOT_FINITE
    assert Stop.NOT_FINITE.exit_code == 1
