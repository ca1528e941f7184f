"""One profile from beginning to end: measures everything in turns, and draws the conclusions."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch

from pipeline.readahead import Damage, ReadAhead, ReadBatch
from tools.profiling import graphs, model_stages, reading
from tools.profiling.clock import WARM_UP, Probe, measure
from tools.profiling.machine import cores_available, matmul_peak_tflops
from tools.profiling.model_stages import CHECKPOINT
from tools.profiling.session import Session
from tools.profiling.suggest import suggestions, worth_resizing
from tools.profiling.table import Machine, Profile, Span, Spread, Stage, Verdict
from tools.profiling.verdict import limits, predicted_img_s
from tools.runtime.config import flatten
from tools.runtime.device import loader_device_id
from tools.runtime.environment import environment

_TIMELINE_STEPS = 6
_CHECKPOINTS = 3
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def run(session: Session, *, with_checkpoint: bool = True) -> Profile:
    """Measure every stage, the loader, the model and both, and return the profile."""
    work, config, gpu = session.work, session.config, session.gpu
    read = _one_batch(session)
    cut = graphs.GraphStages(config.pipeline, read, loader_device_id(work.device))
    try:
        parts = [*reading.probes(session.reader)]
        parts += [Probe("feed", cut.until("feed").step)] if gpu else cut.alone()
        parts += cut.combined()
        if worth_resizing(config.pipeline, session.store):
            smaller = graphs.stored_smaller(read, graphs.SMALL_SIDE)
            parts.append(cut.decode_of(smaller, graphs.DECODE_SMALL))
        calls = {"codebook search": work.search(), "copy to GPU": work.copy(), "AugMix": work.augmix()}
        if work.ranks > 1:
            calls["all-reduce"] = work.all_reduce
        extra = {name: Probe(name, call, device=True) for name, call in calls.items() if call is not None}
        whole = {
            "loader alone": session.loader_probe(),
            "model alone": session.model_probe("model alone", lambda: work.train_step(work.synthetic)),
            "both": session.both_probe(),
        }
        steps = list(whole.values())
        if work.ranks > 1:
            steps.append(session.model_probe("not averaged", work.unsynchronised_step))
        cores: list[float] = []

        def count_cores() -> int:
            cores.append(cores_available())
            return 1

        cold = session.reader.cold(max(3, session.rounds), session.progress)
        resident = session.reader.resident()
        measure(
            [*parts, *extra.values(), *steps, Probe("cores", count_cores)],
            rounds=session.rounds,
            seconds=session.seconds,
            agree=session.agree,
            progress=session.progress,
        )
    finally:
        cut.close()
    measured = {probe.name: probe for probe in parts}
    found = reading.stages(measured, cold, resident)
    found += graphs.stages(measured, gpu)
    found += model_stages.stages(
        session.steps["model alone"][WARM_UP:],
        work.loader.micros * work.batch,
        extra=extra,
        unsynchronised=session.steps["not averaged"][WARM_UP:],
        checkpoint_s=_checkpoints(session) if with_checkpoint else [],
        checkpoint_every=config.checkpoint_every,
        gpu=gpu,
    )
    rates = {name: session.rate(probe) for name, probe in whole.items()}
    return _conclude(session, found, rates, Spread.of(cores).p50)


def _one_batch(session: Session) -> ReadBatch:
    """Return a planned batch with its bytes, read as the loader reads."""
    ahead = ReadAhead(
        session.work.records, session.reader.plan_at, Damage(session.store, "replace"), threads=1, depth=1
    )
    try:
        return ahead.read(0)
    finally:
        ahead.close()


def _checkpoints(session: Session) -> list[float]:
    """Return the seconds that writing a checkpoint took, a few times, on the disk of the run's folder."""
    session.config.out.mkdir(parents=True, exist_ok=True)
    taken = []
    for turn in range(_CHECKPOINTS):
        session.progress(f"checkpoint, {turn + 1} of {_CHECKPOINTS}")
        folder = tempfile.mkdtemp(prefix="profile-", dir=session.config.out)
        try:
            taken.append(session.work.save(Path(folder)))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return taken


def timeline(session: Session) -> list[Span]:
    """Return what happened when in a few training steps: the loop, and the reader threads."""
    work, watch = session.work, session.watch
    session.drain(work.loader)
    watch.watch(work.loader)
    watch.take()
    work.store.fetches.clear()
    for _ in range(_TIMELINE_STEPS):
        work.train_step(work.loader)
        watch.step()
    start_s, spans = watch.spans()
    watch.take()
    threads: dict[int, int] = {}
    for thread, began_s, ended_s in sorted(work.store.fetches, key=lambda fetch: fetch[1]):
        if ended_s > start_s:
            number = threads.setdefault(thread, len(threads) + 1)
            at_s = max(0.0, began_s - start_s)
            lane = f"reader {number}"
            spans.append(Span(lane=lane, name="read", start_s=at_s, seconds=ended_s - start_s - at_s))
    return spans


def _conclude(session: Session, found: list[Stage], rates: dict[str, Spread], cores: float) -> Profile:
    work, config, gpu = session.work, session.config, session.gpu
    session.progress("matrix products")
    peaks = {
        name: matmul_peak_tflops(work.device, dtype)
        for name, dtype in _DTYPES.items()
        if gpu or name != "fp16"  # nobody trains in fp16 on a CPU
    }
    record = environment()
    machine = Machine(
        device="cuda" if gpu else "cpu",
        name=torch.cuda.get_device_name() if gpu else str(record["cpu"]),
        ranks=work.ranks,
        cores=cores,
        peak_tflops=peaks,
    )
    gflop = work.gflop_per_image()
    rate = rates["both"].p50
    wall_s, waited_s, cpu_s = (sum(column) for column in zip(*session.wholes[WARM_UP:], strict=True))
    gpu_s = sum(s.device_s.p50 for s in found if s.counts and s.device_s is not None)
    saving_s = sum(s.wall_s.p50 for s in found if s.name == CHECKPOINT and s.wall_s is not None)
    whole_rate = 1 / (1 / rate + saving_s / work.ranks)
    verdict = Verdict(
        predicted_img_s=predicted_img_s([s for s in found if s.name != CHECKPOINT], cores, work.ranks),
        measured_img_s=rate,
        with_checkpoints_img_s=whole_rate,
        limits=limits(found, cores, work.ranks),
        data_wait_pct=100 * waited_s / wall_s,
        cpu_busy_pct=100 * cpu_s / wall_s / cores,
        gpu_busy_pct=min(100.0, 100 * gpu_s * rate / work.ranks) if gpu else None,
        mfu_pct=100 * gflop * rate / work.ranks / (1000 * peaks[config.precision])
        if config.precision in peaks
        else 0.0,
        hours_per_epoch=session.samples / whole_rate / 3600,
    )
    warnings = list(session.warnings)
    if work.loader.damaged and not warnings:
        count = len(work.loader.damaged)
        warnings.append(f"{count} damaged records were replaced by grey images; run tools/verify_shards.py")
    if not gpu:
        warnings.append("no GPU here: GPU utilisation is not measured, and times are those of the CPU")
    profile = Profile(
        environment=record,
        settings=flatten(config.model_dump(mode="json")),
        samples=session.samples,
        batch_per_rank=work.batch,
        machine=machine,
        stages=found,
        rates_img_s=rates,
        gflop_per_image=gflop,
        verdict=verdict,
        suggestions=[],
        timeline=timeline(session),
        warnings=warnings,
    )
    return profile.model_copy(update={"suggestions": suggestions(profile, config, session.store)})
