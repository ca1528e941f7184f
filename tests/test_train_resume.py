"""Going on: what a start does to what stands in its folder, and what a resumed run says about the one before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import write_pictures

import train
from shards.build import BuildOptions, build
from tools.runtime import checkpoint, metrics
from tools.runtime.config import RunConfig, parse_command
from tools.runtime.metrics import MetricsFile, read_metrics

TINY = Path(__file__).resolve().parent / "tiny.toml"


def run(shards: Path, out: Path, *more: str) -> int:
    arguments = ["--recipe", str(TINY), "--data", str(shards), "--out", str(out), *more]
    return train.train(parse_command(train.TrainCommand, arguments))


def everything(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "run.lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_damaged_checkpoints_alone_are_not_overwritten(picture_shards: Path, tmp_path: Path) -> None:
    short = ("--steps", "2", "--checkpoint-every", "1")
    assert run(picture_shards, tmp_path, *short) == 0
    one, two = checkpoint.present(tmp_path / "checkpoints")
    (one / checkpoint.MODEL_FILE).unlink()
    model = two / checkpoint.MODEL_FILE
    model.write_bytes(model.read_bytes()[:-1] + b"?")
    before = everything(tmp_path)
    with pytest.raises(ValueError, match=r"none of .* is whole \(step_000001, step_000002; .* to start anew"):
        run(picture_shards, tmp_path, *short, "--resume", "auto")
    model.write_bytes(model.read_bytes()[:-2])
    with pytest.raises(ValueError, match="already holds a run; say --resume auto"):
        run(picture_shards, tmp_path, *short)
    model.write_bytes(before["checkpoints/step_000002/" + checkpoint.MODEL_FILE])
    assert everything(tmp_path) == before


def test_a_start_keeps_the_log_that_is_there(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for loss in (1.0, 2.0, 3.0):
        started = MetricsFile(path, 0)
        started.write({"step": 1, "loss": loss})
        started.close()
    logs = {file.name: read_metrics(file) for file in tmp_path.iterdir()}
    assert {name: records[0]["loss"] for name, records in logs.items()} == {
        "metrics.1.jsonl": 1.0,
        "metrics.2.jsonl": 2.0,
        "metrics.jsonl": 3.0,
    }
    MetricsFile(path, 1).close()
    assert read_metrics(path) == [{"step": 1, "loss": 3.0}]


def test_the_log_is_on_disk_before_it_takes_the_place_of_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)))
    synced: list[bool] = []
    fsync, replace = metrics.os.fsync, Path.replace

    def syncing(descriptor: int) -> None:
        fsync(descriptor)
        synced.append(len(read_metrics(tmp_path / "metrics.tmp")) == 2)

    def replacing(file: Path, target: Path) -> Path:
        assert synced == [True]
        return replace(file, target)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metrics.os, "fsync", full)
    before = everything(tmp_path)
    for step in (0, 2):
        with pytest.raises(OSError, match=r"metrics\.jsonl could not be written \(.*No space.*make room"):
            MetricsFile(path, step)
        assert everything(tmp_path) == before
    monkeypatch.setattr(metrics.os, "fsync", syncing)
    monkeypatch.setattr(Path, "replace", replacing)
    MetricsFile(path, 2).close()
    assert len(read_metrics(path)) == 2


def test_other_code_and_another_number_of_processes_are_said(
    picture_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ("--steps", "2", "--checkpoint-every", "1")
    assert run(picture_shards, tmp_path, *short) == 0
    assert run(picture_shards, tmp_path, *short, "--resume", "auto") == 0
    assert "changed" not in capsys.readouterr().out
    record_file = tmp_path / "checkpoints" / "step_000002" / checkpoint.RUN_FILE
    record = json.loads(record_file.read_text())
    code = record["commit"]
    assert (code, record["processes"]) == (checkpoint.code_version(), 1)
    record_file.write_text(json.dumps({**record, "commit": "0123456789ab", "processes": 4}))
    assert run(picture_shards, tmp_path, *short, "--resume", "auto") == 0
    said = capsys.readouterr().out
    assert f"changed: code: 0123456789ab -> {code}" in said
    assert "changed: processes: 4 -> 1" in said
    (written,) = (r for r in read_metrics(tmp_path / "metrics.jsonl") if "changed" in r)
    assert written == {"step": 2, "changed": {"code": f"0123456789ab -> {code}", "processes": "4 -> 1"}}
    del record["processes"]  # as old checkpoints have it
    record_file.write_text(json.dumps(record))
    assert run(picture_shards, tmp_path, *short, "--resume", "auto") == 0
    assert "changed" not in capsys.readouterr().out


def test_a_validation_set_of_other_classes_is_refused(picture_shards: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path / "source", 4, classes=2)
    build(BuildOptions(source=tmp_path / "source", out=tmp_path / "set", name="other", workers=1))
    with pytest.raises(
        ValueError, match=r"set and .*set have different class lists; build both from the same"
    ):
        run(picture_shards, tmp_path / "run", "--val", str(tmp_path / "set"))


def test_a_checkpoint_whose_state_this_code_does_not_know(picture_shards: Path, tmp_path: Path) -> None:
    assert run(picture_shards, tmp_path / "run", "--steps", "1") == 0
    found = checkpoint.newest(tmp_path / "run")
    files = {path.name: torch.load(path, weights_only=True) for path in found.path.glob("*.pt")}
    files[checkpoint.MODEL_FILE] = found.model_state()
    del files[checkpoint.TRAINING_FILE]["parts"]["meter"]["ranks"]
    config = RunConfig.model_validate(found.config)
    checkpoint.write(tmp_path / "old" / "checkpoints", files, step=1, config=config, classes=found.classes)
    with pytest.raises(
        ValueError, match=r"step_000001 has no 'ranks' in its state of the meter: other code wrote"
    ):
        run(picture_shards, tmp_path / "old", "--steps", "1", "--resume", "auto")
