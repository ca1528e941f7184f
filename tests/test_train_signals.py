"""Signals from a launcher, a scheduler or a person: what reaches a run, and the code that it ends with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment, finish, start, wait_for_step

import model
import train
from tools.runtime import checkpoint
from tools.runtime.config import parse_command
from tools.runtime.interrupt import StopRequest, signals_answered

TINY = "tests/tiny.toml"


@pytest.mark.slow
def test_torchrun_passes_the_signals_on_that_it_is_told_to(picture_shards: Path, tmp_path: Path) -> None:
    """SIGUSR1, Slurm's warning, as docs/training.md says: without the option it would end the launcher alone."""
    launcher = start(
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
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


def test_a_signal_to_a_process_that_ends_does_not_change_its_code() -> None:
    """Sent as late as Python code can: from an object that goes with its module."""
    script = (
        "import os, sys, train\n"
        "class Late:\n"
        "    def __del__(self, kill=os.kill, process=os.getpid):\n"
        "        for number in (10, 15):\n"
        "            kill(process(), number)\n"
        "def ended(command):\n"
        "    if code == 1:\n"
        "        raise ValueError('what went wrong')\n"
        "    return code\n"
        "train.train, train.parse_command = ended, lambda command: None\n"
        "for code in (75, 1):\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        late = Late()\n"
        "        train.main()\n"
        "    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ended.stdout.split() == ["75", "1"], ended.stderr
    assert "train.py: what went wrong" in ended.stderr


def test_a_signal_before_the_loop_stands_in_the_status(
    picture_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is built when the signal comes."""
    (tmp_path / "status.json").write_text("{}")
    arguments = ["--recipe", TINY, "--data", str(picture_shards), "--out", str(tmp_path)]
    child = os.fork()
    if not child:
        monkeypatch.setattr(model, "build", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        try:
            with signals_answered():
                train.train(parse_command(train.TrainCommand, arguments))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 75
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["exit_code"], status["step"], status["total"]) == (75, 0, 12)
    assert "before the first step" in status["why"]


@pytest.mark.slow
def test_a_start_that_fails_elsewhere_is_not_one_to_repeat(picture_shards: Path, tmp_path: Path) -> None:
    """A launcher sends SIGTERM to the others then, as a scheduler does who wants the machine."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import os, sys, time\nsys.path.insert(0, {str(ROOT)!r})\nimport model, train\n"
        "def build(*_):\n"
        "    if os.environ['RANK'] == '1':\n"
        "        raise RuntimeError('no room for the model')\n"
        "    time.sleep(100)\n"
        "model.build = build\n"
        "train.main()\n"
    )
    launcher = start(
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)),
        *("--recipe", TINY, "--data", str(picture_shards), "--out", str(tmp_path / "run")),
        *("--lost-after-s", "15"),
    )
    assert "failed: RuntimeError: no room for the model" in finish(launcher, 1)
    assert not (tmp_path / "run" / "status.json").exists()


def test_a_signal_after_the_loop_changes_nothing() -> None:
    """While what is open is closed, which may take a while."""
    child = os.fork()
    if not child:
        with signals_answered():
            with StopRequest():
                pass
            for number in (signal.SIGTERM, signal.SIGUSR1):
                os.kill(os.getpid(), number)
            os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


@pytest.mark.parametrize(
    ("srun", "status", "left", "requeued"),
    [
        (75, None, None, True),
        (143, 75, None, True),  # one process was killed while the others ended
        (0, 0, None, False),
        (130, 130, None, False),
        (1, None, 75, False),  # a start that failed: the status is an earlier one's
        (143, None, None, False),
    ],
)
def test_the_slurm_script_requeues_what_is_to_go_on(
    tmp_path: Path, srun: int, status: int | None, left: int | None, requeued: bool
) -> None:
    text = (ROOT / "docs" / "training.md").read_text()
    script = "#!/bin/bash\n#SBATCH" + text.partition("```bash\n#!/bin/bash\n#SBATCH")[2].partition("```")[0]
    (tmp_path / "job.sh").write_text(script)
    out, said = tmp_path / "runs" / "r50", tmp_path / "said"
    out.mkdir(parents=True)
    if left is not None:
        (out / "status.json").write_text(json.dumps({"exit_code": left}) + "\n")
    write = (
        f"echo '{json.dumps({'exit_code': status, 'step': 3})}' > runs/r50/status.json\n"
        if status is not None
        else ""
    )
    pretended = {"srun": f"{write}exit {srun}\n", "scontrol": f"echo $1 $2 >> {said}\n"}
    for name, body in pretended.items():
        (tmp_path / name).write_text("#!/bin/bash\n" + body)
        (tmp_path / name).chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "1"}
    ended = subprocess.run(["bash", "job.sh"], cwd=tmp_path, env=variables, capture_output=True, timeout=60)
    assert ended.returncode == (75 if requeued else srun)
    assert said.read_text().splitlines() == ["show hostnames", *(["requeue 7"] if requeued else [])]
