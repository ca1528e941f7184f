"""Trains for half an hour and watches what the process holds: host memory, file handles, threads.

    python benchmarks/soak.py --minutes 30 --out benchmarks/results/soak.json

A small model on generated pictures: many epochs, with all 15 corruptions, checkpoints, validations, metrics and
TensorBoard, so that whatever grows by step, epoch, checkpoint or validation shows. What counts begins after the first
five minutes. Growth is the mean of its first minute against that of its last; the trend is the line fitted through all
of it, since a minute's mean also moves with what the allocator gives back. Handles and threads are counted: the most in
the first third of that time against the most in the last.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tyro
from pydantic import BaseModel, ConfigDict, Field

from benchmarks.environment import environment, write_result
from pipeline.corruptions import TRAINING_KINDS
from tools.runtime.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
LIMIT_PCT = 2.0


class Soak(BaseModel):
    """Train for a while and watch memory and file handles."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    minutes: float = Field(30, gt=0)
    """Length of the run."""

    settle_minutes: float = Field(5, ge=0)
    """Time at the start that does not count: caches fill, allocators grow."""

    data: Path | None = None
    """Shard set; unset: 300 generated pictures."""

    out: Path | None = None
    """JSON file for the result."""


def sample(pid: int) -> dict[str, float]:
    """Return what a process holds now."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    fields = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line
    )
    return {
        "rss_mib": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        "anonymous_mib": int(fields["RssAnon"].split()[0]) / 1024,
        "handles": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(fields["Threads"]),
    }


def growth(samples: list[dict[str, float]], name: str, settle_s: float, end_s: float) -> dict[str, float]:
    """Return the means of the first minute that counts and of the last, the growth and the fitted trend in percent."""
    window_s = min(60.0, (end_s - settle_s) / 3)
    first = statistics.mean(s[name] for s in samples if settle_s <= s["at_s"] < settle_s + window_s)
    last = statistics.mean(s[name] for s in samples if s["at_s"] >= end_s - window_s)
    counted = [(s["at_s"], s[name]) for s in samples if s["at_s"] >= settle_s]
    line = statistics.linear_regression(*zip(*counted, strict=True))
    return {
        "first": round(first, 2),
        "last": round(last, 2),
        "growth_pct": round(100 * (last / first - 1), 3),
        "trend_pct": round(
            100 * line.slope * (end_s - settle_s) / (line.intercept + line.slope * settle_s), 3
        ),
    }


def most(samples: list[dict[str, float]], name: str, settle_s: float, end_s: float) -> dict[str, float]:
    """Return the most in the first third of what counts and in the last: a checkpoint's thread comes and goes."""
    third_s = (end_s - settle_s) / 3
    return {
        "first": max(s[name] for s in samples if settle_s <= s["at_s"] <= settle_s + third_s),
        "last": max(s[name] for s in samples if s["at_s"] >= end_s - third_s),
    }


def watch(process: subprocess.Popen[bytes], metrics: Path, minutes: float) -> list[dict[str, float]]:
    """Return what the process holds every few seconds, for so long after its first line of metrics."""
    samples: list[dict[str, float]] = []
    began_s: float | None = None
    while began_s is None or (at_s := time.monotonic() - began_s) < 60 * minutes:
        if process.poll() is not None:
            raise RuntimeError(f"training ended with {process.returncode}")
        if began_s is not None:
            samples.append({"at_s": at_s, **sample(process.pid)})
            time.sleep(min(5.0, 0.6 * minutes))
        elif metrics.is_file() and metrics.stat().st_size:
            began_s = time.monotonic()
        else:
            time.sleep(1)
    return samples


def soak(command: Soak, folder: Path) -> dict[str, object]:
    """Run it; returns the result."""
    data = command.data
    if data is None:
        sys.path.insert(0, str(ROOT / "tests"))
        from conftest import write_pictures

        from shards.build import BuildOptions, build

        write_pictures(folder / "source", 300)
        data = folder / "shards"
        build(BuildOptions(source=folder / "source", out=data, name="pictures", workers=1))
    run = folder / "run"
    arguments = ["--recipe", "tests/tiny.toml", "--data", str(data), "--val", str(data), "--out", str(run)]
    arguments += [
        "--steps",
        "100000000",
        "--log-every",
        "50",
        "--checkpoint-every",
        "500",
        "--val-every",
        "500",
    ]
    arguments += ["--pipeline.kinds", *TRAINING_KINDS]
    arguments += ["--images-every", "200", "--optim.ema-decay", "0.999", "--optim.lr", "1e-4"]
    arguments += ["--pipeline.mixup", "0.2", "--pipeline.cutmix", "1.0", "--checkpoint-async"]
    log = (folder / "log").open("w")
    with subprocess.Popen(
        [sys.executable, "train.py", *arguments], cwd=ROOT, stdout=log, stderr=log
    ) as process:
        try:
            samples = watch(process, run / "metrics.jsonl", command.minutes)
        except RuntimeError as error:
            raise RuntimeError((folder / "log").read_text()) from error
        finally:
            process.terminate()
        code = process.wait(120)
    records = [r for r in read_metrics(run / "metrics.jsonl") if "loss" in r]
    result: dict[str, object] = {
        "minutes": command.minutes,
        "settle_minutes": command.settle_minutes,
        "exit_code_on_sigterm": code,
        "steps": records[-1]["step"],
        "epochs": round(records[-1]["epoch"], 1),
    }
    span = (60 * command.settle_minutes, samples[-1]["at_s"])
    result |= {name: growth(samples, name, *span) for name in ("rss_mib", "anonymous_mib")}
    result |= {name: most(samples, name, *span) for name in ("handles", "threads")}
    result["each_minute"] = [
        {key: round(value, 1) for key, value in one.items()} for one in samples[:: max(1, len(samples) // 30)]
    ]
    return result


def main() -> None:
    """Run the command line; exit code 1 where memory grew by more than 2 %, or handles or threads at all."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends what it started too
    command = tyro.cli(Soak, description=Soak.__doc__)
    with tempfile.TemporaryDirectory() as name:
        result = soak(command, Path(name))
    print(json.dumps({k: v for k, v in result.items() if k != "each_minute"}, indent=1))
    if command.out:
        words = f"python benchmarks/soak.py --minutes {command.minutes:g}"
        write_result(command.out, {**environment(), "command": words, **result})
    memory: dict[str, float] = result["rss_mib"]  # type: ignore[assignment]
    counts: list[dict[str, float]] = [result["handles"], result["threads"]]  # type: ignore[list-item]
    more = any(count["last"] > count["first"] for count in counts)
    sys.exit(max(memory["growth_pct"], memory["trend_pct"]) > LIMIT_PCT or more)


if __name__ == "__main__":
    main()
