"""Checks the profiler against the clock: predicted against measured rate, and what it costs when attached.

    python benchmarks/profiler.py --small IMAGENETTE_112_SHARDS --large IMAGENET_SHARDS [--out result.json]

For each case the stages are measured, the rate of whole training steps is predicted from them alone, and compared
with the measured one, round by round (median of `rounds`). Then training steps with and without `train.py --profile`'s
hooks take turns. The exit code is 1 if a prediction is off by more than 10 % or the hooks cost 2 % or more. Takes eight
minutes on two cores, which nothing else should use.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import tyro
from accelerate.state import AcceleratorState
from pydantic import BaseModel, ConfigDict, Field

from benchmarks.environment import environment, percentiles
from tools.profiling import measure
from tools.profiling.attached import StepProfile
from tools.profiling.session import Session
from tools.runtime.config import RunConfig, read_recipe, validated
from tools.runtime.launch import make_accelerator

_MOST_OFF, _MOST_OVERHEAD = 0.10, 0.02


class ProfilerBenchmark(BaseModel):
    """Check the profiler's predictions and its overhead."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    small: Path
    """Shard set of small images, such as imagenette-112."""

    large: Path
    """Shard set of ImageNet-sized images."""

    rounds: int = Field(7, ge=1)
    """Measurements of everything."""

    seconds: float = Field(0.7, gt=0)
    """Least length of one measurement."""

    hook_seconds: float = Field(30.0, gt=0)
    """Least length of the comparison with and without hooks."""

    threads: int = Field(2, ge=1)
    """DALI threads."""

    only: tuple[str, ...] = ()
    """Names of the cases to run; all by default."""

    out: Path | None = None
    """JSON file for the result."""


def cases(command: ProfilerBenchmark) -> dict[str, tuple[Path, Path, dict[str, Any]]]:
    """Return name to (recipe, data, pipeline settings): bound by the model, by neither, by the loader's work."""
    recipes = Path("recipes")
    return {
        "imagenette112 on small images": (
            recipes / "imagenette112.toml",
            command.small,
            {"batch_global": 64},
        ),
        "demo on large images": (recipes / "demo.toml", command.large, {"batch_global": 64}),
        "paper on large images": (recipes / "paper.toml", command.large, {"batch_global": 8}),
    }


def _session(
    command: ProfilerBenchmark, recipe: Path, data: Path, pipeline: dict[str, Any], out: Path
) -> Session:
    settings = read_recipe(recipe)
    settings["model"] = {**settings.get("model", {}), "weights": ""}  # a speed does not depend on them
    settings["pipeline"] = {**settings["pipeline"], **pipeline, "threads": command.threads}
    config = validated(RunConfig, {**settings, "data": data, "out": out}, str(recipe))

    def progress(name: str) -> None:
        print(f"\r\x1b[K{name}", end="", file=sys.stderr, flush=True)

    AcceleratorState._reset_state(reset_partial_state=True)  # the cases differ in precision
    return Session(
        config, make_accelerator(config), rounds=command.rounds, seconds=command.seconds, progress=progress
    )


def overhead(session: Session, seconds: float) -> dict[str, dict[str, float]]:
    """Return how much longer, as a fraction, a training step takes with the hooks: by the clock and in CPU time.

    Steps with and without take turns (ABBA), so that what the machine does besides falls on both alike.
    """
    work = session.work
    session.watch.detach()

    def timed(with_hooks: bool) -> tuple[float, float]:
        watch = (
            StepProfile(work.net, work.optimizer, work.loader, steps=2**62, skip=0) if with_hooks else None
        )
        cpu_s, began_s = time.process_time(), time.perf_counter()
        work.train_step(work.loader)
        if watch is not None:
            watch.step()
        found = time.perf_counter() - began_s, time.process_time() - cpu_s
        if watch is not None:
            watch.detach()
        return found

    session.progress("what the hooks cost")
    session.drain(work.loader)
    pairs: list[tuple[float, float]] = []  # of wall time, of CPU time
    end_s = time.perf_counter() + seconds
    while len(pairs) < session.rounds or time.perf_counter() < end_s:
        steps = [timed(with_hooks) for with_hooks in (True, False, False, True)]
        wall, cpu = (((a + d) / (b + c) - 1) for a, b, c, d in zip(*steps, strict=True))
        pairs.append((wall, cpu))
    wall_pairs, cpu_pairs = zip(*pairs, strict=True)
    return {"wall": percentiles([*wall_pairs]), "cpu": percentiles([*cpu_pairs]), "turns": {"n": len(pairs)}}


def main() -> None:
    """Run the benchmark, print a table, and fail if the profiler is not good enough."""
    command = tyro.cli(ProfilerBenchmark, description=ProfilerBenchmark.__doc__)
    rows: dict[str, Any] = {}
    for name, (recipe, data, pipeline) in cases(command).items():
        if command.only and name not in command.only:
            continue
        session = _session(command, recipe, data, pipeline, Path("runs/profiler-benchmark"))
        try:
            found = measure.run(session, with_checkpoint=False, with_parts=False)
            cost = overhead(session, command.hook_seconds)
        finally:
            session.close()
        v = found.verdict
        rows[name] = {
            "predicted_img_s": v.predicted_img_s,
            "measured_img_s": v.measured_img_s,
            "off": v.predicted_over_measured.p50 - 1,
            "off_p20_p80": [v.predicted_over_measured.p20 - 1, v.predicted_over_measured.p80 - 1],
            "limiting": v.limits[0].stage,
            "overhead": cost,
            "profile": found.model_dump(mode="json", exclude={"timeline", "environment"}),
        }
        print(
            f"\r\x1b[K{name:32s} predicted {v.predicted_img_s:8.2f}  measured {v.measured_img_s:8.2f} img/s  "
            f"({100 * rows[name]['off']:+.1f} %)  limiting: {v.limits[0].stage}; hooks cost "
            f"{100 * cost['wall']['p50']:+.2f} % (CPU time {100 * cost['cpu']['p50']:+.2f} %)",
            flush=True,
        )
    if command.out:
        command.out.write_text(
            json.dumps({**environment(), "rounds": command.rounds, "rows": rows}, indent=1) + "\n"
        )
    good = all(
        abs(row["off"]) <= _MOST_OFF and row["overhead"]["wall"]["p50"] < _MOST_OVERHEAD
        for row in rows.values()
    )
    sys.exit(not good)


if __name__ == "__main__":
    main()
