"""One profile from beginning to end: measures everything in turns, and draws the conclusions."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from pipeline.readahead import Damage, ReadAhead, ReadBatch
from tools.profiling import graphs, model_stages, reading
from tools.profiling.clock import Probe, measure
from tools.profiling.machine import cores_of, matmul_peak_tflops, spin
from tools.profiling.model_stages import CHECKPOINT
from tools.profiling.session import Session
from tools.profiling.suggest import suggestions, worth_resizing
from tools.profiling.table import Machine, Profile, Span, Spread, Stage, Verdict
from tools.profiling.verdict import GPU, limits, loads, predicted_img_s
from tools.runtime.config import flatten
from tools.runtime.device import loader_device_id
from tools.runtime.environment import environment

_TIMELINE_STEPS = 6
_CHECKPOINTS = 3
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def run(session: Session, *, with_checkpoint: bool = True, with_parts: bool = True) -> Profile:
    """Measure every stage, the loader, the model and both, and return the profile.

    Args:
        with_checkpoint: write checkpoints and time them.
        with_parts: also what is only shown: single corruption kinds, the graph's stages combined, smaller images.
    """
    work, config, gpu = session.work, session.config, session.gpu
    reads = _some_batches(session)
    cut = graphs.GraphStages(config.pipeline, reads, loader_device_id(work.device))
    try:
        parts = [*reading.probes(session.reader)]
        parts += [Probe("feed", cut.until("feed").step)] if gpu else cut.alone(with_kinds=with_parts)
        parts += cut.combined() if gpu or with_parts else []
        if with_parts and worth_resizing(config.pipeline, session.store):
            smaller = [graphs.stored_smaller(read, graphs.SMALL_SIDE) for read in reads]
            parts.append(cut.decode_of(smaller, graphs.DECODE_SMALL))
        calls = {"codebook search": work.search(), "copy to GPU": work.copy(), "AugMix": work.augmix()}
        if work.ranks > 1:
            calls["all-reduce"] = work.all_reduce
        extra = [Probe(name, call, device=True) for name, call in calls.items() if call is not None]
        whole = [
            session.loader_probe(),
            session.model_probe("model alone", lambda: work.train_step(work.synthetic)),
            session.both_probe(),
        ]
        if work.ranks > 1:
            whole.append(session.model_probe("not averaged", work.unsynchronised_step))
        cores = Probe("cores", spin)
        cold = session.reader.cold(max(3, session.rounds), session.progress)
        resident = session.reader.resident()
        measure(
            [*parts, *extra, *whole, cores],
            rounds=session.rounds,
            seconds=session.seconds,
            agree=session.agree,
            progress=session.progress,
        )
    finally:
        cut.close()
    checkpoint_s = _checkpoints(session) if with_checkpoint else []

    def stages_of(turns: Sequence[int]) -> list[Stage]:
        measured, beside = (
            {probe.name: probe.of_rounds(turns) for probe in probes} for probes in (parts, extra)
        )
        alone, not_averaged = (
            [session.steps[name][1 + turn] for turn in turns] if session.steps[name] else []
            for name in ("model alone", "not averaged")
        )
        found = reading.stages(measured, cold, resident)
        found += graphs.stages(measured, gpu)
        return found + model_stages.stages(
            alone,
            work.loader.micros * work.batch,
            extra=beside,
            unsynchronised=not_averaged,
            checkpoint_s=checkpoint_s,
            checkpoint_every=config.checkpoint_every,
            gpu=gpu,
        )

    def predicted(turns: Sequence[int]) -> float:
        counted = [stage for stage in stages_of(turns) if stage.name != CHECKPOINT]
        return predicted_img_s(counted, cores_of(cores.of_rounds(turns)), work.ranks)

    everything = range(session.rounds)
    both = whole[2]
    off = [predicted([turn]) * both.readings[turn].wall_s / work.ranks for turn in everything]
    rates = {probe.name: session.rate(probe) for probe in whole[:3]}
    return _conclude(
        session, stages_of(everything), rates, cores_of(cores), predicted(everything), Spread.of(off)
    )


def _some_batches(session: Session) -> list[ReadBatch]:
    """Return planned batches with their bytes, read as the loader reads; enough to stand for all."""
    ahead = ReadAhead(
        session.work.records, session.reader.plan_at, Damage(session.store, "replace"), threads=1, depth=1
    )
    try:
        return [ahead.read(number) for number in range(graphs.sample_batches(session.work.batch))]
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


def _conclude(
    session: Session,
    found: list[Stage],
    rates: dict[str, Spread],
    cores: float,
    predicted: float,
    predicted_over_measured: Spread,
) -> Profile:
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
    wall_s, waited_s, cpu_s = (sum(column) for column in zip(*session.wholes[1:], strict=True))
    gpu_s = loads(found, cores)[GPU]
    saving_s = sum(s.wall_s.p50 for s in found if s.name == CHECKPOINT and s.wall_s is not None)
    whole_rate = 1 / (1 / rate + saving_s / work.ranks)
    verdict = Verdict(
        predicted_img_s=predicted,
        measured_img_s=rate,
        predicted_over_measured=predicted_over_measured,
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
