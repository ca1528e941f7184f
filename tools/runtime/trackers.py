"""TensorBoard and others, through Accelerate; what they cannot write costs the record, not the run."""

from __future__ import annotations

import importlib.util
import logging
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker, WandBTracker
from torch import Tensor

from pipeline.config import PipelineConfig
from pipeline.corruptions.kinds import KINDS
from pipeline.loader import TrainingBatch
from pipeline.normalise import denormalise

log = logging.getLogger(__name__)

_PICTURES = 16


def checked(names: Sequence[str]) -> list[str]:
    """Return the trackers' names for Accelerate.

    Raises:
        ValueError: one of them is not installed.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"trackers has {name!r}, which is not installed; pip install {name}, or leave it out"
            )
    return list(names)


class Trackers:
    """Accelerate's trackers, on the first process; after a write error they are left alone.

    TensorBoard's writer raises the error of its own thread at a later call, and never recovers from it.

    Args:
        out: the run's folder. TensorBoard writes to tensorboard/ in it, W&B to wandb/.
        step: step the run continues from, 0 where it starts. TensorBoard then hides what an earlier process wrote of
            later steps. A W&B run goes on under the id that stands in wandb_id.
    """

    def __init__(self, accelerator: Accelerator, out: Path, step: int) -> None:
        self._accelerator = accelerator
        self._out = out
        self._broken = False
        for name in (str(getattr(kind, "value", kind)) for kind in accelerator.log_with):
            self._try(partial(self._start, name, step))

    def _start(self, name: str, step: int) -> None:
        # Accelerate's init_trackers has one name for all: TensorBoard's folder would be W&B's project.
        tracker: Any
        if name == "tensorboard":
            tracker = TensorBoardTracker("tensorboard", self._out, purge_step=step + 1)
        else:
            project = os.environ.get("WANDB_PROJECT", "vqsa")
            run = {
                "name": self._out.name,
                "id": self._wandb_id(step),
                "resume": "allow",
                "dir": str(self._out),
            }
            tracker = WandBTracker(project, **run)
        tracker.start()
        self._accelerator.trackers.append(tracker)

    def _wandb_id(self, step: int) -> str:
        path = self._out / "wandb_id"
        if self._accelerator.is_main_process and not (step and path.is_file()):
            self._out.mkdir(parents=True, exist_ok=True)
            path.write_text(secrets.token_hex(8) + "\n")
        return path.read_text().strip() if self._accelerator.is_main_process else ""

    def _try(self, action: Callable[[], object]) -> None:
        if self._broken:
            return
        try:
            action()
        except OSError as error:
            self._broken = True
            log.error("trackers in %s stop: %s; metrics.jsonl goes on", self._out, error)

    def log(self, record: Mapping[str, Any], step: int) -> None:
        """Write the numbers of a record."""
        self._try(lambda: self._accelerator.log(dict(record), step=step))

    def pictures(self, batch: TrainingBatch, config: PipelineConfig, step: int) -> None:
        """Write the first images of a batch as the model sees them, named by what was done to them."""
        if not self._accelerator.is_main_process:
            return
        pictures_u8 = denormalise(batch.images[:_PICTURES], config).cpu().numpy()
        names = [
            f"{KINDS[kind]} {severity}" if kind else "clean"
            for kind, severity in zip(batch.kind.tolist(), batch.severity.tolist(), strict=True)
        ][:_PICTURES]
        for tracker in self._accelerator.trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            self._try(partial(tracker.log_images, {"batch": pictures_u8}, step=step, **layout))
        self._try(lambda: self._accelerator.log({"batch_corruptions": ", ".join(names)}, step=step))

    def code_usage(self, usage_K: Tensor | None, step: int) -> None:
        """Write the histogram of how often each code was chosen, where there are codes."""
        if usage_K is None:
            return
        for tracker in self._accelerator.trackers:
            if tracker.name == "tensorboard" and self._accelerator.is_main_process:
                counts = usage_K.cpu().numpy()
                self._try(partial(tracker.writer.add_histogram, "code_usage", counts, global_step=step))

    def close(self) -> None:
        """Write what is left and close."""
        self._try(self._accelerator.end_training)
