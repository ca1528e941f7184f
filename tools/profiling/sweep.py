"""Rate over batch size, DALI threads and processes: where more stops helping."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from pipeline.loader import TrainingLoader
from tools.profiling import memory
from tools.profiling.clock import Probe
from tools.profiling.session import Session
from tools.profiling.table import Point, Spread, Sweep
from tools.profiling.trials import changed

_ENOUGH = 0.9
_LIMIT_S = 1800
_TOO_FEW = "more images than the set has"


Found = tuple[int, Spread | None, str]
"""A setting's value, images per second of all processes, and why there is none."""


def knee(rates: Sequence[tuple[int, float]]) -> int | None:
    """Return the smallest setting that reaches 90 % of the best rate; None without any rate."""
    if not rates:
        return None
    best = max(rate for _, rate in rates)
    return min(value for value, rate in rates if rate >= _ENOUGH * best)


def finish(setting: str, found: Sequence[Found], samples: int) -> Sweep:
    """Return the sweep with efficiency, knee and hours per epoch.

    Args:
        setting: "batch", "threads" or "ranks".
        found: (value, images per second of all processes, note), ascending.
        samples: images of an epoch.
    """
    rates = [(value, rate.p50) for value, rate, _ in found if rate is not None]
    best = max((rate for _, rate in rates), default=0.0)
    points = []
    for value, rate, note in found:
        if rate is None:
            points.append(Point(value=value, rate_img_s=None, note=note))
            continue
        first_value, first_rate = rates[0]
        ideal = best if setting == "batch" else first_rate * value / first_value
        points.append(
            Point(
                value=value,
                rate_img_s=rate,
                efficiency=rate.p50 / ideal,
                hours_per_epoch=samples / rate.p50 / 3600,
                note=note,
            )
        )
    return Sweep.model_validate({"setting": setting, "points": points, "knee": knee(rates)})


def _measured(session: Session, value: int, probe: Probe) -> Found:
    if not session.measured(probe):
        return value, None, "ran out of memory"
    return value, session.rate(probe), ""


def over_threads(session: Session) -> Iterator[Sweep]:
    """Measure the loader alone with 1, 2, 4 … DALI threads, up to the cores there are; yields what there is so far."""
    cores = len(os.sched_getaffinity(0))
    found: list[Found] = []
    for value in sorted({*(2**i for i in range(cores.bit_length()) if 2**i <= cores), cores}):
        loader = session.work.make_loader(changed(session.config, threads=value))

        def step(loader: TrainingLoader = loader) -> int:
            for _ in range(loader.micros):
                next(loader)
            return loader.micros * loader.batch_per_rank

        def prepare(loader: TrainingLoader = loader, step: Callable[[], int] = step) -> None:
            session.drain(loader, step)

        try:
            point = _measured(session, value, Probe(f"threads {value}", step, prepare=prepare))
        finally:
            loader.close()
            memory.release()
        found.append((value, point[1], point[2] or "loader alone"))
        yield finish("threads", found, session.samples)


def over_batches(session: Session) -> Iterator[Sweep]:
    """Measure training steps at a quarter to four times the batch, one step after each micro-batch; likewise."""
    work, ranks = session.work, session.work.ranks
    found: list[Found] = []
    for value in sorted({max(2, work.batch * 2**i // 4) for i in range(5)}):
        found.append(
            _at_batch(session, value) if value * ranks <= session.samples else (value, None, _TOO_FEW)
        )
        yield finish("batch", found, session.samples)


def _at_batch(session: Session, value: int) -> Found:
    variant = changed(session.config, batch_per_gpu=value, batch_global=value * session.work.ranks)
    loader, note = session.loader_that_fits(variant)
    if loader is None:
        return value, None, note
    try:
        return _measured(session, value, session.training_probe(f"batch {value}", variant, loader))
    finally:
        loader.close()
        memory.release()


def most_ranks() -> int:
    """Return how many processes this machine can run: its GPUs, or its cores where it has none."""
    return torch.cuda.device_count() if torch.cuda.is_available() else len(os.sched_getaffinity(0))


def over_ranks(session: Session, arguments: Sequence[str]) -> Iterator[Sweep]:
    """Measure training on 1, 2, 4 … processes, each with the batch of one: starts this program again; likewise.

    Args:
        arguments: the command line of this program, without what only the parent does.
    """
    most = most_ranks()
    values = sorted({*(2**i for i in range(most.bit_length()) if 2**i <= most), most})
    found: list[Found] = []
    batch = session.work.batch
    program = Path(__file__).resolve().parents[1] / "profile_throughput.py"
    for value in values:
        session.progress(f"{value} processes")
        if value * batch <= session.samples:
            found.append(_on_ranks(session, value, program, arguments))
        else:
            found.append((value, None, _TOO_FEW))
        yield finish("ranks", found, session.samples)


def _on_ranks(session: Session, value: int, program: Path, arguments: Sequence[str]) -> Found:
    batch = session.work.batch
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "rate.json"
        command = [
            *launcher(value), str(program), *arguments,
            "--rate-only", str(answer), "--pipeline.batch-per-gpu", str(batch),
            "--pipeline.batch-global", str(batch * value), "--rounds", str(session.rounds),
            "--seconds", str(session.seconds),
        ]  # fmt: skip
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                env=_surroundings(session.gpu, value),
                timeout=_LIMIT_S,
            )
            said = (done.stderr or done.stdout).strip().rsplit("\n", 1)[-1]
        except subprocess.TimeoutExpired:
            said = f"no answer after {_LIMIT_S} s"
        if answer.is_file():
            return value, Spread.model_validate(json.loads(answer.read_text())), ""
        return value, None, f"failed: {said}"


def launcher(ranks: int) -> list[str]:
    """Return the beginning of a command that starts a program on so many processes of this machine."""
    if ranks == 1:
        return [sys.executable]
    return [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(ranks),
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
    ]  # fmt: skip


def _surroundings(gpu: bool, ranks: int) -> dict[str, str]:
    surroundings = dict(os.environ)
    if not gpu:
        # Accelerate's own --cpu starts one process whatever number is asked for.
        surroundings["ACCELERATE_USE_CPU"] = "true"
        # Each process would start a thread per core.
        surroundings["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // ranks))
    return surroundings
