"""Everything that needs a GPU, in one go: the gpu tests, compute-sanitizer, every GPU benchmark.

    make gpu-check        (or python benchmarks/gpu_check.py)

Writes benchmarks/results/<date>-<gpu>.json anew after every step, so that a machine that is taken away leaves what
was done. A step that fails is recorded with the end of its output and the rest goes on, but there is no benchmark
after failed tests; the exit code is 1 if any step failed. Photographs
come from VQSA_DATA (imagenet-sample, or imagenette-112), else from generated pictures, and the result says which.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import environment

ROOT = Path(__file__).resolve().parents[1]
_STEP_LIMIT_S = 300


def photographs(work: Path) -> tuple[Path, str]:
    """Return a folder of class folders and what is in it."""
    data = Path(os.environ.get("VQSA_DATA", ROOT.parent / "shared" / "data"))
    for archive, inside in (
        ("imagenet-sample/imagenet-sample.tar", "imagenet-sample"),
        ("imagenette-112/imagenette-112.tar.gz", "imagenette-112/train"),
    ):
        for place in (data / archive, data / Path(archive).name):
            if place.is_file():
                with tarfile.open(place) as tar:
                    tar.extractall(work, filter="data")
                for stray in (work / inside).glob("*.*"):
                    stray.unlink()  # lists beside the class folders
                return work / inside, place.name
    from tests.conftest import write_pictures

    write_pictures(work / "pictures", 512, classes=8, side=320)
    return work / "pictures", "512 generated pictures"


def run(name: str, command: list[str], steps: dict[str, Any], result: Path | None = None) -> None:
    """Run one step and record its outcome, its time and the JSON it wrote."""
    print(f"== {name}: {' '.join(command)}", flush=True)
    began_s = time.monotonic()
    # Into a file and as a process group of its own: what a step started may outlive it and would hold a pipe open.
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(timeout=_STEP_LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.seek(0)
        output = log.read()
    seconds = round(time.monotonic() - began_s, 1)
    print(output[-6000:], flush=True)
    record: dict[str, Any] = {"command": " ".join(command), "ok": process.returncode == 0, "seconds": seconds}
    if result is not None and result.is_file():
        record["result"] = json.loads(result.read_text())
    if process.returncode:
        stopped = f"\nstopped after {_STEP_LIMIT_S} s" if process.returncode == -signal.SIGKILL else ""
        record["output_end"] = output[-4000:] + stopped
    else:
        record["last_line"] = output.strip().rsplit("\n", 1)[-1]
    steps[name] = record


def main() -> None:
    """Run all steps and write the result file."""
    if not torch.cuda.is_available():
        sys.exit(
            "gpu-check needs a CUDA device and torch sees none; run it on a machine with a GPU and its driver"
        )
    steps: dict[str, Any] = {}
    surroundings = environment()
    gpu = re.sub(r"[^a-z0-9]+", "-", surroundings["gpu"].lower()).strip("-")
    out = ROOT / "benchmarks" / "results" / f"{surroundings['date']}-{gpu}.json"
    out.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        source, what = photographs(work)
        for name, command in commands(work, source):
            if name.startswith("benchmark") and not steps["gpu tests"]["ok"]:
                steps[name] = {"ok": False, "output_end": "not run: the gpu tests failed"}
            elif shutil.which(command[0]) is None:
                steps[name] = {"ok": False, "output_end": f"not run: {command[0]} is not installed"}
            else:
                run(name, command, steps, work / f"{name.split()[-1]}.json")
            record = {**surroundings, "photographs": what, "steps": steps}
            out.write_text(json.dumps(record, indent=1) + "\n")
    failed = [name for name, step in steps.items() if not step["ok"]]
    print(f"written: {out}" + (f"; FAILED: {', '.join(failed)}" if failed else "; all steps passed"))
    sys.exit(bool(failed))


def commands(work: Path, source: Path) -> list[tuple[str, list[str]]]:
    """Return the steps in order: name and command; a benchmark writes its JSON to `work`/<last word>.json."""
    python, threads, shard_set = sys.executable, str(os.cpu_count() or 2), str(work / "shards")
    tests = [python, "-m", "pytest", "-q", "-m", "gpu", "--require-gpu", "tests"]

    def benchmark(name: str, *arguments: str) -> tuple[str, list[str]]:
        # As a module: of a script its own folder, not the checkout, would be on the path.
        module = ["-m", f"benchmarks.{name}"]
        return f"benchmark {name}", [python, *module, *arguments, "--out", str(work / f"{name}.json")]

    return [
        (
            "build shards",
            [python, "tools/build_shards.py", "--source", str(source), "--out", shard_set, "--name", "bench"],
        ),
        ("gpu tests", tests),
        benchmark("corruptions", "--no-tests"),
        benchmark(
            "loader", "--source", str(source), "--batch", "256", "--threads", threads, "--peer-batches", "0"
        ),
        benchmark("training", "--data", shard_set, "--threads", threads, "--batch", "256", "--no-tests"),
        benchmark("codebook", "--no-tests"),
        (
            "benchmark profile",  # writes profile.json
            [
                python,
                "tools/profile_throughput.py",
                "--recipe",
                "recipes/paper.toml",
                "--data",
                shard_set,
                "--pipeline.batch-global",
                "256",
                "--pipeline.threads",
                threads,
                "--rounds",
                "3",
                "--try",
                "--sweep",
                "batch",
                "--device",
                "cuda",
                "--out",
                str(work),
            ],
        ),
        *(
            (
                f"compute-sanitizer {tool} {what}",
                [
                    "compute-sanitizer",
                    "--tool",
                    tool,
                    "--error-exitcode",
                    "1",
                    *tests,
                    "-x",
                    "-k",
                    chosen,
                ],
            )
            for tool in ("memcheck", "racecheck")
            for what, chosen in (
                ("corruptions", "corruptions"),
                ("codebook", "codebook_gpu and (hostile or odd_sizes)"),
            )
        ),
    ]


if __name__ == "__main__":
    main()
