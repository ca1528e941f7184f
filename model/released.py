"""Names of the authors' published checkpoint (github.com/yangzhou321/VQSA, train_sa.py) and back.

Their network keeps the trunk as a sequence, so its parts have numbers; the attention matrices stand at the
top. Both sides multiply a token by the matrix (M·x), stack the code before the feature and feed the head the
code's token first, so no tensor is transposed or reordered.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

import torch
from torch import Tensor

from model.config import ModelConfig, TrunkName
from model.fitting import fitting
from model.naming import mismatch
from model.vqsa import VQSA

_TRUNK = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}  # 2 and 3 hold no tensor
_OTHERS = {
    "attention.K": "K",
    "attention.Q": "Q",
    "attention.V": "V",
    "codebook.codes": "codebook.embeddings.weight",
    "head.fuse.weight": "fc_fuse.0.weight",
    "head.fuse.bias": "fc_fuse.0.bias",
    "head.fc.weight": "fc.weight",
    "head.fc.bias": "fc.bias",
}

# Choices that change what a model computes from the same tensors, as their network has them.
_CHOICES = {
    "quantise": "pooled",
    "metric": "cosine",
    "fusion": "concat",
    "attention": True,
    "attention_scale": "sqrt2",
    "released_eval_scale": True,
    "stem": "imagenet",
    "top_k": 1,
    "centre": False,
}

_NOT_THEIRS = ("codebook.initialised", "codebook.upkeep.")


def from_released(state: Mapping[str, Tensor], config: ModelConfig) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Give the tensors of the authors' checkpoint our names.

    Args:
        state: their tensors; "module." before the names is taken off.
        config: the authors' variant (recipe `released`); its number of codes is replaced by the tensor's.

    Returns:
        The configuration with the checkpoint's number of codes, and a complete `state_dict` of its VQSA.

    Raises:
        ValueError: the tensors are not those of the variant: lists missing, unexpected and differently shaped
            ones.
    """
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    for name in ("codebook.embeddings.weight", "fc.weight"):
        if name not in state or state[name].ndim != 2:
            raise ValueError(
                f"not a checkpoint of the authors' VQSA: it has no matrix {name!r} among its {len(state)} "
                f"tensors{fitting(state)}"
            )
    config = config.model_copy(update={"codes": state["codebook.embeddings.weight"].shape[0]})
    names = _names(config, state["fc.weight"].shape[0])
    problem = mismatch(dict(names.values()), state)
    if problem:
        raise ValueError(
            f"the tensors are not those of the authors' VQSA on {config.trunk}: {problem}; "
            "choose the trunk that it was trained with"
        )
    ours = {name: state[theirs] for name, (theirs, _) in names.items()}
    return config, {**ours, "codebook.initialised": torch.tensor(True)}


def to_released(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Give a `state_dict` of the authors' variant their names; the reverse of `from_released`.

    Raises:
        ValueError: another variant, of which their network would compute something else (names the options), or
            a `state_dict` that is not the configuration's.
    """
    others = [
        f"{name} {getattr(config, name)!r} instead of {theirs!r}"
        for name, theirs in _CHOICES.items()
        if getattr(config, name) != theirs
    ]
    if others:
        raise ValueError(
            f"the authors' network would not compute this model, which has {', '.join(others)}; "
            "train one by recipe released to export it"
        )
    if config.trunk not in get_args(TrunkName):
        raise ValueError(f"the authors' network has a torchvision trunk; this model's is {config.trunk!r}")
    names = _names(config, state["head.fc.weight"].shape[0])
    wanted = {name: shape for name, (_, shape) in names.items()}
    problem = mismatch(wanted, {name: t for name, t in state.items() if not name.startswith(_NOT_THEIRS)})
    if problem:
        raise ValueError(f"the tensors are not those of the configuration: {problem}")
    return {theirs: state[name] for name, (theirs, _) in names.items()}


def _names(config: ModelConfig, classes: int) -> dict[str, tuple[str, torch.Size]]:
    """Our name of every tensor, with their name and the shape."""
    with torch.device("meta"):
        own = VQSA(
            config.model_copy(update={"weights": "", "ema": 0.0, "revive_after": 0}), classes
        ).state_dict()
    names = {}
    for name, tensor in own.items():
        if name.startswith(_NOT_THEIRS):
            continue
        theirs = _OTHERS.get(name)
        if theirs is None:
            _, part, rest = name.split(".", 2)
            theirs = f"resnet_layer.{_TRUNK[part]}.{rest}"
        names[name] = (theirs, tensor.shape)
    return names
