"""Rate over batch size, DALI threads and processes: where more stops helping."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from tools.profiling import memory
from tools.profiling.clock import Probe, measure
from tools.profiling.machine import available_bytes
from tools.profiling.session import Session
from tools.profiling.table import Point, Spread, Sweep
from tools.profiling.trials import changed

_ENOUGH = 0.9
_LIMIT_S = 1800


def knee(rates: Sequence[tuple[int, float]]) -> int | None:
    """Return the smallest setting that reaches 90 % of the best rate; None without any rate."""
    if not rates:
        return None
    best = max(rate for _, rate in rates)
    return min(value for value, rate in rates if rate >= _ENOUGH * best)


def finish(setting: str, found: Sequence[tuple[int, Spread | None, str]], samples: int) -> Sweep:
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


def _rates(session: Session, probes: Sequence[Probe]) -> dict[str, Spread]:
    measure(
        probes, rounds=session.rounds, seconds=session.seconds, agree=session.agree, progress=session.progress
    )
    return {probe.name: session.rate(probe) for probe in probes}


def over_threads(session: Session) -> Sweep:
    """Measure the loader alone with 1, 2, 4 … DALI threads, up to the cores there are."""
    cores = len(os.sched_getaffinity(0))
    values = sorted({*(2**i for i in range(cores.bit_length()) if 2**i <= cores), cores})
    loaders = {value: session.work.make_loader(changed(session.config, threads=value)) for value in values}

    def step(value: int) -> int:
        for _ in range(loaders[value].micros):
            next(loaders[value])
        return loaders[value].micros * loaders[value].batch_per_rank

    def probe(value: int) -> Probe:
        return Probe(
            f"threads {value}",
            lambda: step(value),
            prepare=lambda: session.drain(loaders[value], lambda: step(value)),
        )

    try:
        rates = _rates(session, [probe(value) for value in values])
    finally:
        for loader in loaders.values():
            loader.close()
    return finish("threads", [(v, rates[f"threads {v}"], "loader alone") for v in values], session.samples)


def over_batches(session: Session) -> Sweep:
    """Measure training steps at a quarter to four times the batch, one step after each micro-batch."""
    work, ranks = session.work, session.work.ranks
    values = sorted({max(2, work.batch * 2**i // 4) for i in range(5)})
    found: dict[int, tuple[Spread | None, str]] = {}
    loaders, probes = [], []
    need = None if session.gpu else memory.estimate(session.config, len(session.store.classes))
    try:
        for value in values:
            if value * ranks > session.samples:
                found[value] = (None, "more than the set has")
            elif need is not None and need.bytes(value) > available_bytes() // ranks:
                found[value] = (None, "does not fit in memory")
            else:
                variant = changed(session.config, batch_per_gpu=value, batch_global=value * ranks)
                loader = work.make_loader(variant)
                probe = session.training_probe(f"batch {value}", variant, loader)
                if session.gpu and not _runs(probe):
                    found[value] = (None, "does not fit in memory")
                    loader.close()
                    continue
                loaders.append(loader)
                probes.append(probe)
        for name, rate in _rates(session, probes).items():
            found[int(name.split()[1])] = (rate, "")
    finally:
        for loader in loaders:
            loader.close()
    return finish("batch", [(value, *found[value]) for value in values], session.samples)


def _runs(probe: Probe) -> bool:
    try:
        probe.step()
        fine = True
    except torch.cuda.OutOfMemoryError:
        fine = False
    torch.cuda.empty_cache()
    return fine


def most_ranks() -> int:
    """Return how many processes this machine can run: its GPUs, or its cores where it has none."""
    return torch.cuda.device_count() if torch.cuda.is_available() else len(os.sched_getaffinity(0))


def over_ranks(session: Session, arguments: Sequence[str]) -> Sweep:
    """Measure training on 1, 2, 4 … processes, each with the batch of one: starts this program again.

    Args:
        arguments: the command line of this program, without what only the parent does.
    """
    most = most_ranks()
    values = sorted({*(2**i for i in range(most.bit_length()) if 2**i <= most), most})
    found: list[tuple[int, Spread | None, str]] = []
    batch = session.work.batch
    program = Path(__file__).resolve().parents[1] / "profile_throughput.py"
    for value in values:
        session.progress(f"{value} processes")
        if value * batch > session.samples:
            found.append((value, None, "more images than the set has"))
            continue
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
                found.append((value, Spread.model_validate(json.loads(answer.read_text())), ""))
            else:
                found.append((value, None, f"failed: {said}"))
    return finish("ranks", found, session.samples)


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
