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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from pydantic import BaseModel
from safetensors.torch import load_file, save_file

log = logging.getLogger(__name__)

Files = dict[str, Any]
"""Contents of a checkpoint's files by name: named tensors for .safetensors, anything torch.save takes for .pt."""

RUN_FILE = "run.json"
MODEL_FILE = "model.safetensors"
TRAINED_FILE = "trained.safetensors"
TRAINING_FILE = "training.pt"
BEST_LINK = "best"
REPLACED = ".replaced"


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
    replaced = folder / f"step_{step:06d}{REPLACED}"
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
    return sorted(found, key=lambda checkpoint: (checkpoint.step, checkpoint.path.suffix != REPLACED))


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
