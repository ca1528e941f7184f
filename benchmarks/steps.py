"""Runs steps one after another, each within a limit, and keeps what is done: the outcome is written after every step.

A step is a command in a process group of its own, which ends with it, at its limit, and with whoever runs the steps. A
step whose tests failed, whose predecessor failed, or that no longer fits into the time left is not run, and says why.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_LEAVE_S = 5.0  # of a budget: to write the result and end


@dataclass(frozen=True)
class Step:
    """A command and what it depends on.

    name: what it is called in the result.
    command: program and arguments, run in the root of the checkout.
    about_s: seconds that it is thought to take.
    limit_s: seconds after which it is ended.
    tests: steps without whose success there is no number of this one.
    needs: steps that must have succeeded in this run.
    result: JSON that it writes.
    variables: of its environment, beside this process's.
    entries: files, relative to the root, whose imports must be possible.
    modules: what must be importable beside that.
    """

    name: str
    command: tuple[str, ...]
    about_s: float
    limit_s: float
    tests: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    result: Path | None = None
    variables: dict[str, str] = field(default_factory=dict)
    entries: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()


class Stopped(BaseException):
    """A signal asked this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def stop_on_signals() -> None:
    """Turn SIGTERM, SIGINT and SIGHUP into `Stopped`, so that the running step is ended and recorded."""

    def stop(number: int, frame: object) -> None:
        raise Stopped(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)


def surroundings(step: Step) -> dict[str, str]:
    """The step's environment: the checkout comes first on the path of Python, whether it is installed or not."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "COLUMNS": "160", **step.variables}


def _end(process: subprocess.Popen[str]) -> None:
    """End what is left of a step's process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin:
        process.stdin.close()


def failed_tests(output: str) -> list[str]:
    """Return the tests that pytest says failed: in its summary, and, where it was cut off before, as they ran (-v)."""
    summary = re.findall(r"^(?:FAILED|ERROR) (\S+\.py.*?)(?: - .*)?$", output, re.MULTILINE)
    as_they_ran = re.findall(r"^(\S+\.py::.*?) (?:FAILED|ERROR) +\[ *\d+%\]$", output, re.MULTILINE)
    return list(dict.fromkeys([*as_they_ran, *summary]))


def run(step: Step, limit_s: float, steps: dict[str, Any]) -> None:
    """Run one step; put its outcome, its time and the JSON it wrote into `steps`, also when a signal comes."""
    print(f"== {step.name}: {' '.join(step.command)}", flush=True)
    began_s = time.monotonic()
    ended, stopped = "", None
    # Into a file: what a step started may outlive it for a moment and would hold a pipe open.
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.guard", *step.command],
            cwd=ROOT,
            env=surroundings(step),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            process_group=0,
        )
        try:
            process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            ended = f"stopped after {limit_s:.0f} s"
        except Stopped as stop:
            ended, stopped = f"stopped by {stop}", stop
        finally:
            _end(process)
        log.seek(0)
        output = log.read()
    ok = not ended and process.returncode == 0
    record: dict[str, Any] = {
        "command": " ".join(step.command),
        "ok": ok,
        "seconds": round(time.monotonic() - began_s, 1),
    }
    if step.result is not None and step.result.is_file():
        try:
            record["result"] = json.loads(step.result.read_text())
        except ValueError as error:
            record |= {"ok": False, "result_unreadable": f"{step.result.name} is not whole: {error}"}
    if record["ok"]:
        record["last_line"] = output.strip().rsplit("\n", 1)[-1]
    else:
        record |= {"status": process.returncode, "output_end": output[-8000:] + (ended and f"\n{ended}")}
        if "pytest" in step.command:
            record["tests_failed"] = failed_tests(output)
    steps[step.name] = record
    with contextlib.suppress(OSError):  # who reads along may have gone, as after SIGHUP
        print(output[-(1500 if ok else 6000) :] + f"\n== {step.name}: {ended or 'ended'}", flush=True)
    if stopped:
        raise stopped


def reason_not_to_run(
    step: Step, steps: dict[str, Any], this_run: set[str], left_s: float, with_tests: bool
) -> str | None:
    """Say why a step cannot be run now; None where it can."""
    for name in step.needs:
        if name not in this_run or not steps[name]["ok"]:
            return f"{name} did not succeed"
    for name in step.tests if with_tests else ():
        if not steps.get(name, {}).get("ok"):
            return f"no number without its tests: {name} did not pass"
    if shutil.which(step.command[0]) is None:
        return f"{step.command[0]} is not installed"
    if left_s < step.about_s:
        return f"it takes about {step.about_s:.0f} s, and {max(0, left_s):.0f} s are left of the budget"
    return None


def run_all(
    chosen: Iterable[Step],
    steps: dict[str, Any],
    write: Callable[[], None],
    *,
    budget_s: float | None = None,
    began_s: float | None = None,
    with_tests: bool = True,
) -> list[str]:
    """Run steps in order and record them in `steps`; return the names of those that failed or were not run.

    Args:
        chosen: the steps.
        steps: name to outcome; those of earlier runs may be there, and one that is not run now stays.
        write: called after each step, and when a signal ends one.
        budget_s: seconds from `began_s` (a `time.monotonic`; default: now) in which to be done.
        with_tests: require the tests of a step.

    Raises:
        Stopped: after the running step was ended, recorded and written.
    """
    began_s = time.monotonic() if began_s is None else began_s
    this_run: set[str] = set()
    failed = []
    for step in chosen:
        left_s = float("inf") if budget_s is None else budget_s - _LEAVE_S - (time.monotonic() - began_s)
        reason = reason_not_to_run(step, steps, this_run, left_s, with_tests)
        try:
            if reason is None:
                this_run.add(step.name)
                run(step, min(step.limit_s, left_s), steps)
                if step.tests and not with_tests:
                    steps[step.name]["tests"] = "not asked for"
            else:
                print(f"== {step.name}: not run: {reason}", flush=True)
                if "command" not in steps.get(step.name, {}):  # what an earlier run found is kept
                    steps[step.name] = {"ok": False, "not_run": reason}
        finally:
            write()
        if reason is not None or not steps[step.name]["ok"]:
            failed.append(step.name)
    return failed
