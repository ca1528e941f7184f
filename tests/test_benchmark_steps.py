"""Steps that fail, hang, are cut off or do not fit cost themselves alone, leave nothing behind, and say so."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_check, steps
from benchmarks.steps import ROOT, Step, failed_tests, run_all


def step(name: str, code: str = "", **changes: Any) -> Step:
    """A step that runs a line of Python."""
    return Step(name, (sys.executable, "-c", code or f"print('{name} ran')"), 0.1, 20, **changes)


def outcome(chosen: list[Step], done: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    found = {} if done is None else done
    run_all(chosen, found, lambda: None, **options)
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pid: int) -> bool:
    end_s = time.monotonic() + 10
    while alive(pid) and time.monotonic() < end_s:
        time.sleep(0.02)
    return not alive(pid)


def written(file: Path) -> str:
    """The text of a file, once there is some."""
    end_s = time.monotonic() + 60
    while not (file.is_file() and file.read_text().strip()) and time.monotonic() < end_s:
        time.sleep(0.02)
    return file.read_text()


def test_a_room_that_fails_costs_its_own_numbers_only(tmp_path: Path) -> None:
    bad, good = tmp_path / "test_bad.py", tmp_path / "test_good.py"
    bad.write_text("def test_wrong():\n    assert 1 == 2\n\ndef test_right():\n    pass\n")
    good.write_text("def test_right():\n    pass\n")
    pytest_ = (
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-ra",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tmp_path),
    )
    chosen = [
        Step("tests-bad", (*pytest_, str(bad)), 1, 60),
        step("bad", tests=("tests-bad",)),
        Step("tests-good", (*pytest_, str(good)), 1, 60),
        step("good", tests=("tests-good",)),
    ]
    found: dict[str, Any] = {}
    assert run_all(chosen, found, lambda: None) == ["tests-bad", "bad"]
    assert [test.rsplit("/", 1)[1] for test in found["tests-bad"]["tests_failed"]] == [
        "test_bad.py::test_wrong"
    ]
    assert "no number without its tests: tests-bad" in found["bad"]["not_run"]
    assert found["good"]["last_line"] == "good ran"
    assert list(gpu_check.summary(found)["tests_failed"]) == ["tests-bad"]


def test_without_tests_the_result_says_so() -> None:
    found = outcome([step("bench", tests=("tests-room",))], with_tests=False)
    assert found["bench"]["ok"]
    assert found["bench"]["tests"] == "not asked for"


def test_failed_tests_are_read_from_the_summary() -> None:
    output = "FAILED tests/a.py::b[1-x] - assert 1 == 2\nERROR tests/c.py - ModuleNotFoundError: x\n"
    output += "FAILED to load\nFAILED tests/a.py::b[one code]\n"
    assert failed_tests(output) == ["tests/a.py::b[1-x]", "tests/c.py", "tests/a.py::b[one code]"]


def test_failed_tests_are_known_where_pytest_was_cut_off() -> None:
    output = "t/a.py::b[1-x] PASSED    [  1%]\nt/a.py::b[one code] FAILED         [ 54%]\nt/a.py::c "
    assert failed_tests(output) == ["t/a.py::b[one code]"]
    assert failed_tests(output + "\nFAILED t/a.py::b[one code] - no\nFAILED t/a.py::d\n") == [
        "t/a.py::b[one code]",
        "t/a.py::d",
    ]


def test_a_hanging_step_ends_with_all_that_it_started(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    code = (
        "import subprocess, sys, time\n"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(note)!r}, 'w').write(str(p.pid)); print('half way', flush=True); time.sleep(600)"
    )
    hanging = Step("hangs", (sys.executable, "-c", code), 0.1, 10)
    found = outcome([hanging, step("next")])
    assert not found["hangs"]["ok"]
    assert found["hangs"]["output_end"].split("\n")[0] == "half way"
    assert "stopped after 10 s" in found["hangs"]["output_end"]
    assert found["next"]["ok"]
    assert gone(int(note.read_text()))


def test_what_a_step_leaves_running_ends_with_it(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    code = (
        "import subprocess, sys\n"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(note)!r}, 'w').write(str(p.pid))"
    )
    assert outcome([step("leaves", code)])["leaves"]["ok"]
    assert gone(int(note.read_text()))


@pytest.mark.parametrize("text", ['{"rows": [1, 2', ""])
def test_a_half_written_result_is_recorded_and_the_rest_goes_on(tmp_path: Path, text: str) -> None:
    out = tmp_path / "bench.json"
    found = outcome([step("bench", f"open({str(out)!r}, 'w').write({text!r})", result=out), step("next")])
    assert not found["bench"]["ok"]
    assert "bench.json is not whole" in found["bench"]["result_unreadable"]
    assert found["next"]["ok"]


def test_what_a_failing_benchmark_has_written_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    code = f"import sys; open({str(out)!r}, 'w').write('[1]'); sys.exit(3)"
    found = outcome([step("bench", code, result=out)])["bench"]
    assert (found["ok"], found["status"], found["result"]) == (False, 3, [1])


def test_a_crash_is_told_by_its_signal() -> None:
    found = outcome([step("crash", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")])
    assert found["crash"]["status"] == 128 + signal.SIGSEGV


def test_steps_that_no_longer_fit_are_skipped_and_none_passes_the_budget() -> None:
    long = Step("long", (sys.executable, "-c", "print()"), 500, 540)
    slow = Step("slow", (sys.executable, "-c", "import time; time.sleep(600)"), 0.1, 60)
    began_s = time.monotonic()
    found = outcome([long, step("short"), slow, step("late")], budget_s=20.0)
    assert time.monotonic() - began_s < 20
    assert found["long"]["not_run"].startswith("it takes about 500 s, and ")
    assert found["short"]["ok"]
    assert "stopped after" in found["slow"]["output_end"]
    assert "0 s are left of the budget" in found["late"]["not_run"]


def test_a_step_needs_what_it_is_built_on_in_the_same_run() -> None:
    earlier = {"shards": {"ok": True, "command": "x"}}
    found = outcome([step("training", needs=("shards",))], earlier)
    assert found["training"]["not_run"] == "shards did not succeed"
    assert outcome([step("shards"), step("training", needs=("shards",))])["training"]["ok"]


def test_an_absent_program_is_named_and_earlier_results_stay() -> None:
    absent = Step("memcheck", ("no-such-program",), 1, 1)
    assert outcome([absent])["memcheck"]["not_run"] == "no-such-program is not installed"
    earlier = {"memcheck": {"ok": True, "command": "x", "seconds": 1}}
    assert outcome([absent], earlier)["memcheck"]["ok"]


def test_the_checkout_is_on_the_path_of_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    code = f"import sys; print([p for p in sys.path if p in {[str(ROOT), '/elsewhere']!r}])"
    assert outcome([step("path", code)])["path"]["last_line"] == str([str(ROOT), "/elsewhere"])


_RUNNER = """
import json, sys
from pathlib import Path
from benchmarks.steps import Step, Stopped, run_all, stop_on_signals
note, out = sys.argv[1:]
code = "import os, time; print('begun', flush=True); open(%r, 'w').write(str(os.getpid())); time.sleep(600)" % note
quick, slow = (Step(n, (sys.executable, "-c", c), 0.1, 60) for n, c in (("quick", "print(1)"), ("slow", code)))
stop_on_signals()
done = {}
try:
    run_all([quick, slow, quick], done, lambda: Path(out).write_text(json.dumps(done)))
except Stopped as stop:
    sys.exit(128 + stop.number)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_ends_the_running_step_and_keeps_what_is_done(
    tmp_path: Path, number: signal.Signals
) -> None:
    """Also where gpu-check itself is killed and can say nothing."""
    note, out = tmp_path / "pid", tmp_path / "result.json"
    process = subprocess.Popen([sys.executable, "-c", _RUNNER, str(note), str(out)], cwd=ROOT)
    pid = int(written(note))
    assert alive(pid)
    process.send_signal(number)
    status = process.wait(timeout=30)
    assert gone(pid)
    found = json.loads(out.read_text())
    assert found["quick"]["ok"]
    if number == signal.SIGKILL:
        assert status == -number
        assert list(found) == ["quick"]
    else:
        assert status == 128 + number
        assert not found["slow"]["ok"]
        assert "begun" in found["slow"]["output_end"]
        assert found["slow"]["output_end"].endswith(f"stopped by {number.name}")


def test_a_guard_alone_refuses() -> None:
    """It would end the group of whoever started it."""
    command = [sys.executable, "-m", "benchmarks.guard", "true"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, process_group=None)
    assert done.returncode == 1
    assert "must lead a process group" in done.stderr


def test_no_environment_is_lost() -> None:
    step_ = Step("x", ("true",), 1, 1, variables={"DALI_USE_DEVICE_MEM_POOL": "0"})
    found = steps.surroundings(step_)
    assert found["DALI_USE_DEVICE_MEM_POOL"] == "0"
    assert found["PATH"] == os.environ["PATH"]
