"""Several processes: killed and resumed, more and fewer of them, one that dies, one that never comes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import TWO_PROCESSES, environment, start

from tools.runtime.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow


def script(*arguments: str) -> str:
    ended = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=500
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_killed_and_resumed_runs_end_with_the_same_bits(picture_shards: Path) -> None:
    """Three kills; benchmarks/results has the outcome of twenty."""
    few = ("--kills", "3", "--seed", "1", "--steps", "18")
    output = script("tests/kill_loop.py", *few, "--data", str(picture_shards))
    assert "3 kills, differences: none" in output
    kills = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert [kill["when"] for kill in kills] == ["step", "step", "write"]
    assert kills[2]["unfinished_checkpoint"] is not None
    assert all(set(kill["exit_codes"]) <= {1, -signal.SIGKILL} for kill in kills)


@pytest.fixture(scope="module")
def elastic(picture_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = script("tests/elastic.py", str(picture_shards), str(tmp_path_factory.mktemp("elastic") / "runs"))
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def test_one_two_four_and_one_process_see_what_one_sees(elastic: dict[str, Any]) -> None:
    """Every position once, whatever was repeated; the same sample with the same pixels in the same global batch."""
    seen: dict[str, dict[int, tuple[int, int, str]]] = {"steady": {}, "elastic": {}}
    for name, rows in seen.items():
        for position, *what in elastic[name]["audit"]:
            assert rows.setdefault(position, tuple(what)) == tuple(what)
    assert sorted(seen["elastic"]) == list(range(96))
    assert seen["elastic"] == seen["steady"]
    assert all(step == 1 + position // 8 for position, (step, _, _) in seen["elastic"].items())
    assert sorted(seen["elastic"][position][1] for position in range(90)) == list(range(90))


def test_one_two_four_and_one_process_learn_the_same(elastic: dict[str, Any]) -> None:
    steady, changing = (elastic[name]["metrics"] for name in ("steady", "elastic"))
    assert [r["step"] for r in changing] == list(range(1, 13))
    for one, other in zip(steady, changing, strict=True):
        assert other["lr"] == one["lr"]
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-4)
        assert other["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=1e-3)


@pytest.mark.parametrize("victim", [0, 1])
def test_one_process_that_dies_ends_all_and_is_named(
    picture_shards: Path, tmp_path: Path, victim: int
) -> None:
    arguments = [
        "train.py",
        "--recipe",
        "tests/tiny.toml",
        "--data",
        str(picture_shards),
        "--out",
        str(tmp_path),
    ]
    launcher = start(*TWO_PROCESSES, *arguments, "--steps", "4000", "--checkpoint-every", "4000")
    deadline_s = time.monotonic() + 120
    while not read_metrics(tmp_path / "metrics.jsonl"):
        assert launcher.poll() is None, launcher.communicate()[0]
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    ranks = {
        int(child.environ()["RANK"]): child.pid
        for child in psutil.Process(launcher.pid).children(recursive=True)
        if "train.py" in " ".join(child.cmdline()) and "RANK" in child.environ()
    }
    began_s = time.monotonic()
    os.kill(ranks[victim], signal.SIGKILL)
    output, _ = launcher.communicate(timeout=60)
    assert time.monotonic() - began_s < 60
    assert launcher.returncode != 0
    named = f"rank {victim} (process {ranks[victim]}"
    assert f"{named} on " in output or f"(pid: {ranks[victim]})" in output
    assert "SIGKILL" in output or "no longer runs: killed or crashed" in output


def test_a_process_that_never_comes_is_not_waited_for_for_ever(picture_shards: Path, tmp_path: Path) -> None:
    """The second of two processes is never started."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    alone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29811"}
    command = [sys.executable, "train.py", "--recipe", "tests/tiny.toml", "--data", str(picture_shards)]
    ended = subprocess.run(
        [*command, "--out", str(tmp_path), "--join-within-s", "3"],
        cwd=ROOT,
        env={**environment(), **alone},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 1
    assert "rank 0 of 2 waited 3 s at 127.0.0.1:29811 for all processes to join" in ended.stderr


def test_a_silent_process_is_named(tmp_path: Path) -> None:
    """Stopped, not dead: its connections stay open, and only its beats are missing."""
    code = (
        "import os, sys, time, logging\n"
        "import torch.distributed as dist\n"
        "from tools.runtime.heartbeat import Heartbeat\n"
        "logging.basicConfig()\n"
        "dist.init_process_group('gloo')\n"
        "with Heartbeat(lost_after_s=3):\n"
        "    print('beating', flush=True)\n"
        "    time.sleep(60)\n"
    )
    processes = []
    for rank in range(3):
        numbers = {"RANK": str(rank), "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29812"}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", code],
                cwd=ROOT,
                env={**environment(), **numbers},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        for process in processes:
            assert process.stdout is not None
            while "beating" not in (line := process.stdout.readline()):
                assert line
        processes[2].send_signal(signal.SIGSTOP)
        for process in processes[:2]:
            output, _ = process.communicate(timeout=40)
            assert process.returncode == 1
            assert f"rank 2 (process {processes[2].pid} on " in output
            assert "has not been heard of for" in output
    finally:
        for process in processes:
            process.kill()
