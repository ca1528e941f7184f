"""Says which configuration a set of named tensors is of, for the error that it is not the wanted one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

import torch
from torch import Tensor

from model.config import TrunkName


def fitting(state: Mapping[str, Tensor]) -> str:
    """Return "; they are of …" with the recipe, for the end of a message; nothing where that cannot be told."""
    found = _kind(state)
    return f"; {found}" if found else ""


def _kind(state: Mapping[str, Tensor]) -> str:
    if "codebook.embeddings.weight" in state:
        return "they are of the authors' published network: tools/import_released.py translates them"
    if "head.fc.weight" not in state:
        trunk = _trunk(state)
        return f"they are a plain {trunk} with its classifier: give them as model.weights" if trunk else ""
    trunk = _trunk({name.removeprefix("trunk."): t for name, t in state.items() if name.startswith("trunk.")})
    parts = [f"trunk {trunk}"] if trunk else []
    codes_KD = state.get("codebook.codes")
    if codes_KD is None:
        return f"they are of {', '.join([*parts, 'no codebook'])}: recipe finetune"
    parts.append(f"{codes_KD.shape[0]:,} codes")
    if "attention.K" in state:
        parts.append("fusion 'concat' with attention")
        recipes = "paper, concat_sa, best or released"
    elif "head.fuse.weight" in state:
        parts.append("fusion 'concat' without attention")
        recipes = "concat"
    else:
        parts.append("fusion 'replace' or 'add'")
        recipes = "replace or add"
    kept = [
        name
        for name, key in (("ema", "ema_sum_KD"), ("revive_after", "recent_K"), ("centre", "centre_D"))
        if f"codebook.upkeep.{key}" in state
    ]
    return f"they are of {', '.join([*parts, *kept])}: recipe {recipes} with these"


def _trunk(state: Mapping[str, Tensor]) -> str:
    """The torchvision trunk whose tensors, but for the classifier, are these; "" for none."""
    from model.backbone import TorchvisionTrunk

    shapes = {name: tensor.shape for name, tensor in state.items() if not name.startswith("fc.")}
    for name in get_args(TrunkName):
        with torch.device("meta"):
            if {key: t.shape for key, t in TorchvisionTrunk(name).state_dict().items()} == shapes:
                return str(name)
    return ""
