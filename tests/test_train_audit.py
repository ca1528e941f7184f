"""What an audit says of a run; and that a full disk costs such records, not the run."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import train
from tools.runtime.audit import Audit
from tools.runtime.config import parse_command
from tools.runtime.metrics import read_metrics

TINY = Path(__file__).resolve().parent / "tiny.toml"


def run(shards: Path, out: Path, *more: str) -> int:
    arguments = ["--recipe", str(TINY), "--data", str(shards), "--out", str(out), *more]
    return train.train(parse_command(train.TrainCommand, arguments))


def test_an_audit_names_every_sample_and_its_pixels(picture_shards: Path, tmp_path: Path) -> None:
    assert run(picture_shards, tmp_path, "--steps", "2", "--audit") == 0
    lines = [json.loads(line) for line in (tmp_path / "audit_rank0.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(len(line["pixels"]) == len(line["sample_id"]) == len(line["kind"]) == 8 for line in lines)
    assert len({pixels for line in lines for pixels in line["pixels"]}) == 16
    assert np.isin([line["severity"] for line in lines], range(6)).all()


def test_a_full_disk_costs_the_rest_of_an_audit(
    picture_shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "audit_rank0.jsonl"
    file.symlink_to("/dev/full")
    assert run(picture_shards, tmp_path, "--steps", "3", "--audit") == 0
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3
    (said,) = (r.getMessage() for r in caplog.records if r.name == "tools.runtime.audit")
    assert said.startswith(f"{file}: [Errno 28] No space left on device; from step 1 on nothing is noted")
    assert "make room, and resume from a checkpoint before" in said


def test_an_audit_has_whole_lines_where_the_disk_was_full(tmp_path: Path) -> None:
    """A limit on the size of files cuts a write off as a full disk does."""
    host = torch.zeros(4, dtype=torch.int64)
    images = torch.zeros(4, 3, 2, 2)
    batch: Any = SimpleNamespace(position=host, sample_id=host, kind=host, severity=host, images=images)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    audits = [Audit(tmp_path, 0), Audit(tmp_path, 0)]
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        for step_number in range(1, 9):
            audits[0].note(step_number, batch)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    audits[0].note(9, batch)
    audits[1].note(10, batch)
    steps = [json.loads(line)["step"] for line in (tmp_path / "audit_rank0.jsonl").read_text().splitlines()]
    assert 2 <= len(steps) < 8
    assert steps == [*range(1, len(steps)), 10]


def test_a_full_disk_costs_a_profile_and_not_the_run(
    picture_shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "profile.json").symlink_to("/dev/full")
    assert run(picture_shards, tmp_path, "--steps", "5", "--profile", "1") == 0
    assert "profile of 1 steps" in capsys.readouterr().out
    assert f"{tmp_path / 'profile.json'} not written: [Errno 28]" in caplog.text
