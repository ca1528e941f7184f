"""One optimiser step from one global batch, in as many parts as the loader gives it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from model.codebook import unchanged
from pipeline.loader import TrainingBatch
from pipeline.mixing import draw_mix
from tools.runtime.config import RunConfig
from tools.runtime.guard import FiniteGuard
from tools.runtime.meter import Meter
from tools.runtime.optim import gradient_norm
from tools.runtime.targets import MicroBatch, consistency, prepare


class Batches(Protocol):
    """What a step needs of a loader: the number of micro-batches of a global batch, and the next of them."""

    @property
    def micros(self) -> int: ...

    def __next__(self) -> TrainingBatch: ...


def global_batch(
    loader: Batches,
    meter: Meter,
    waiting: Callable[[], AbstractContextManager[object]],
    note: Callable[[TrainingBatch], None] | None,
) -> Iterator[TrainingBatch]:
    """Yield this process's part of one global batch; the time spent waiting for it goes to the meter."""
    for _ in range(loader.micros):
        began_s = time.perf_counter()
        with waiting():
            batch = next(loader)
        meter.wait(time.perf_counter() - began_s)
        if note is not None:
            note(batch)
        yield batch


def learning_mode(net: Any, config: RunConfig) -> None:
    """Put the model in training mode; a frozen trunk stays as in evaluation, with its statistics."""
    net.train()
    if config.optim.freeze_trunk:
        net.trunk.eval()


def train_step(
    accelerator: Accelerator,
    net: nn.Module,
    optimizer: Any,
    loader: Batches,
    meter: Meter,
    config: RunConfig,
    *,
    step: int = 0,
    waiting: Callable[[], AbstractContextManager[object]] = nullcontext,
    note: Callable[[TrainingBatch], None] | None = None,
    guard: FiniteGuard | None = None,
) -> None:
    """Make one optimiser step; nothing waits for the device, but for fp16's loss scale.

    Args:
        net, optimizer: as `accelerator.prepare` returned them.
        step: number of the global batch, from 0: what mixup and CutMix draw from.
        waiting: entered while the loader is waited for.
        note: called with each micro-batch before it is trained on.
        guard: told whether everything was finite.
    """
    inner: Any = accelerator.unwrap_model(net)
    learning_mode(inner, config)
    mix = draw_mix(config.pipeline, config.seed, step)
    smoothing = config.loss.label_smoothing
    parts: Iterator[MicroBatch] = (
        prepare(batch, mix, classes=inner.num_classes, smoothing=smoothing)
        for batch in global_batch(loader, meter, waiting, note)
    )
    outputs: list[Any] = []
    totals: list[Tensor] = []
    with unchanged(inner):
        for number, part in enumerate(parts, start=1):
            with nullcontext() if number == loader.micros else accelerator.no_sync(net):
                with accelerator.autocast():
                    output = net(part.images, part.targets)
                terms = {name: getattr(output, name) for name in ("loss", "ce", "vq", "commit")}
                if config.loss.consistency:
                    terms["consistency"] = consistency(output.logits.unflatten(0, (part.views, -1)))
                    terms["loss"] = terms["loss"] + config.loss.consistency * terms["consistency"]
                accelerator.backward(terms["loss"] / loader.micros)
            totals.append(terms["loss"].detach())
            meter.add(terms, output.logits, part.labels)
            if guard is not None:
                guard.images(
                    part.sample_id.repeat(part.views),
                    output.finite & output.logits.detach().isfinite().all(1),
                )
            outputs.append(output)
    norm = gradient_norm(accelerator, net.parameters(), config.optim.clip_norm)
    optimizer.step()
    optimizer.zero_grad()
    inner.update_codebook(*outputs)
    if not accelerator.optimizer_step_was_skipped:
        meter.add_step(norm)
    if guard is not None:
        # With fp16, gradients that overflow are the loss scale's business: the step is skipped and counted.
        values = torch.stack([*totals, *([norm] if accelerator.scaler is None else [])])
        finite = torch.isfinite(values.float()).all()
        guard.step(step + 1, finite, skipped=accelerator.optimizer_step_was_skipped)
