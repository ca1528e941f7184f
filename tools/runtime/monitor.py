"""The monitor set: validation while training, the best score so far, and when to stop early."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import broadcast
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn

import shards
from pipeline.config import PipelineConfig
from pipeline.corruptions.kinds import KINDS, SEVERITIES, suggest
from pipeline.loader import EvaluationBatch, EvaluationLoader
from pipeline.philox import I64, Purpose, as_u64, draw
from tools.runtime import scoring
from tools.runtime.device import loader_device_id
from tools.runtime.optim import autocast_dtype
from tools.runtime.results import CLEAN


class MonitorConfig(BaseModel):
    """What is measured on the validation shards while training, and what follows from it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    images: int = Field(0, ge=0)
    """Validation images used: a fixed choice drawn from the seed; 0: all."""

    kinds: tuple[str, ...] = ()
    """Corruptions that the monitor set is also scored on; none: clean only. Noise is drawn from the seed."""

    severities: tuple[int, ...] = (3,)
    """Severities of those corruptions."""

    patience: int = Field(0, ge=0)
    """Stop after this many validations in a row without a better score; 0: never."""

    @model_validator(mode="after")
    def _cells_exist(self) -> MonitorConfig:
        for kind in self.kinds:
            if kind not in KINDS or kind == "identity":
                raise ValueError(f"monitor.kinds: unknown corruption {kind!r}{suggest(kind, KINDS)}")
        if not set(self.severities) <= set(SEVERITIES) or not self.severities:
            raise ValueError(f"monitor.severities must be among 1..5, got {list(self.severities)}")
        return self


def monitored(samples: int, images: int, seed: int) -> I64:
    """Return the ids of the monitor set, ascending: all samples, or `images` of them chosen by the seed."""
    every = np.arange(samples, dtype=np.int64)
    if not images or images >= samples:
        return every
    key_N = as_u64(draw(seed, 0, every, Purpose.MONITOR)[:, :2])
    return np.sort(np.argsort(key_N, kind="stable")[:images]).astype(np.int64)


Waiting = Callable[[Callable[[], str]], AbstractContextManager[object]]


class _Batches:
    """The batches of a process, as long as all processes want to go on.

    Args:
        loader: this process's.
        rounds: the most batches any process has; all ask one another once less.
        waiting: entered while the loader is waited for, given what says what is being read.
        stopped: asked after every batch but the last, by all processes together, and true for all at the same batch.
    """

    def __init__(
        self, loader: EvaluationLoader, rounds: int, waiting: Waiting, stopped: Callable[[], bool]
    ) -> None:
        self._loader, self._rounds = loader, rounds
        self._waiting, self._stopped = waiting, stopped
        self.complete = False

    def __iter__(self) -> Iterator[EvaluationBatch]:
        batches = iter(self._loader)
        for number in range(self._rounds):
            with self._waiting(self._loader.reading):
                batch = next(batches, None)
            if batch is not None:
                yield batch
            # After the last one the scores are there: a stop can wait until they are reported.
            if number + 1 < self._rounds and self._stopped():
                return
        self.complete = True


def validate(
    accelerator: Accelerator,
    net: nn.Module,
    store: shards.Store,
    *,
    monitor: MonitorConfig,
    pipeline: PipelineConfig,
    precision: str,
    seed: int,
    waiting: Waiting = lambda reading: nullcontext(),
    stopped: Callable[[], bool] = lambda: False,
    close_after_error: Callable[[Callable[[], None]], object] = lambda close: close(),
) -> dict[str, float] | None:
    """Score the monitor set over all processes, each image decoded once; accuracies in percent.

    Images and noise are functions of the seed: two validations differ by the model alone. Called on every process.

    Args:
        waiting: entered while the loader is waited for, given what says what is being read.
        stopped: asked after every batch but the last, as often on every process; true on all or none: give up.
        close_after_error: given what closes the loader, which after an error may wait for ever for a read that hangs:
            to be called when the other processes know. At once by default.

    Returns:
        None if `stopped` said so; else val_top1_pct, val_top5_pct (clean), val_corrupted_top1_pct (mean over the
        corrupted cells, where there are any) and val_score_pct, by which the best checkpoint is chosen: the mean of
        clean and corrupted top-1.
    """
    if accelerator.num_processes > 1:
        # Each process has updated its running statistics from its own images; a checkpoint has the first one's.
        for buffer in net.buffers():
            broadcast(buffer)
    batch = pipeline.batch_per_gpu or pipeline.batch_global // accelerator.num_processes
    sample_id = monitored(len(store), monitor.images, seed)
    loader = EvaluationLoader(
        store,
        pipeline,
        batch=batch,
        rank=accelerator.process_index,
        ranks=accelerator.num_processes,
        device_id=loader_device_id(accelerator.device),
        sample_id=sample_id,
    )
    batches = _Batches(loader, -(-len(sample_id) // (batch * accelerator.num_processes)), waiting, stopped)
    names = [(CLEAN, 0), *((kind, severity) for kind in monitor.kinds for severity in monitor.severities)]
    try:
        counts = scoring.score(
            accelerator.unwrap_model(net),
            batches,
            pipeline,
            names,
            seed=seed,
            flavour="hendrycks",
            device=accelerator.device,
            precision=autocast_dtype(precision),
        )
    except BaseException:
        close_after_error(loader.close)
        raise
    loader.close()
    if not batches.complete:
        return None
    total = accelerator.reduce(counts.to(accelerator.device), "sum").cpu()
    clean, *corrupted = scoring.cells_from_counts(names, total)
    scores = {"val_top1_pct": 100 * clean.top1, "val_top5_pct": 100 * clean.top5}
    scores["val_score_pct"] = scores["val_top1_pct"]
    if corrupted:
        mean_pct = 100 * sum(cell.top1 for cell in corrupted) / len(corrupted)
        scores["val_corrupted_top1_pct"] = mean_pct
        scores["val_score_pct"] = (scores["val_top1_pct"] + mean_pct) / 2
    return scores


class Best:
    """The best validation so far; saved in every checkpoint."""

    def __init__(self) -> None:
        self.score_pct = -1.0
        self.step = 0
        self.since = 0
        """Validations since the best one."""

    def update(self, score_pct: float, step: int) -> bool:
        """Take in a validation; returns whether it is the best."""
        if score_pct > self.score_pct:
            self.score_pct, self.step, self.since = score_pct, step, 0
            return True
        self.since += 1
        return False

    def line(self, scores: Mapping[str, float]) -> str:
        """Return the scores of the newest validation as the line people watch."""
        best = f"best {self.score_pct:.2f}% at step {self.step}" if self.since else "best so far"
        return (
            f"val top1 {scores['val_top1_pct']:.2f}%  top5 {scores['val_top5_pct']:.2f}%  "
            f"score {scores['val_score_pct']:.2f}%  {best}"
        )

    def state_dict(self) -> dict[str, float]:
        """Return score, step and validations since."""
        return {"score_pct": self.score_pct, "step": self.step, "since": self.since}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        self.score_pct, self.step, self.since = state["score_pct"], int(state["step"]), int(state["since"])
