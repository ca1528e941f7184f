"""The same normalisation as the training graph's, for uint8 crops that are corrupted outside it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from pipeline.config import PipelineConfig


@functools.lru_cache(maxsize=64)
def _scale(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """255 · mean and 255 · std; kept, because a copy from the host would wait for the device every time."""
    return 255 * torch.tensor(mean, device=device), 255 * torch.tensor(std, device=device)


def normalise(images_u8_BHWC: Tensor, config: PipelineConfig) -> Tensor:
    """Return float32 (B, 3, H, W), channels last in memory: (x / 255 - mean) / std per channel."""
    mean_C, std_C = _scale(config.mean, config.std, images_u8_BHWC.device)
    return ((images_u8_BHWC - mean_C) / std_C).permute(0, 3, 1, 2)


def denormalise(images_BCHW: Tensor, config: PipelineConfig) -> Tensor:
    """Return the uint8 (B, H, W, 3) pictures behind a normalised batch."""
    mean_C = torch.tensor(config.mean, device=images_BCHW.device)
    std_C = torch.tensor(config.std, device=images_BCHW.device)
    pixels_BHWC = (images_BCHW.permute(0, 2, 3, 1) * std_C + mean_C) * 255
    return pixels_BHWC.round().clamp(0, 255).to(torch.uint8)
