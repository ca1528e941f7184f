"""Opens a trained model: a checkpoint folder of a run, or what tools/export.py writes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import safetensors.torch
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import nn

from model.config import ModelConfig
from model.fitting import fitting
from model.naming import mismatch
from model.vqsa import VQSA

WEIGHTS_FILE = "model.safetensors"


_STEP = re.compile(r"step_(\d+)(\.replaced)?")


def load(path: str | Path, trunk: nn.Module | None = None) -> VQSA:
    """Open a trained model in evaluation mode, on the CPU. Nothing in the files is executed.

    Args:
        path: a checkpoint folder (run.json, model.safetensors), a run folder (its newest checkpoint is
            taken), or an exported folder (config.json, model.safetensors).
        trunk: for a model that was built with a trunk of one's own: a module of the same kind; its tensors are
            replaced.

    Returns:
        The model; `classes` are the names of its outputs.

    Raises:
        FileNotFoundError: no trained model there.
        ValueError: the configuration is not valid, or the tensors are not those of the configuration: lists
            missing, unexpected and differently shaped ones, and says which recipe they are of.
    """
    folder = _folder(Path(path))
    described = folder / ("run.json" if (folder / "run.json").is_file() else "config.json")
    try:
        record: dict[str, Any] = json.loads(described.read_text())
        settings = record["config"]["model"] if described.name == "run.json" else record["model"]
        classes = tuple(str(name) for name in record["classes"])
        # Every tensor comes from the folder, so the weights training started from are not needed.
        config = ModelConfig.model_validate({**settings, "weights": ""})
    except (json.JSONDecodeError, KeyError, TypeError, ValidationError) as error:
        raise ValueError(
            f"{described} does not describe a model ({type(error).__name__}: {error}); "
            "use another checkpoint, or export it again with this version"
        ) from None
    try:
        state = safetensors.torch.load_file(folder / WEIGHTS_FILE)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS_FILE} is damaged ({error}); use an older checkpoint") from None
    net = VQSA(config, len(classes), trunk)
    problem = mismatch({name: tensor.shape for name, tensor in net.state_dict().items()}, state)
    if problem:
        raise ValueError(
            f"{folder / WEIGHTS_FILE} does not fit {described.name} beside it: {problem}; "
            f"the two are from different models{fitting(state)}"
        )
    net.load_state_dict(state)
    net.classes = classes
    return net.eval()


def _folder(path: Path) -> Path:
    # One that is still being written ends in .tmp; one that another of its step takes the place of in .replaced.
    named = ((_STEP.fullmatch(p.name), p) for p in (path / "checkpoints").glob("step_*"))
    by_step = sorted((int(found[1]), not found[2], p) for found, p in named if found)
    for folder in (path, *(p for *_, p in reversed(by_step))):
        described = (folder / "run.json").is_file() or (folder / "config.json").is_file()
        if described and (folder / WEIGHTS_FILE).is_file():
            return folder
    raise FileNotFoundError(
        f"no trained model in {path}; give a run folder, a checkpoint folder such as "
        "runs/x/checkpoints/step_001200, or a folder that tools/export.py made"
    )
