"""Checkpoints that are either whole or not there.

A checkpoint is a folder `step_001200/` with model.safetensors (the weights to use: the averaged ones where the run
keeps an average, and then trained.safetensors has the others), training.pt (what else the next step depends on, see
state.py) and run.json: step, resolved configuration, code version, sizes and checksums of the files. It is written
under a temporary name, flushed to disk and renamed; run.json is written last, so a folder whose files do not match
it is damaged. One that takes the place of another of the same step moves that aside first (`.replaced`), so that at
every moment one of the two stands there whole; `complete` finds either.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import shutil
import subprocess
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from accelerate import Accelerator
from pydantic import BaseModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

log = logging.getLogger(__name__)

Files = dict[str, Any]
"""Contents of a checkpoint's files by name: named tensors for .safetensors, anything torch.save takes for .pt."""

RUN_FILE = "run.json"
MODEL_FILE = "model.safetensors"
TRAINED_FILE = "trained.safetensors"
TRAINING_FILE = "training.pt"
BEST_LINK = "best"
_REPLACED = ".replaced"
# torch.save reports a full disk as a plain RuntimeError of its zip writer.
_TORCH_WRITER = ("PytorchStreamWriter", "inline_container", "unexpected pos")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    step: int
    config: dict[str, Any]
    classes: list[str]
    commit: str
    processes: int | None
    """Of the run that wrote it; None: not known, as of old ones."""
    checksum: str
    """xxh3-64 of run.json, which has the checksums of the other files."""

    def model_state(self) -> dict[str, torch.Tensor]:
        """Return the tensors of the model to use, on the CPU; loading executes nothing."""
        state: dict[str, torch.Tensor] = load_file(self.path / MODEL_FILE)
        return state


@functools.cache
def code_version() -> str:
    """Return the git commit of the code, with "+dirty" if it was changed since; "unknown" outside git.

    Of the first call: ask when the process starts, since the files may change while it runs.
    """
    root = Path(__file__).resolve().parents[2]
    try:
        command = [
            "git",
            "-C",
            str(root),
            "describe",
            "--always",
            "--abbrev=12",
            "--dirty=+dirty",
            "--exclude=*",
        ]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(path: Path) -> str:
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write(
    folder: Path,
    files: Files,
    *,
    step: int,
    config: BaseModel,
    classes: list[str],
    processes: int | None = None,
) -> None:
    """Write the checkpoint of a step into `folder`, in the calling process alone.

    Args:
        processes: number of them in the run, to be told to who goes on from it.

    Raises:
        OSError, RuntimeError, SafetensorError: it could not be written; nothing of it is left.
    """
    final = folder / f"step_{step:06d}"
    partial = folder / f"step_{step:06d}.tmp"
    replaced = folder / f"step_{step:06d}{_REPLACED}"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        for name, content in files.items():
            if name.endswith(".safetensors"):
                save_file(content, partial / name)
            else:
                torch.save(content, partial / name)
            _sync(partial / name)
        record = {
            "step": step,
            "commit": code_version(),
            "processes": processes,
            "classes": classes,
            "files": {name: (partial / name).stat().st_size for name in files},
            "xxh3_64": {name: _checksum(partial / name) for name in files},
            "config": config.model_dump(mode="json"),
        }
        (partial / RUN_FILE).write_text(json.dumps(record, indent=1))
        _sync(partial / RUN_FILE)
        _sync(partial)
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        partial.rename(final)
        _sync(folder)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


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
            for left in folder.glob(f"step_*{_REPLACED}"):
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
            write(
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
        for old in complete(self._folder)[: -self._keep]:
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
        verify(read(path))
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


def read(path: Path) -> Checkpoint:
    """Open a checkpoint folder.

    Raises:
        FileNotFoundError: if it is none.
        ValueError: if it is damaged: which file, and what size it should have.
    """
    record_file = path / RUN_FILE
    if not record_file.is_file():
        raise FileNotFoundError(
            f"{path} is not a checkpoint (it has no {RUN_FILE}); give a folder such as runs/x/checkpoints/step_001200"
        )
    try:
        text = record_file.read_bytes()
        record = json.loads(text)
        files, step = dict(record["files"]), int(record["step"])
        checkpoint = Checkpoint(
            path,
            step,
            record["config"],
            record["classes"],
            record["commit"],
            record.get("processes"),
            xxhash.xxh3_64_hexdigest(text),
        )
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{record_file} is damaged ({error}); use an older checkpoint") from None
    for name, size in files.items():
        found = (path / name).stat().st_size if (path / name).is_file() else "nothing"
        if found != size:
            raise ValueError(
                f"{path / name} should have {size} bytes, found {found}; use an older checkpoint"
            )
    return checkpoint


def verify(checkpoint: Checkpoint) -> None:
    """Compare every file with its checksum.

    Raises:
        ValueError: naming the first file that changed since it was written.
    """
    record = json.loads((checkpoint.path / RUN_FILE).read_text())
    for name, wanted in record.get("xxh3_64", {}).items():
        found = _checksum(checkpoint.path / name)
        if found != wanted:
            raise ValueError(
                f"{checkpoint.path / name} has checksum {found} and was written with {wanted}; use an older checkpoint"
            )


def present(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder that were finished once, whole or damaged, by name."""
    return sorted(path for path in folder.glob("step_*") if path.suffix != ".tmp")


def complete(folder: Path) -> list[Checkpoint]:
    """Return the whole checkpoints in a folder, oldest first; damaged ones are named in the log.

    One that was moved aside comes before the one of its step that took its place.
    """
    found = []
    for path in present(folder):
        try:
            found.append(read(path))
        except (ValueError, FileNotFoundError) as error:
            log.warning("skipping a damaged checkpoint: %s", error)
    return sorted(found, key=lambda checkpoint: (checkpoint.step, checkpoint.path.suffix != _REPLACED))


def newest_sound(folder: Path) -> Checkpoint | None:
    """Return the newest checkpoint of a folder whose checksums hold, or None; others are named in the log."""
    for checkpoint in reversed(complete(folder)):
        try:
            verify(checkpoint)
        except ValueError as error:
            log.warning("skipping a damaged checkpoint: %s", error)
        else:
            return checkpoint
    return None


def newest(path: Path) -> Checkpoint:
    """Return the checkpoint at `path`: itself, or the newest of a run folder.

    Raises:
        FileNotFoundError: if there is none.
    """
    if (path / RUN_FILE).is_file():
        return read(path)
    found = complete(path / "checkpoints")
    if not found:
        raise FileNotFoundError(
            f"no checkpoint in {path / 'checkpoints'}; give a run folder that has one, or a checkpoint folder"
        )
    return found[-1]
