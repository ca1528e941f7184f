"""Parameters and multiply-accumulates of a model, by part: in full, and as the paper counts them.

The paper's totals (Table 2 and its supplement's Table 2) are those of the trunk with batch normalisation, the
three attention matrices on two tokens, one linear layer and the codebook's weights, cut to two digits:
neither the search nor the fusing layer is in them.

MACs are per image, of one forward pass. Batch normalisation counts two per element, as counting tools do.
Pooling, activations, softmax and losses are left out, and so are the attention products of a timm transformer.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.vqsa import VQSA

CountMode = Literal["full", "paper"]


class Part(NamedTuple):
    """One row of the count."""

    name: str
    parameters: int
    macs: int


def count(
    config: ModelConfig, num_classes: int, image_size: int = 224, mode: CountMode = "full"
) -> list[Part]:
    """Count a configuration's parameters and MACs without allocating it.

    Args:
        config: the model; pretrained weights are not looked for.
        num_classes: classes.
        image_size: side of the square image in pixels.
        mode: "full", or "paper": without the codebook's search and without the layer that fuses two tokens.

    Returns:
        Parts, in the order in which data meets them; the last, "total", is their sum.

    Raises:
        ValueError: an unknown mode.
    """
    if mode not in ("full", "paper"):
        raise ValueError(f"count knows the modes 'full' and 'paper', got {mode!r}")
    with torch.device("meta"):
        model = VQSA(config.model_copy(update={"weights": ""}), num_classes).eval()
    conv, norm, positions = _trunk_macs(model, image_size)
    dim = model.trunk.dim
    of_norms = sum(_parameters(module) for module in model.trunk.modules() if _is_norm(module))
    parts = [
        Part("trunk layers", _parameters(model.trunk) - of_norms, conv),
        Part("trunk normalisation", of_norms, norm),
    ]
    if model.codebook is not None:
        searches = positions if config.quantise == "map" else 1
        search = searches * config.codes * dim if mode == "full" else 0
        parts.append(Part("codebook", model.codebook.codes.numel(), search))
    if model.attention is not None:
        # Three matrices on two tokens; in full also the 2×2 scores and the mixing of the values.
        mixing = 2 * 4 * dim if mode == "full" else 0
        parts.append(Part("attention", _parameters(model.attention), 3 * 2 * dim * dim + mixing))
    if model.head.fuse is not None and mode == "full":
        parts.append(Part("head fuse", _parameters(model.head.fuse), 2 * dim * dim))
    parts.append(Part("head fc", _parameters(model.head.fc), dim * num_classes))
    return [*parts, Part("total", sum(p.parameters for p in parts), sum(p.macs for p in parts))]


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.BatchNorm2d | nn.LayerNorm | nn.GroupNorm)


def _trunk_macs(model: VQSA, image_size: int) -> tuple[int, int, int]:
    """MACs of convolutions and linear layers, of normalisation, and the number of positions of the map."""
    conv = norm = 0

    def after(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal conv, norm
        if isinstance(module, nn.Conv2d | nn.Linear):
            conv += output.numel() * module.weight[0].numel()
        else:
            norm += 2 * output.numel()

    hooks = [
        module.register_forward_hook(after)
        for module in model.trunk.modules()
        if isinstance(module, nn.Conv2d | nn.Linear) or _is_norm(module)
    ]
    map_1Dhw = model.trunk(torch.empty(1, 3, image_size, image_size, device="meta"))
    for hook in hooks:
        hook.remove()
    return conv, norm, map_1Dhw.shape[2] * map_1Dhw.shape[3]
