"""Everything that needs a GPU, in one go: the gpu tests, compute-sanitizer, every GPU benchmark.

    make gpu-check        (or python benchmarks/gpu_check.py)

Writes benchmarks/results/<date>-<gpu>.json. A step that fails is recorded with the end of its output and the
rest goes on, so that a short lease of a machine is not lost; the exit code is 1 if any step failed. Photographs
come from VQSA_DATA (imagenet-sample, or imagenette-112), else from generated pictures, and the result says which.
"""

from __future__ import annotations

import json
import os
import re
import shutil
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
_STEP_LIMIT_S = 420


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
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    try:
        output, _ = process.communicate(timeout=_STEP_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        output = process.communicate()[0] + f"\nstopped after {_STEP_LIMIT_S} s"
    print(output[-6000:], flush=True)
    record: dict[str, Any] = {
        "command": " ".join(command),
        "ok": process.returncode == 0,
        "seconds": round(time.monotonic() - began_s, 1),
    }
    if result is not None and result.is_file():
        record["result"] = json.loads(result.read_text())
    if process.returncode:
        record["output_end"] = output[-4000:]
    else:
        record["last_line"] = output.strip().rsplit("\n", 1)[-1]
    steps[name] = record


def main() -> None:
    """Run all steps and write the result file."""
    if not torch.cuda.is_available():
        sys.exit(
            "gpu-check needs a CUDA device and torch sees none; run it on a machine with a GPU and its driver"
        )
    python = sys.executable
    steps: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        source, what = photographs(work)
        shard_set = work / "shards"
        run(
            "build shards",
            [
                python,
                "tools/build_shards.py",
                "--source",
                str(source),
                "--out",
                str(shard_set),
                "--name",
                "bench",
            ],
            steps,
        )
        run("gpu tests", [python, "-m", "pytest", "-q", "-m", "gpu", "--require-gpu", "tests"], steps)
        threads = str(os.cpu_count() or 2)
        benchmarks = {
            "corruptions": ["benchmarks/corruptions.py"],
            "loader": [
                "benchmarks/loader.py", "--source", str(source), "--batch", "256", "--threads", threads,
                "--peer-batches", "0",
            ],
            "training": ["benchmarks/training.py", "--data", str(shard_set), "--threads", threads],
        }  # fmt: skip
        for name, command in benchmarks.items():
            result = work / f"{name}.json"
            run(f"benchmark {name}", [python, *command, "--out", str(result)], steps, result)
        sanitizer = shutil.which("compute-sanitizer")
        for tool in ("memcheck", "racecheck"):
            if sanitizer is None:
                steps[f"compute-sanitizer {tool}"] = {
                    "ok": False,
                    "output_end": "compute-sanitizer is not installed",
                }
                continue
            tests = [
                python,
                "-m",
                "pytest",
                "-q",
                "-x",
                "-m",
                "gpu",
                "--require-gpu",
                "tests",
                "-k",
                "corruptions",
            ]
            run(
                f"compute-sanitizer {tool}",
                [sanitizer, "--tool", tool, "--error-exitcode", "1", *tests],
                steps,
            )
    record = {**environment(), "photographs": what, "steps": steps}
    gpu = re.sub(r"[^a-z0-9]+", "-", record["gpu"].lower()).strip("-")
    out = ROOT / "benchmarks" / "results" / f"{record['date']}-{gpu}.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    failed = [name for name, step in steps.items() if not step["ok"]]
    print(f"written: {out}" + (f"; FAILED: {', '.join(failed)}" if failed else "; all steps passed"))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
