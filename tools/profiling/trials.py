"""Measures cheap changes against the run as it is, in turns: what `--try` does."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from tools.profiling import memory
from tools.profiling.clock import Probe
from tools.profiling.session import Session
from tools.profiling.table import Trial
from tools.runtime.config import RunConfig


def changed(config: RunConfig, **pipeline: Any) -> RunConfig:
    """Return the configuration with other pipeline settings."""
    return config.model_copy(update={"pipeline": config.pipeline.model_copy(update=pipeline)})


def candidates(config: RunConfig, ranks: int, samples: int) -> Iterator[tuple[str, RunConfig]]:
    """Yield (the change in words, the changed configuration) for what only needs another loader."""
    pipeline = config.pipeline
    cores = len(os.sched_getaffinity(0))
    for threads in (pipeline.threads * 2, pipeline.threads // 2):
        if 1 <= threads <= 2 * cores:
            yield f"--pipeline.threads {threads}", changed(config, threads=threads)
    for prefetch in (2 * pipeline.prefetch, 1):
        if prefetch != pipeline.prefetch:
            yield f"--pipeline.prefetch {prefetch}", changed(config, prefetch=prefetch)
    batch = pipeline.batch_per_gpu or pipeline.batch_global // ranks
    micros = pipeline.batch_global // (ranks * batch)
    mixes = bool(pipeline.mixup or pipeline.cutmix)  # neighbours: an odd number of images is refused
    for size in (batch * 2, batch // 2):
        if size >= 2 and not (mixes and size % 2) and size * ranks * micros <= samples:
            yield (
                f"--pipeline.batch-per-gpu {size} --pipeline.batch-global {size * ranks * micros}",
                changed(config, batch_per_gpu=size, batch_global=size * ranks * micros),
            )


def _in(dtype: torch.dtype, session: Session) -> Callable[[], int]:
    """Return a training step whose forward pass runs under autocast."""
    work = session.work

    def step() -> int:
        plain = work.net.forward

        def forward(*arguments: Any, **named: Any) -> Any:
            with torch.autocast(work.device.type, dtype):
                return plain(*arguments, **named)

        work.net.forward = forward
        try:
            return work.train_step(work.loader)
        finally:
            work.net.forward = plain

    return step


def run(session: Session) -> Iterator[Trial]:
    """Measure each candidate in turns with the run as it is and yield what it gave; at most two loaders at a time."""
    work, config = session.work, session.config
    for words, variant in candidates(config, work.ranks, len(session.store)):
        loader, note = session.loader_that_fits(variant)
        if loader is None:
            yield Trial(change=words, rate_img_s=None, baseline_img_s=None, note=note)
            continue
        try:
            trial = _beside(session, session.training_probe(words, variant, loader))
        finally:
            loader.close()
            memory.release()
        yield trial
    if config.precision == "fp32":
        probe = session.training_probe("--precision bf16", config, work.loader)
        probe.step = _in(torch.bfloat16, session)
        yield _beside(session, probe)


def _beside(session: Session, probe: Probe) -> Trial:
    """Measure a probe in turns with the run as it is."""
    baseline = session.training_probe("as it is", session.config, session.work.loader)
    if not session.measured(baseline, probe):
        return Trial(
            change=probe.name, rate_img_s=None, baseline_img_s=None, note="ran out of memory in training"
        )
    return Trial(change=probe.name, rate_img_s=session.rate(probe), baseline_img_s=session.rate(baseline))
