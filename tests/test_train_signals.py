"""Signals from a launcher, a scheduler or a person: what reaches a run, and the code that it ends with."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from conftest import start, wait_for_step

from tools.runtime import checkpoint

TINY = "tests/tiny.toml"


@pytest.mark.slow
def test_torchrun_passes_the_signals_on_that_it_is_told_to(picture_shards: Path, tmp_path: Path) -> None:
    """SIGUSR1, Slurm's warning, as docs/training.md says: without the option it would end the launcher alone."""
    launcher = start(
        *("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29813"),
        *("--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1"),
        *("train.py", "--recipe", TINY, "--data", str(picture_shards), "--out", str(tmp_path)),
        *("--steps", "4000", "--checkpoint-every", "4000"),
    )
    wait_for_step(tmp_path, 2, launcher)
    launcher.send_signal(signal.SIGUSR1)
    output, _ = launcher.communicate(timeout=60)
    assert "stopped after step" in output
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["exit_code"] == 75
    assert [c.step for c in checkpoint.complete(tmp_path / "checkpoints")] == [status["step"]]
