"""Checkpoints that are either whole or not there.

A checkpoint is a folder `step_001200/` with what Accelerate saves (model.safetensors, optimizer, random
states, registered objects) and `run.json`: step, resolved configuration, code version, file sizes. It is
written under a temporary name, flushed to disk and renamed; run.json is written last, so a folder whose
files do not match it is damaged.
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
from accelerate import Accelerator
from pydantic import BaseModel
from safetensors import SafetensorError
from safetensors.torch import load_file

log = logging.getLogger(__name__)

RUN_FILE = "run.json"
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

    def model_state(self) -> dict[str, torch.Tensor]:
        """Return the model's tensors, on the CPU; loading executes nothing."""
        state: dict[str, torch.Tensor] = load_file(self.path / "model.safetensors")
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


def _everyone(accelerator: Accelerator, mine: bool) -> bool:
    """Whether `mine` is true on every process."""
    flag = torch.tensor([int(mine)], device=accelerator.device)
    return bool(int(accelerator.reduce(flag, "sum")) == accelerator.num_processes)


def save(
    accelerator: Accelerator, folder: Path, *, step: int, config: BaseModel, classes: list[str], keep: int
) -> bool:
    """Write the checkpoint of a step and delete all but the newest `keep`; called on every process.

    Returns whether it was written. A write error (a full disk) is logged and leaves the older
    checkpoints as they were: the run can go on.
    """
    final = folder / f"step_{step:06d}"
    partial = folder / f"step_{step:06d}.tmp"
    main = accelerator.is_main_process

    def attempt(action: Any) -> bool:
        try:
            action()
        except (OSError, RuntimeError, SafetensorError) as error:
            if type(error) is RuntimeError and not any(mark in str(error) for mark in _TORCH_WRITER):
                raise
            log.error("checkpoint of step %d not written to %s: %s", step, folder, error)
            return _everyone(accelerator, False)
        return _everyone(accelerator, True)

    def prepare() -> None:
        if main:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()

    def publish() -> None:
        if not main:
            return
        files = {p.name: p.stat().st_size for p in partial.iterdir()}
        record = {
            "step": step,
            "commit": code_version(),
            "classes": classes,
            "files": files,
            "config": config.model_dump(mode="json"),
        }
        (partial / RUN_FILE).write_text(json.dumps(record, indent=1))
        for path in partial.iterdir():
            _sync(path)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        _sync(folder)

    written = attempt(prepare) and attempt(lambda: accelerator.save_state(str(partial))) and attempt(publish)
    if main:
        if not written:
            log.error("%s", _free_space(folder))
            shutil.rmtree(partial, ignore_errors=True)
        else:
            for old in complete(folder)[:-keep]:
                shutil.rmtree(old.path)
    accelerator.wait_for_everyone()
    return written


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
        record = json.loads(record_file.read_text())
        files, step = dict(record["files"]), int(record["step"])
        checkpoint = Checkpoint(path, step, record["config"], record["classes"], record["commit"])
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{record_file} is damaged ({error}); use an older checkpoint") from None
    for name, size in files.items():
        found = (path / name).stat().st_size if (path / name).is_file() else "nothing"
        if found != size:
            raise ValueError(
                f"{path / name} should have {size} bytes, found {found}; use an older checkpoint"
            )
    return checkpoint


def complete(folder: Path) -> list[Checkpoint]:
    """Return the whole checkpoints in a folder, oldest first; damaged ones are named in the log."""
    found = []
    for path in sorted(folder.glob("step_*")):
        if path.suffix == ".tmp":
            continue
        try:
            found.append(read(path))
        except (ValueError, FileNotFoundError) as error:
            log.warning("skipping a damaged checkpoint: %s", error)
    return sorted(found, key=lambda checkpoint: checkpoint.step)


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
