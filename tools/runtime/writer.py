"""Writes the checkpoints of a run, in the foreground or in a thread; keeps the newest and the best."""

from __future__ import annotations

import logging
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from accelerate import Accelerator
from pydantic import BaseModel
from safetensors import SafetensorError

from tools.runtime import checkpoint
from tools.runtime.checkpoint import BEST_LINK, REPLACED, Files

log = logging.getLogger(__name__)

# torch.save reports a full disk as a plain RuntimeError of its zip writer.
_TORCH_WRITER = ("PytorchStreamWriter", "inline_container", "unexpected pos")


class Writer:
    """Writes the checkpoints of a run, in the foreground or in a thread, and deletes old ones.

    A write error (a full disk) is logged and leaves the older checkpoints as they were: the run can go on.

    Args:
        folder: where the checkpoints stand.
        config, classes: what every checkpoint records.
        keep: newest checkpoints that stay, beside the best.
        background: let `save` return while the files are being written.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path,
        *,
        config: BaseModel,
        classes: list[str],
        keep: int,
        background: bool,
    ) -> None:
        self._accelerator = accelerator
        self._folder = folder
        self._config, self._classes, self._keep = config, classes, keep
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="vqsa-checkpoint") if background else None
        self._pending: Future[bool] | None = None
        self._written = True  # whether the newest checkpoint was; only the first process knows
        self.background = background
        accelerator.wait_for_everyone()  # another may still read the one that it goes on from
        if accelerator.is_main_process and folder.is_dir():
            for left in folder.glob("step_*.tmp"):  # of a run that was killed while it wrote
                shutil.rmtree(left, ignore_errors=True)
            for left in folder.glob(f"step_*{REPLACED}"):
                _keep_one(left, left.with_suffix(""))

    def save(self, files: Files, step: int, *, best: int, last: bool) -> bool:
        """Write a checkpoint; called on every process.

        Args:
            files: TrainingState.snapshot's; those of the first process are written.
            best: step whose checkpoint is kept as the best; 0: none.
            last: the run ends after it, so wait for it.

        Returns:
            whether it was written; in the background, whether the one before was. The same on every process.
        """
        self._collect()
        if self._accelerator.is_main_process:
            if self._thread is not None and not last:
                self._pending = self._thread.submit(self._attempt, files, step, best)
            else:
                self._written = self._attempt(files, step, best)
        return self._agreed(self._written)

    def settled(self, best: int) -> bool:
        """Wait for the newest checkpoint and let `best` point to a step's, if not 0; called on every process.

        Returns:
            whether the newest checkpoint was written; the same on every process.
        """
        self._collect()
        if self._accelerator.is_main_process and self._written:
            self._tidy(best)
        return self._agreed(self._written)

    def finish(self) -> None:
        """Wait for what is being written; called on every process."""
        self._collect()
        if self._thread is not None:
            self._thread.shutdown()

    def _collect(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            self._written = pending.result()

    def _agreed(self, written: bool) -> bool:
        flag = torch.tensor([int(written)], device=self._accelerator.device)
        return bool(int(self._accelerator.reduce(flag, "sum")) == self._accelerator.num_processes)

    def _attempt(self, files: Files, step: int, best: int) -> bool:
        try:
            checkpoint.write(
                self._folder,
                files,
                step=step,
                config=self._config,
                classes=self._classes,
                processes=self._accelerator.num_processes,
            )
        except (OSError, RuntimeError, SafetensorError) as error:
            if type(error) is RuntimeError and not any(mark in str(error) for mark in _TORCH_WRITER):
                raise
            log.error("checkpoint of step %d not written to %s: %s", step, self._folder, error)
            log.error("%s; training goes on with the checkpoints there are", _free_space(self._folder))
            return False
        self._tidy(best)
        return True

    def _tidy(self, best: int) -> None:
        """Point to the best and delete old ones; what fails costs neither the checkpoint nor the run."""
        try:
            if best:
                _link(self._folder, best)
            self._prune(best)
        except OSError as error:
            log.error("checkpoints in %s not tidied up: %s", self._folder, error)

    def _prune(self, best: int) -> None:
        # If the newest best could not be written, `best` still names the one before.
        kept = (self._folder / BEST_LINK).resolve()
        for old in checkpoint.complete(self._folder)[: -self._keep]:
            if old.step != best and old.path.resolve() != kept:
                shutil.rmtree(old.path)


def _keep_one(aside: Path, final: Path) -> None:
    """Keep the checkpoint that took the place of one moved aside, unless it is damaged and the other is whole.

    Then the run goes on from the other.
    """
    if final.exists() and (_whole(final) or not _whole(aside)):
        shutil.rmtree(aside, ignore_errors=True)
    else:
        if final.exists():
            final.rename(final.with_suffix(".tmp"))
        aside.rename(final)
        shutil.rmtree(final.with_suffix(".tmp"), ignore_errors=True)


def _whole(path: Path) -> bool:
    try:
        checkpoint.verify(checkpoint.read(path))
    except (ValueError, OSError) as error:
        log.warning("%s: %s", path.name, error)
        return False
    return True


def _link(folder: Path, step: int) -> None:
    """Let `best` point to a step's checkpoint, if that is there."""
    if not (folder / f"step_{step:06d}").is_dir():
        return
    partial = folder / f"{BEST_LINK}.tmp"
    partial.unlink(missing_ok=True)
    partial.symlink_to(f"step_{step:06d}")
    partial.replace(folder / BEST_LINK)


def _free_space(folder: Path) -> str:
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    return f"{shutil.disk_usage(existing).free / 2**20:.0f} MiB free in {existing}"
