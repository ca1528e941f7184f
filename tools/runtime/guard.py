"""Notices a step whose loss or gradients are not finite, without waiting for the device after every step."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

import shards
from pipeline.loader import TrainingLoader

MOST_SKIPS = 40
"""Steps in a row that fp16's loss scale may cost. It starts at 2**16 and is halved by each, and fp16's smallest number
is 2**-24: gradients that overflow at every scale do not overflow because of it."""


class FiniteGuard:
    """Reads a step's verdict two steps later, when it has long arrived; on the CPU at once."""

    _LAG = 2

    def __init__(self) -> None:
        self._images: list[tuple[Tensor, Tensor]] = []  # of the step that is going on: sample ids, flags
        self._verdicts: deque[tuple[int, Tensor, Tensor, Any]] = deque()
        self.bad_step: int | None = None
        """First optimiser step (from 1) that was not finite on this process."""
        self.bad_samples: list[int] = []
        """Samples of that step whose own logits or features were not finite."""
        self.overflowed = False
        """Whether that step is bad because it is the last of MOST_SKIPS."""
        self.skips = 0
        """Steps in a row, up to the newest, that were skipped because fp16 gradients overflowed."""

    def images(self, sample_id: Tensor, finite: Tensor) -> None:
        """Note a micro-batch: sample ids on the CPU, and for each a bool on the device."""
        self._images.append((sample_id, finite))

    def step(self, step: int, finite: Tensor, *, skipped: bool = False) -> None:
        """End a step.

        Args:
            step: its number, from 1.
            finite: bool scalar on the device, whether its losses and gradients were finite.
            skipped: whether the optimiser left it out because scaled gradients overflowed; one such step is nothing
                bad, MOST_SKIPS in a row are.
        """
        self.skips = self.skips + 1 if skipped else 0
        if self.skips >= MOST_SKIPS and self.bad_step is None:
            self.bad_step, self.overflowed = step, True
        sample_id = torch.cat([ids for ids, _ in self._images])
        flags = torch.cat([finite.view(1), *(flags for _, flags in self._images)])
        self._images = []
        if not flags.is_cuda:
            self._judge(step, sample_id, flags)
            return
        host = torch.empty(flags.shape, dtype=torch.bool, pin_memory=True).copy_(flags, non_blocking=True)
        arrived: Any = torch.cuda.Event()  # type: ignore[no-untyped-call, unused-ignore]
        arrived.record()
        self._verdicts.append((step, sample_id, host, arrived))
        self._read(len(self._verdicts) - self._LAG)

    def drain(self) -> None:
        """Read all verdicts, waiting for them: before something is made of the weights."""
        self._read(len(self._verdicts))

    def _read(self, count: int) -> None:
        for _ in range(count):
            step, sample_id, flags, arrived = self._verdicts.popleft()
            arrived.synchronize()
            self._judge(step, sample_id, flags)

    def _judge(self, step: int, sample_id: Tensor, flags: Tensor) -> None:
        if self.bad_step is None and not bool(flags.all()):
            self.bad_step = step
            self.bad_samples = sorted(set(sample_id[~flags[1:]].tolist()))


def batch_again(loader: TrainingLoader, step: int, store: shards.Store) -> list[dict[str, Any]]:
    """Return this process's part of the global batch of optimiser step `step` (from 1), made again from the stream.

    The loader stands somewhere else afterwards.

    Returns:
        one dict per accumulation part: images, clean_images, augmented (AugMix's views), labels, sample_id, position,
        kind, severity, sample; tensors on the CPU.
    """
    loader.seek(step - 1)
    parts = []
    for _ in range(loader.micros):
        batch = next(loader)
        part = {name: getattr(batch, name) for name in ("images", "clean_images", "labels", "sample_id", "position",
                                                        "kind", "severity")}  # fmt: skip
        part = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in part.items()}
        part["augmented"] = [view.cpu() for view in batch.augmented]
        parts.append({**part, "step": step, "sample": [store.location(i) for i in batch.sample_id.tolist()]})
    return parts


def _written(parts: list[dict[str, Any]], path: Path) -> str:
    """Write a batch for torch.load and say where it is, or why it is nowhere: that must not hide what went wrong."""
    try:
        torch.save(parts, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError of many lines
        with suppress(OSError):
            path.unlink(missing_ok=True)
        return f"its batch could not be written: {path}: {str(error).splitlines()[0]}"
    return f"its batch is in {path}"


def not_finite(
    accelerator: Accelerator,
    guard: FiniteGuard,
    folder: Path,
    loader: TrainingLoader,
    store: shards.Store,
    waiting: Callable[[], AbstractContextManager[object]],
) -> FloatingPointError:
    """Save the batch of the step that went wrong and return what to raise; called on every process.

    Every process gets the words of all: whichever ends first says where it happened.

    Args:
        waiting: entered while the loader is waited for.
    """
    mine = []
    if guard.bad_step is not None:
        with waiting():
            parts = batch_again(loader, guard.bad_step, store)
        ids = [i for part in parts for i in part["sample_id"].tolist()]
        rank = accelerator.process_index
        batch = _written(parts, folder / f"not_finite_step_{guard.bad_step:06d}_rank{rank}.pt")
        named = guard.bad_samples or ids
        whose = "this process's" if accelerator.num_processes == 1 else f"rank {rank}'s"
        where = f"samples {named[:16]} of {whose} {len(ids)}; {batch}"
        mine = [(guard.bad_step, guard.overflowed, bool(guard.bad_samples), where)]
    said = gather_object(mine)
    step, overflowed = min((number, overflowed) for number, overflowed, _, _ in said)
    # Gradients are averaged: one process's image makes those of all bad.
    culprits = [words for *_, named, words in said if named] or [words for *_, words in said]
    saved = "Nothing was saved since"
    what = f"loss or gradients of step {step} are not finite"
    if overflowed:
        what = f"fp16 gradients of step {step} and the {MOST_SKIPS - 1} before overflow at any loss scale"
        saved = "Nothing was learnt from them"
    return FloatingPointError(
        f"{what}: {'; '.join(culprits)}. {saved}; --resume auto meets this step again: give it --allow-changes with a "
        "lower optim.lr, an optim.clip_norm or another precision"
    )
