"""Several processes: killed and resumed, more and fewer of them, one that dies, one that never comes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import environment
from ranks import free_port

from tools.runtime import heartbeat, watchdog

ROOT = Path(__file__).resolve().parent.parent
VARIES = {"rate_img_s", "data_wait_pct", "memory_gib", "host_gib"}
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


def test_every_number_of_processes_has_trained(elastic: dict[str, Any]) -> None:
    """Each from where the one before was killed, on all its processes and no others."""
    stages = elastic["stages"]
    assert [(s["ranks"], s["from"], s["to"]) for s in stages] == [(1, 0, 3), (2, 3, 6), (4, 6, 9), (1, 9, 12)]
    for stage in stages:
        trained = [count >= 3 for count in stage["batches"]]
        assert trained == [rank < stage["ranks"] for rank in range(4)]


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
    steady, changing = (
        [r for r in elastic[name]["metrics"] if "loss" in r] for name in ("steady", "elastic")
    )
    changed = [r["changed"] for r in elastic["elastic"]["metrics"] if "changed" in r]
    processes = [change["processes"] for change in changed if "processes" in change]
    assert processes == ["1 -> 2", "2 -> 4", "4 -> 1"]
    assert [r["step"] for r in changing] == list(range(1, 13))
    for one, other in zip(steady, changing, strict=True):
        assert other["lr"] == one["lr"]
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-4)
        assert other["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=1e-3)


@pytest.fixture(scope="module")
def failing(picture_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two processes without a launcher that fail in many ways; whatever is printed is this project's."""
    output = script("tests/failing_ranks.py", str(picture_shards), str(tmp_path_factory.mktemp("failing")))
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def named(case: dict[str, Any], rank: int) -> str:
    return rf"rank {rank} \(process {case['pids'][rank]} on [^)]+\)"


@pytest.mark.parametrize("when", ["error", "error in validation"])
def test_an_error_is_told_before_anything_is_closed(failing: dict[str, Any], when: str) -> None:
    """The second process fails, and then waits for ever for its readers."""
    case = failing[when]
    assert case["codes"] == [1, 1]
    own, other = named(case, 0), named(case, 1)
    told = re.search(f"{own}: {other} failed: ValueError: planted; this process ends too", case["log"])
    ended = re.search(f"{other} could not close what it had open; it ends now", case["log"])
    assert told
    assert ended
    assert told.start() < ended.start()
    assert "\nValueError: planted\n" in case["log"]  # its traceback


@pytest.mark.parametrize("victim", [0, 1])
def test_one_process_that_dies_ends_all_and_is_named(failing: dict[str, Any], victim: int) -> None:
    case = failing[f"killed {victim}"]
    other = 1 - victim
    assert (case["codes"][victim], case["codes"][other]) == (-signal.SIGKILL, 1)
    assert case["ended_s"][other] - case["ended_s"][victim] < 10
    words = f"{named(case, other)}(: | ends because ){named(case, victim)} no longer runs: killed or crashed"
    assert re.search(words, case["log"])


@pytest.mark.parametrize(
    ("when", "data"), [("training", "training"), ("start", "training"), ("validation", "validation")]
)
def test_a_source_that_is_stuck_on_one_process_ends_all(
    failing: dict[str, Any], when: str, data: str
) -> None:
    """While the codebook starts, in training, in a validation: reported, then the end with code 74."""
    case = failing[f"stuck {when}"]
    assert case["codes"] == [1, watchdog.EXIT_CODE]
    reading = r"reading batch \d+ \(\d records from pictures-00000.*; first pictures-00000"
    assert re.search(
        rf"WARNING rank 1 tools.runtime.watchdog: no {data} data for \d+ s: {reading}", case["log"]
    )
    assert re.search(rf"no {data} data for \d+ s: {reading}.*\(data_stop_s = 6\)", case["log"])
    words = (
        rf"{named(case, 0)}(: | ends because ){named(case, 1)} failed: no {data} data for \d+ s: {reading}"
    )
    assert re.search(words, case["log"])


def test_all_processes_say_which_samples_are_not_finite(failing: dict[str, Any]) -> None:
    case = failing["not finite"]
    assert case["codes"] == [1, 1]
    words = r"FloatingPointError: loss or gradients of step 2 are not finite: samples \[\d+\] of rank 1's 4; its batch"
    assert len(re.findall("^" + words, case["log"], re.MULTILINE)) == 2
    assert "of rank 0's" not in case["log"]
    assert case["checkpoints"] == []


def test_processes_that_found_different_checkpoints_do_not_start(failing: dict[str, Any]) -> None:
    """As where --out is on each machine's own disk."""
    case = failing["different checkpoints"]
    assert case["codes"] == [1, 1]
    words = (
        r"^ValueError: the processes found different checkpoints to go on from: rank 0: step 12 \(.*, checksum \w+\); "
        r"rank 1: step 8 \(.*\)\. --out \(.*own\d\) must be one folder that all machines share"
    )
    assert len(re.findall(words, case["log"], re.MULTILINE)) == 2
    assert "resumed after step" not in case["log"]
    assert failing["same step"]["codes"] == [1, 1]
    sums = re.findall(r"rank (\d): step 8 \(\S+, checksum (\w+)\)", failing["same step"]["log"])
    assert len(set(sums)) == 2
    assert len({checksum for _, checksum in sums}) == 2


def test_a_signal_in_a_validation_stops_it_on_all_processes(failing: dict[str, Any]) -> None:
    """One process gets it, in its second of five batches; both answer two batches later at most."""
    case = failing["stopped"]
    assert case["codes"] == [75, 75]
    assert case["checkpoints"] == [4]
    assert case["status"] == {
        "exit_code": 75,
        "step": 4,
        "total": 12,
        "why": "stopped after step 4 of 12; go on with --resume auto",
    }
    assert [r["step"] for r in case["metrics"]] == [3], "no score"
    assert max(map(int, re.findall(r"rank \d scores batch (\d)", case["log"]))) in (1, 2)


def test_what_was_stopped_in_a_validation_goes_on_exactly(failing: dict[str, Any]) -> None:
    """Weights, scores and the numbers of the interval that it was stopped in."""
    case = failing["resumed"]
    assert case["codes"] == [0, 0]
    assert "resumed after step 4 from" in case["log"]
    assert case["same_weights"]
    calm, stopped = (
        [{k: v for k, v in r.items() if k not in VARIES} for r in log] for log in case["metrics"]
    )
    assert calm == stopped
    assert [r["step"] for r in calm] == [3, 4, 6, 8, 9, 12, 12]
    assert case["best"][0] == case["best"][1]


def test_a_process_that_never_comes_is_not_waited_for_for_ever(picture_shards: Path, tmp_path: Path) -> None:
    """The second of two processes is never started."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    port = str(free_port())
    alone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
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
    assert f"rank 0 of 2 waited 3 s at 127.0.0.1:{port} for all processes to join" in ended.stderr


BEATING = """
import logging, signal, time
import torch.distributed as dist
from tools.runtime.heartbeat import Heartbeat

def fail(*_):
    raise ValueError("planted")

signal.signal(signal.SIGUSR1, fail)
logging.basicConfig()
dist.init_process_group("gloo")
with Heartbeat(lost_after_s=3):
    print("beating", flush=True)
    time.sleep(60)
"""


def beating(*prefixes: tuple[str, ...]) -> list[subprocess.Popen[str]]:
    """Start processes that only beat, each by its own command, and wait until they do."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [*prefix, sys.executable, "-c", BEATING],
            cwd=ROOT,
            env={**environment(), **place, "RANK": str(rank), "WORLD_SIZE": str(len(prefixes))},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, prefix in enumerate(prefixes)
    ]
    for process in processes:
        assert process.stdout is not None
        while "beating" not in (line := process.stdout.readline()):
            assert line
    return processes


@pytest.mark.parametrize(("victim", "words"), [(0, "has not answered"), (2, "has not been heard of")])
def test_a_silent_process_is_named(victim: int, words: str) -> None:
    """Stopped, not dead: its connections stay open, and only its beats are missing, or its answers."""
    processes = beating((), (), ())
    try:
        processes[victim].send_signal(signal.SIGSTOP)
        time.sleep(1)  # a request of the others to the first one hangs by now
        if victim == 0:
            processes[1].send_signal(signal.SIGUSR1)
        for rank in {0, 1, 2} - {victim}:
            output, _ = processes[rank].communicate(timeout=20)
            assert processes[rank].returncode == 1
            assert f"rank {victim} (process {processes[victim].pid} on " in output
            assert f"{words} for" in output
            assert ("ValueError: planted" in output) == (victim == 0 and rank == 1)
    finally:
        for process in processes:
            process.kill()


CONTAINER = ("unshare", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount-proc")


def test_a_process_of_another_container_is_not_looked_up_by_its_number() -> None:
    """Both have the machine's name. The second is process 2 of its container, and the first one's has no process 2."""
    if not shutil.which("unshare") or subprocess.run([*CONTAINER, "true"], check=False).returncode:
        pytest.skip("this machine lets nobody make name spaces for processes (unshare --map-root-user --pid)")
    processes = beating(CONTAINER, (*CONTAINER, "sh", "-c", '"$@"; true', "sh"))
    try:
        time.sleep(1.5)  # five beats
        assert [process.poll() for process in processes] == [None, None]
        processes[1].kill()  # with it all of its container
        output, _ = processes[0].communicate(timeout=20)
        assert "rank 1 (process 2 on " in output
        assert "has not been heard of for" in output
    finally:
        for process in processes:
            process.kill()


def test_numbers_of_processes_say_nothing_where_proc_is_of_another_name_space(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert re.fullmatch(r"\S{36} pid:\[\d+\]", heartbeat.pid_space())
    monkeypatch.setattr(os, "getpid", lambda: 1)
    assert heartbeat.pid_space() == ""
    one = heartbeat.Heartbeat(lost_after_s=3)
    one._places = [(2**22 + 1, heartbeat.pid_space())]  # more than any number of a process
    assert one._runs(0), "it is not known to be gone"
