"""Turns the authors' published checkpoint into one of ours, or ours into theirs.

python tools/import_released.py best.pth runs/released --classes SHARDS
python tools/import_released.py runs/x best.pth --reverse
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
import tyro
from pydantic import BaseModel, ConfigDict
from safetensors.torch import save_file

import shards
from model.backbone import read_tensors
from model.config import TrunkName
from model.released import from_released, to_released
from tools.runtime import checkpoint
from tools.runtime.config import RunConfig, read_recipe, validated

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "released.toml"


class ImportCommand(BaseModel):
    """Translate between the authors' checkpoint (best.pth) and a checkpoint folder."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    source: tyro.conf.Positional[Path]
    """The authors' file; with --reverse a run or checkpoint folder."""

    out: tyro.conf.Positional[Path]
    """Checkpoint folder to make; with --reverse the file to write."""

    classes: Path | None = None
    """Shard set whose classes the outputs are, or a text file with one class per line, in the order of the
    outputs (sorted wnids for ImageNet). Unset: "0", "1", …"""

    trunk: TrunkName = "resnet50"
    """Trunk that the authors' code was run with."""

    reverse: bool = False
    """From ours to theirs."""


def import_released(command: ImportCommand) -> checkpoint.Checkpoint:
    """Write the checkpoint folder and return it; its configuration is the recipe `released`, n the tensor's.

    It holds the model only: evaluation reads it, but a run cannot be resumed from it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the tensors are not theirs, the number of classes differs, or the folder exists.
    """
    _refuse_existing(command.out)
    config = validated(RunConfig, read_recipe(RECIPE), str(RECIPE))
    wanted = config.model.model_copy(update={"trunk": command.trunk})
    try:
        model_config, state = from_released(read_tensors(command.source), wanted)
    except ValueError as error:
        raise ValueError(f"{command.source}: {error}") from None
    outputs = state["head.fc.weight"].shape[0]
    classes = [str(i) for i in range(outputs)] if command.classes is None else _classes(command.classes)
    if len(classes) != outputs:
        raise ValueError(f"{command.classes} has {len(classes)} classes, {command.source} {outputs} outputs")

    partial = command.out.with_name(command.out.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    weights = partial / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, weights)
    record = {
        "step": 0,
        "commit": checkpoint.code_version(),
        "classes": classes,
        "files": {weights.name: weights.stat().st_size},
        "config": config.model_copy(update={"model": model_config}).model_dump(mode="json"),
    }
    (partial / checkpoint.RUN_FILE).write_text(json.dumps(record, indent=1))
    partial.rename(command.out)
    return checkpoint.read(command.out)


def export_released(command: ImportCommand) -> None:
    """Write a checkpoint's tensors as the authors' code loads them: a torch file {"model": …, "epoch": 0}.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: their network cannot hold the model, or the file exists.
    """
    _refuse_existing(command.out)
    found = checkpoint.newest(command.source)
    config = validated(RunConfig, found.config, str(found.path))
    torch.save({"model": to_released(found.model_state(), config.model), "epoch": 0}, command.out)


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise ValueError(f"{out} is already there; choose another place or remove it")


def _classes(path: Path) -> list[str]:
    if path.is_dir():
        return list(shards.open(path).classes)
    if not path.is_file():
        raise FileNotFoundError(f"--classes: no shard set and no text file at {path}")
    return path.read_text().splitlines()


def main() -> None:
    """Run the command line."""
    try:
        command = tyro.cli(ImportCommand, description=ImportCommand.__doc__)
        if command.reverse:
            export_released(command)
        else:
            made = import_released(command)
            print(f"{made.path}: {made.config['model']['codes']} codes, {len(made.classes)} classes")
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"import_released.py: {error}")


if __name__ == "__main__":
    main()
