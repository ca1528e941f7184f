"""Names, dtypes and shapes of every kind's fields and raw noise, in the core's order.

Shapes: H = height, W = width, N = iterations of glass blur.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Parts = tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]


def field_parts(kind: str, height: int, width: int, words: int) -> Parts:
    """Return (name, dtype, shape) of each part of a kind's fields; empty where nothing is drawn.

    `words` is their size in the core, in 32-bit words.
    """
    match kind:
        case "gaussian_noise" | "speckle_noise":
            return (("normal_HWC", torch.float32, (height, width, 3)),)
        case "shot_noise" | "impulse_noise":
            # The bits of a uniform uint32: torch's own uint32 supports few operations.
            return (("uniform_bits_HWC", torch.int32, (height, width, 3)),)
        case "glass_blur":
            iterations = words // (height * width)
            return (("offset_xy_NHW2", torch.int16, (iterations, height, width, 2)),)
        case "motion_blur":
            return (("angle_deg", torch.float32, ()),)
        case "snow":
            return (("layer_HW", torch.uint8, (height, width)),)
        case "frost":
            return (("index", torch.int32, ()), ("row", torch.int32, ()), ("column", torch.int32, ()))
        case "fog":
            return (("plasma_HW", torch.float32, (height, width)),)
        case "elastic_transform":
            return (
                ("displacement_xy_2HW", torch.float32, (2, height, width)),
                ("affine_points_32", torch.float32, (3, 2)),
            )
        case "spatter":
            return (("mask_HW", torch.float32, (height, width)),)
        case _:
            return ()


def noise_parts(kind: str, height: int, width: int, words: int) -> Parts:
    """Return the parts of the raw noise that a kind's fields are shaped from; ValueError if it has none."""
    match kind:
        case "snow":
            return (("normal_HW", torch.float32, (height, width)), ("angle_deg", torch.float32, ()))
        case "fog":
            # Uniform in [-1, 1), level by level from the coarsest, three n x n fields each.
            return (("uniform", torch.float32, (words,)),)
        case "elastic_transform":
            return (
                ("uniform_xy_2HW", torch.float32, (2, height, width)),
                ("affine_uniform_32", torch.float32, (3, 2)),
            )
        case "spatter":
            return (("normal_HW", torch.float32, (height, width)),)
        case _:
            raise ValueError(f"{kind} has no raw noise apart from its fields; pass fields to apply instead")


def _bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * dtype.itemsize


def pack(values: dict[str, Tensor], parts: Parts, words: int, device: torch.device, what: str) -> Tensor:
    """Lay named tensors end to end as the core's 32-bit words.

    Raises:
        ValueError: a name is missing or unknown, or a shape, dtype or device is wrong.
    """
    names = [name for name, _, _ in parts]
    if sorted(values) != sorted(names):
        raise ValueError(f"{what}: need {names or 'nothing'}, got {sorted(values)}")
    packed = torch.zeros(4 * words, dtype=torch.uint8, device=device)
    at = 0
    for name, dtype, shape in parts:
        value = values[name]
        if tuple(value.shape) != shape or value.dtype != dtype or value.device.type != device.type:
            raise ValueError(
                f"{what}: {name!r} must be {dtype} {shape} on {device}, "
                f"got {value.dtype} {tuple(value.shape)} on {value.device}"
            )
        size = _bytes(dtype, shape)
        packed[at : at + size] = value.contiguous().reshape(-1).view(torch.uint8)
        at += size
    return packed.view(torch.int32)


def unpack(words: Tensor, parts: Parts) -> dict[str, Tensor]:
    """Give names, dtypes and shapes to the core's 32-bit words, without a copy."""
    memory = words.view(torch.uint8)
    out: dict[str, Tensor] = {}
    at = 0
    for name, dtype, shape in parts:
        size = _bytes(dtype, shape)
        out[name] = memory[at : at + size].view(dtype).reshape(shape)
        at += size
    return out
