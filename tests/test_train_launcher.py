"""What a launcher says to Accelerate and this project says itself; a launcher that ends first; two runs in a folder."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from accelerate import DistributedType
from accelerate.state import AcceleratorState, GradientState
from conftest import start, wait_for_step

import tools.evaluate
import tools.profile_throughput
import train
from tools.runtime import checkpoint, launch, launcher
from tools.runtime.config import RunConfig, parse_command
from tools.runtime.lock import locked


@pytest.fixture(autouse=True)
def _no_accelerator() -> Any:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("ACCELERATE_DYNAMO_BACKEND", "EAGER", "dynamo_backend = EAGER .* other names .* --compile here"),
        (
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
            "4",
            r"gradient_accumulation_steps = 4 .* say 1 there: .* pipeline\.batch_global",
        ),
        ("ACCELERATE_USE_FSDP", "true", "^FSDP from `accelerate launch` .* train here with DDP"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "^DeepSpeed from .* train here with DDP"),
        ("ACCELERATE_USE_MEGATRON_LM", "True", "^Megatron-LM from .* train here with DDP"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "^a parallelism configuration from .* use torchrun"),
    ],
)
def test_what_would_change_the_training_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words):
        launch.make_accelerator(RunConfig())


def test_what_accelerate_config_writes_by_default_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("DYNAMO_BACKEND", "NO"), ("MIXED_PRECISION", "no"), ("USE_FSDP", "false")):
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    assert launch.make_accelerator(RunConfig()).gradient_accumulation_steps == 1


def test_several_processes_that_are_not_ddp_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made = SimpleNamespace(distributed_type=DistributedType.XLA)
    monkeypatch.setattr(launch, "Accelerator", lambda **named: made)
    with pytest.raises(ValueError, match=r"^XLA from .* train here with DDP"):
        launch.make_accelerator(RunConfig())


def test_the_precision_is_the_runs_own(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with caplog.at_level(logging.WARNING):
        assert launch.make_accelerator(RunConfig()).mixed_precision == "no"
    assert "mixed_precision = bf16 from `accelerate launch`" in caplog.text
    assert "this run's is fp32 (--precision)" in caplog.text


def test_fp16_on_a_cpu_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"precision fp16 needs a GPU: on cpu nothing scales the losses.* bf16"
    ):
        launch.make_accelerator(RunConfig(precision="fp16"))


# A launcher that ends first


@pytest.mark.parametrize(
    ("word", "variable", "is_one"),
    [
        ("/usr/bin/accelerate", "ACCELERATE_MIXED_PRECISION", True),
        ("accelerate.commands.launch", "ACCELERATE_MIXED_PRECISION", True),
        ("/usr/bin/torchrun", "TORCHELASTIC_RUN_ID", True),
        ("torch.distributed.run", "TORCHELASTIC_RUN_ID", True),
        ("nohup", "ACCELERATE_MIXED_PRECISION", False),
        ("accelerate", "OTHER", False),
    ],
)
def test_launchers_are_known_by_command_and_environment(
    monkeypatch: pytest.MonkeyPatch, word: str, variable: str, is_one: bool
) -> None:
    """A shell that has a launcher's variables is none: a run is not to end with a shell that its user leaves."""
    for name in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "no")
    shell = ["sh", "-c", "echo here; read line", word]
    parent = subprocess.Popen(shell, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert parent.stdout is not None
        parent.stdout.readline()  # its words are in /proc by now
        assert launcher._is_launcher(parent.pid) == is_one
    finally:
        parent.communicate()


# Two runs in one folder


def test_a_folder_is_one_runs_at_a_time(tmp_path: Path) -> None:
    out = tmp_path / "runs" / "x"
    holder = rf"process {os.getpid()} on {re.escape(socket.gethostname())} since 20\d\d-.* UTC"
    with (
        locked(out),
        pytest.raises(ValueError, match=f"{out} is in use by {holder}: two runs would mix"),
        locked(out),
    ):
        pass
    with locked(out):
        child = subprocess.Popen(["sleep", "60"], close_fds=False)
    try:
        with locked(out):  # what this process started does not hold it
            pass
    finally:
        child.kill()
        child.wait()


def test_a_file_system_without_locks_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(*arguments: object) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with locked(tmp_path):
        assert (
            f"{tmp_path} cannot be locked (Operation not supported): see to it that no other" in caplog.text
        )


def of_another_user(monkeypatch: pytest.MonkeyPatch, allowed: set[int]) -> None:
    """Let run.lock be opened for nothing else, as permissions would; root may do everything."""
    opened = os.open

    def refusing(path: Path, flags: int, *mode: int) -> int:
        if flags & os.O_ACCMODE not in allowed:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, flags, *mode)

    monkeypatch.setattr(os, "open", refusing)


def test_a_folder_of_another_user_is_held_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "run.lock"
    with locked(tmp_path), monkeypatch.context() as other:
        of_another_user(other, {os.O_RDONLY})
        with pytest.raises(ValueError, match=f"is in use by process {os.getpid()} on "), locked(tmp_path):
            pass
    signed = path.read_text()
    with monkeypatch.context() as other:
        of_another_user(other, {os.O_RDONLY})
        with locked(tmp_path):
            assert f"{path} is another user's: it holds, but does not name this run" in caplog.text
            other.undo()
            with pytest.raises(ValueError, match="two runs would mix"), locked(tmp_path):
                pass
    assert path.read_text() == signed


def test_a_lock_that_may_not_be_taken_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even read; read, but on NFS; and a folder that may not be written, whose lock is not there yet."""
    advice = r"run\.lock cannot be locked \({}\): it is another user's; have its owner do chmod a\+rw on it, or del"
    of_another_user(monkeypatch, set())
    with pytest.raises(PermissionError, match=r"Permission denied: .*run\.lock"), locked(tmp_path):
        pass
    (tmp_path / "run.lock").write_text("")
    with pytest.raises(ValueError, match=advice.format("Permission denied")), locked(tmp_path):
        pass
    monkeypatch.undo()
    of_another_user(monkeypatch, {os.O_RDONLY})

    def for_writers(*arguments: object) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", for_writers)
    with pytest.raises(ValueError, match=advice.format("Bad file descriptor")), locked(tmp_path):
        pass


@pytest.mark.slow
def test_a_launchers_end_ends_its_one_process_with_a_checkpoint(picture_shards: Path, tmp_path: Path) -> None:
    """`accelerate launch` of one process passes no signal on. Meanwhile another run in the folder is refused."""
    settings = ("--recipe", "tests/tiny.toml", "--data", str(picture_shards), "--out", str(tmp_path))
    settings += ("--steps", "4000", "--checkpoint-every", "4000")
    parent = start("-m", "accelerate.commands.launch", "--num_processes", "1", "train.py", *settings)
    wait_for_step(tmp_path, 2, parent)
    holder = (tmp_path / "run.lock").read_text().strip()
    (process,) = (int(number) for number in re.findall(r"^process (\d+) on ", holder))
    try:
        assert process != parent.pid
        again = parse_command(train.TrainCommand, [*settings, "--resume", "auto"])
        with pytest.raises(ValueError, match=f"is in use by {re.escape(holder)}: two runs would mix"):
            train.train(again)
        parent.send_signal(signal.SIGTERM)
        output, _ = parent.communicate(timeout=60)  # to the end of its process, which has its output too
    except BaseException:
        os.kill(process, signal.SIGKILL)
        raise
    assert parent.returncode == -signal.SIGTERM
    assert "stopped after step" in output
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["exit_code"] == 75
    assert [c.step for c in checkpoint.complete(tmp_path / "checkpoints")] == [status["step"]]
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("command", [tools.evaluate, tools.profile_throughput])
def test_other_commands_end_with_their_launcher_too(
    monkeypatch: pytest.MonkeyPatch, command: ModuleType
) -> None:
    asked = []
    monkeypatch.setattr(command, "end_with_launcher", lambda: asked.append(command))
    monkeypatch.setattr(sys, "argv", ["command", "--help"])
    with pytest.raises(SystemExit):
        command.main()
    assert asked == [command]
