"""Writes a trained model for use elsewhere: safetensors with config.json, and a torch.export program.

python tools/export.py --checkpoint runs/x --out exported
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
import tyro
from pydantic import BaseModel, ConfigDict
from torch import Tensor

import model
from tools.runtime import checkpoint
from tools.runtime.config import RunConfig, validated

PROGRAM_FILE = "model.pt2"
_TOLERANCE = 1e-5  # of the largest logit


class ExportCommand(BaseModel):
    """Export a checkpoint: config.json and model.safetensors for model.load, model.pt2 for torch.export.load."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    checkpoint: Path
    """Run folder (its newest checkpoint) or checkpoint folder."""

    out: Path
    """Folder to make."""


def export(command: ExportCommand) -> float:
    """Write the folder; returns the largest difference between program and eager model, relative to the logits.

    The program takes any number of images, float32 (B, 3, image_size, image_size), normalised as config.json
    says. It calls the codebook's search by name, so whoever loads it imports `model` first.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: the folder exists, or the program's logits differ from the model's by more than 1e-5.
    """
    if command.out.exists():
        raise ValueError(f"{command.out} is already there; choose another folder or remove it")
    found = checkpoint.newest(command.checkpoint)
    config = validated(RunConfig, found.config, str(found.path))
    net = model.load(found.path)
    partial = command.out.with_name(command.out.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    shutil.copyfile(found.path / "model.safetensors", partial / "model.safetensors")
    record = {
        "model": {**config.model.model_dump(mode="json"), "weights": ""},
        "classes": found.classes,
        "image_size": config.pipeline.image_size,
        "resize_shorter": config.pipeline.resize_shorter,
        "mean": config.pipeline.mean,
        "std": config.pipeline.std,
        "step": found.step,
        "commit": found.commit,
    }
    (partial / "config.json").write_text(json.dumps(record, indent=1) + "\n")

    size = config.pipeline.image_size
    generator = torch.Generator().manual_seed(0)
    # Traced with two images and checked with three: a batch size that got fixed would show.
    traced, checked = (torch.randn(n, 3, size, size, generator=generator) for n in (2, 3))
    batch = torch.export.Dim("batch")
    program = torch.export.export(net, (traced,), dynamic_shapes=({0: batch},))
    torch.export.save(program, partial / PROGRAM_FILE)
    with torch.no_grad():
        eager: Tensor = net(checked)
        again = torch.export.load(partial / PROGRAM_FILE).module()(checked)
    difference = float((again - eager).abs().max() / eager.abs().max())
    if not difference <= _TOLERANCE:
        raise ValueError(
            f"the exported program's logits differ from the model's by {difference:.1e}, wanted 1e-5"
        )
    partial.rename(command.out)
    return difference


def main() -> None:
    """Run the command line."""
    try:
        command = tyro.cli(ExportCommand, description=ExportCommand.__doc__)
        difference = export(command)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"export.py: {error}")
    print(f"{command.out}: logits of the program within {difference:.1e} of the model's")


if __name__ == "__main__":
    main()
