"""What needs a GPU: the gpu tests, a benchmark of every part, compute-sanitizer. Not: benchmarks of trained models.

    make gpu-check                                        (or python -m benchmarks.gpu_check; --help names the steps)
    make gpu-check GPU_CHECK_ARGS="--only codebook --budget-s 570 --out runs/gpu"

Writes OUT/<date>-<gpu>.json anew after every step, so that whatever ends this leaves what was done. A step that fails
is recorded with the end of its output, and the rest goes on; a benchmark runs only after the tests of its own part, and
there is no number where they fail. `--only codebook` runs those tests first, unless that file has them passed at the
same commit; a run at another commit gets a file of its own. The exit code is 1 if a step failed or was not run.
Photographs come from VQSA_DATA (imagenet-sample, or imagenette-112), else from generated pictures, and the result says
which. Nothing is run where packages or native parts are missing that the chosen steps need: all are named.

The times in --help are estimates for one H100 with 16 cores. Where a command may take ten minutes, these fit with the
tests that they bring: `--only corruptions codebook`; `--only loader evaluation tests-nccl`; `--only training`;
`--only profile`; `--only` with one sanitizer step, or the two of a tool where they turn out faster. All tests together
take two such calls. `--budget-s 570` leaves out what no longer fits.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.needs import missing_native_parts, missing_packages, third_party
from benchmarks.steps import ROOT, Step, Stopped, run_all, stop_on_signals

# Rooms: the files with their tests on a GPU, options that choose among them, and seconds they may take.
_ROOMS = {
    "corruptions": (("corruptions_torch", "corruptions_dali"), (), 60),
    "codebook": (("codebook_gpu", "model_search", "model_quantize"), (), 180),
    "loader": (("pipeline_gpu",), ("-k", "not (training or evaluation)"), 60),
    "evaluation": (("pipeline_gpu",), ("-k", "evaluation"), 40),
    "training": (("pipeline_gpu",), ("-k", "training"), 200),
    "nccl": (("train_nccl",), (), 150),
    "profile": (("profile_gpu",), (), 60),
}
# Small cases, since every access is watched; all tiles of the codebook's kernels, Hopper's among them.
_SANITIZED = {
    "corruptions": "(cuda_equals_cpu and (size1 or size3)) or same_pixels",
    "codebook": "odd_sizes or (exact_on_hostile and (relu or collapsed)) or (hopper_variant and 163 and relu)",
}
# Imported only once images are decoded and tars are written.
_BUILDING = ("simplejpeg", "webdataset")
# It asserts that a call returns before the device is done, which is not so under the tools.
_NOT_SANITIZED = "tests/test_corruptions_torch.py::test_cuda_runs_on_the_current_stream"


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


def all_steps(work: Path, source: Path) -> list[Step]:
    """Return every step, in order: a room's tests, then its benchmarks; the sanitizers last."""
    python, threads, shard_set = sys.executable, str(len(os.sched_getaffinity(0))), str(work / "shards")

    def tests(room: str) -> Step:
        names, choice, about_s = _ROOMS[room]
        files = tuple(f"tests/test_{name}.py" for name in names)
        # Each test is named before it runs: a hanging one is the last in the output.
        command = (
            python,
            "-m",
            "pytest",
            "-v",
            "--durations=15",
            "-m",
            "gpu",
            "--require-gpu",
            *choice,
            *files,
        )
        # Without DALI, pytest skips the tests of its operator, which the result says: the others need none.
        entries = ("tests/conftest.py", *files)
        built = _BUILDING if room not in _SANITIZED else ()
        return Step(f"tests-{room}", command, about_s, 540, entries=entries, modules=built)

    def benchmark(name: str, room: str, about_s: float, *arguments: str, needs: tuple[str, ...] = ()) -> Step:
        # As a module: of a script its own folder, not the checkout, would be on the path.
        out = work / f"{name}.json"
        command = (python, "-m", f"benchmarks.{name}", *arguments, "--out", str(out))
        entries, built = (f"benchmarks/{name}.py",), _BUILDING if name == "loader" else ()
        return Step(
            name, command, about_s, 540, (f"tests-{room}",), needs, out, entries=entries, modules=built
        )

    def sanitizer(tool: str, room: str) -> Step:
        watched = tests(room)
        options = ("--report-api-errors", "no") if tool == "memcheck" else ()
        chosen = ("-k", _SANITIZED[room], "--deselect", _NOT_SANITIZED)
        command = (
            "compute-sanitizer",
            "--tool",
            tool,
            *options,
            "--error-exitcode",
            "99",
            *watched.command,
            *chosen,
        )
        # Pools hand out parts of large blocks, and what lies beyond a part is no error to memcheck.
        unpooled = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "DALI_USE_DEVICE_MEM_POOL": "0"}
        return Step(f"{tool}-{room}", command, 300, 540, variables=unpooled, entries=watched.entries)

    shards = (python, "tools/build_shards.py", "--source", str(source), "--out", shard_set, "--name", "bench")
    data = ("--threads", threads, "--batch", "256")
    profile = (
        *(python, "tools/profile_throughput.py", "--recipe", "recipes/paper.toml", "--data", shard_set),
        *(
            "--pipeline.batch-global",
            "256",
            "--pipeline.threads",
            threads,
            "--device",
            "cuda",
            "--out",
            str(work),
        ),
        *("--rounds", "3", "--try", "--sweep", "batch"),
    )
    return [
        tests("corruptions"),
        benchmark("corruptions", "corruptions", 60, "--no-tests", "--no-cpu", "--photos", str(source)),
        tests("codebook"),
        benchmark("codebook", "codebook", 200, "--no-tests", "--budget-s", "400"),
        tests("loader"),
        benchmark(
            "loader", "loader", 120, "--source", str(source), *data, "--batches", "60", "--peer-batches", "0"
        ),
        tests("evaluation"),
        benchmark(
            *("evaluation", "evaluation", 90, "--data", str(source), "--no-per-cell", "--images", "512"),
            *("--batch", "128", "--precision", "bf16", "--threads", threads),
        ),
        tests("training"),
        Step("shards", shards, 20, 120, entries=("tools/build_shards.py",), modules=_BUILDING),
        benchmark("training", "training", 150, "--data", shard_set, *data, "--no-tests", needs=("shards",)),
        tests("nccl"),
        tests("profile"),
        Step(
            *("profile", profile, 300, 540, ("tests-profile",), ("shards",), work / "profile.json"),
            entries=("tools/profile_throughput.py",),
        ),
        *(sanitizer(tool, room) for tool in ("memcheck", "racecheck") for room in _SANITIZED),
    ]


def groups(steps: list[Step]) -> dict[str, list[str]]:
    """Return the names that stand for several steps."""
    tests = [step.name for step in steps if step.name.startswith("tests-")]
    sanitizers = [step.name for step in steps if step.command[0] == "compute-sanitizer"]
    benchmarks = [step.name for step in steps if step.tests]
    return {"tests": tests, "benchmarks": benchmarks, "sanitizers": sanitizers}


def chosen_steps(
    steps: list[Step], only: list[str], done: dict[str, Any], with_tests: bool = True
) -> list[Step]:
    """Return the steps asked for with those they need, in order; tests that passed in an earlier run are left out."""
    named, known = {step.name: step for step in steps}, groups(steps)
    wanted = {name for word in only or named for name in known.get(word, [word])}
    for name in list(wanted):
        wanted |= set(named[name].needs)
        if with_tests:
            wanted |= {test for test in named[name].tests if not done.get(test, {}).get("ok")}
    return [step for step in steps if step.name in wanted]


def open_result(folder: Path, machine: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """Return the file to write and the steps it has already: a file is gone on with at the same clean commit only."""
    gpu = re.sub(r"[^a-z0-9]+", "-", machine["gpu"].lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    same = ("commit", "gpu", "driver", "packages", "cpu", "cpu_cores", "photographs")
    clean = re.fullmatch(r"[0-9a-f]+", machine["commit"]) is not None
    number = 1
    while True:
        file = folder / f"{machine['date']}-{gpu}{f'-{number}' if number > 1 else ''}.json"
        if not file.is_file():
            return file, {}
        try:
            found = json.loads(file.read_text())
            if clean and all(found[name] == machine[name] for name in same):
                return file, found["steps"]
        except (ValueError, KeyError, TypeError):
            print(f"{file} is not a result of gpu-check, and left alone", flush=True)
        number += 1


def parse(steps: list[Step], words: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    lines = [
        f"  {step.name:22s} about {step.about_s:3.0f} s, at most {step.limit_s:.0f} s"
        + (f"; after {', '.join((*step.needs, *step.tests))}" if step.tests else "")
        for step in steps
    ]
    lines += [f"  {name:22s} {', '.join(members)}" for name, members in groups(steps).items()]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description=__doc__,
        epilog="\n".join(["steps, and names of several:", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [*(step.name for step in steps), *groups(steps)]
    parser.add_argument(
        "--only", nargs="+", default=[], choices=names, metavar="STEP", help="run these, in order"
    )
    parser.add_argument(
        "--no-tests", action="store_true", help="benchmarks without their tests; the result says so"
    )
    parser.add_argument("--budget-s", type=float, help="be done in this time: skip steps that no longer fit")
    parser.add_argument("--commit", help="what to record as the code's commit where the checkout has no git")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the result"
    )
    return parser.parse_args(words)


def summary(steps: dict[str, Any]) -> dict[str, Any]:
    """Return what stands at the head of a result: which tests failed, and what is not covered."""
    from pipeline.corruptions import frost

    missed = []
    if not frost.found():
        missed.append(
            "frost: its textures are not here, so no test and no number has it, nor the mix of all corruptions; "
            "pip install --no-deps imagecorruptions==1.1.2, or set VQSA_FROST_DIR"
        )
    if missing_packages(["nvidia.dali"]):
        missed.append(
            "the corruptions' DALI operator: nvidia-dali-cuda130 is not here, so its tests are skipped"
        )
    failed = {name: step["tests_failed"] for name, step in steps.items() if "tests_failed" in step}
    return {"tests_failed": failed, "not_covered": missed}


def require(steps: list[Step]) -> None:
    """End with one message where there is no GPU, or where something is missing that the steps need."""
    without_torch = missing_packages(["torch"])
    if not without_torch and not importlib.import_module("torch").cuda.is_available():
        sys.exit(
            "gpu-check needs a CUDA device and torch sees none; run it on a machine with a GPU and its driver"
        )
    modules = third_party(ROOT / entry for step in steps for entry in step.entries)
    modules |= {module for step in steps for module in step.modules}
    missing = missing_packages(modules) or missing_native_parts("nvidia.dali" in modules)
    if missing:
        sys.exit(
            f"gpu-check: nothing was run, since these are missing here: {', '.join(missing)}. Packages: pip "
            "install, or a folder with them on PYTHONPATH; native parts: docs/install.md"
        )


def check(options: argparse.Namespace, work: Path, began_s: float) -> list[str]:
    """Run the chosen steps and write the result; return the names of those that failed or were not run."""
    from benchmarks.environment import environment, write_result

    machine = environment()
    if machine["commit"] == "unknown" and options.commit:
        machine["commit"] = options.commit
    source, what = photographs(work)
    machine["photographs"] = what
    out, steps = open_result(options.out, machine)
    chosen = chosen_steps(all_steps(work, source), options.only, steps, not options.no_tests)

    def write() -> None:
        write_result(out, {**machine, **summary(steps), "steps": steps})

    print(f"{len(chosen)} steps, photographs: {what}, result: {out}", flush=True)
    try:
        with_tests = not options.no_tests
        return run_all(
            chosen, steps, write, budget_s=options.budget_s, began_s=began_s, with_tests=with_tests
        )
    finally:
        head = summary(steps)
        for name, tests in head["tests_failed"].items():
            print(f"{name}: {', '.join(tests) or 'no test is named; see its output_end'}")
        for missed in head["not_covered"]:
            print(f"NOT COVERED: {missed}")
        print(f"written: {out}", flush=True)


def main() -> None:
    """Run the command line."""
    began_s = time.monotonic()
    stop_on_signals()
    try:
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            steps = all_steps(work, work)
            options = parse(steps)
            require(chosen_steps(steps, options.only, {}, not options.no_tests))
            failed = check(options, work, began_s)
    except Stopped as stop:
        print(f"stopped by {stop}")
        sys.exit(128 + stop.number)
    print(f"FAILED or not run: {', '.join(failed)}" if failed else "all steps passed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
