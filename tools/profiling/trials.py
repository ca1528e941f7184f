"""Measures cheap changes against the run as it is, in turns: what `--try` does."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from tools.profiling import memory
from tools.profiling.clock import measure
from tools.profiling.machine import available_bytes
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
    for size in (batch * 2, batch // 2):
        if size >= 2 and size * ranks * micros <= samples:
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


def run(session: Session) -> list[Trial]:
    """Measure the candidates beside the run as it is and return what each gave."""
    work, config = session.work, session.config
    baseline = session.training_probe("as it is", config, work.loader)
    probes, loaders = [baseline], []
    try:
        for words, variant in candidates(config, work.ranks, len(session.store)):
            batch = variant.pipeline.batch_per_gpu or 0
            if batch > work.batch and not session.gpu:
                need = memory.estimate(variant, len(session.store.classes))
                if need.bytes(batch) > available_bytes() // work.ranks:
                    continue
            loader = work.make_loader(variant)
            loaders.append(loader)
            probes.append(session.training_probe(words, variant, loader))
        if config.precision == "fp32":
            probe = session.training_probe("--precision bf16", config, work.loader)
            probe.step = _in(torch.bfloat16, session)
            probes.append(probe)
        measure(
            probes,
            rounds=session.rounds,
            seconds=session.seconds,
            agree=session.agree,
            progress=session.progress,
        )
    finally:
        for loader in loaders:
            loader.close()

    before = session.rate(baseline)
    return [
        Trial(change=probe.name, rate_img_s=session.rate(probe), baseline_img_s=before)
        for probe in probes[1:]
    ]
