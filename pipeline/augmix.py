"""AugMix: chains of simple operations, mixed with each other and with the image; on the device, drawn per sample.

An image's view is (1 - m) x + m sum_c w_c chain_c(x) with m from Beta(1, 1), w from Dirichlet(1, 1, 1) and each
chain one to three random operations. The operations are AugMix's own nine, which none of ImageNet-C's corruptions
is made of: autocontrast, equalize, posterize, solarize, rotate, shear and translate. All draws are functions of
(seed, epoch, sample id, view). A batch is worked on slot by slot (chain, depth): what is an affine map is sampled
in one call, what is a table of grey levels is looked up in another.

Source: Hendrycks et al., "AugMix", ICLR 2020 (arXiv:1912.02781). Shapes: B = images, S = side, W = 3 chains.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config import PipelineConfig
from pipeline.normalise import normalise
from pipeline.philox import I64, Purpose, below, draw, unit

OPERATIONS = (
    "autocontrast",
    "equalize",
    "posterize",
    "solarize",
    "rotate",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
)
_TABLES = 4  # the first four are tables of grey levels, the others affine maps
_CHAINS, _DEPTH = 3, 3
_SEVERITY = 3.0  # of AugMix's ten: levels are uniform in [0.1, 3)
_BLOCKS = 16  # random blocks of one view; 9 are used

F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Chains:
    """The draws of one view of B images.

    share_B: float64, m. weight_BW: float64, w. depth_BW: int64, 1 to 3. operation_BWd: int64 index into OPERATIONS.
    level_BWd: float64 in [0.1, 3). sign_BWd: +1 or -1.
    """

    share_B: F64
    weight_BW: F64
    depth_BW: I64
    operation_BWd: I64
    level_BWd: F64
    sign_BWd: F64


def draw_chains(seed: int, epoch_B: I64, sample_B: I64, view: int) -> Chains:
    """Draw what is done to each sample for its view number `view`."""
    images = len(sample_B)
    blocks = np.tile(np.arange(9) + view * _BLOCKS, images)
    words = draw(seed, np.repeat(epoch_B, 9), np.repeat(sample_B, 9), Purpose.AUGMIX, blocks).reshape(
        images, 36
    )
    slots = (images, _CHAINS, _DEPTH)
    # Dirichlet(1, 1, 1) is the law of the gaps between two sorted uniforms.
    cuts_B2 = np.sort(unit(words[:, 1:3]), axis=1)
    weight_BW = np.diff(
        np.concatenate([np.zeros((images, 1)), cuts_B2, np.ones((images, 1))], axis=1), axis=1
    )
    return Chains(
        share_B=unit(words[:, 0]),
        weight_BW=weight_BW,
        depth_BW=1 + below(words[:, 3:6], _DEPTH),
        operation_BWd=below(words[:, 6:15], len(OPERATIONS)).reshape(slots),
        level_BWd=0.1 + unit(words[:, 15:24]).reshape(slots) * (_SEVERITY - 0.1),
        sign_BWd=np.where(unit(words[:, 24:33]) < 0.5, -1.0, 1.0).reshape(slots),
    )


def augmix(image_u8_BSSC: Tensor, chains: Chains, config: PipelineConfig) -> Tensor:
    """Return the view: float32 (B, 3, S, S), channels last in memory, normalised.

    Args:
        image_u8_BSSC: uint8 images.
        chains: what to do to each of them.
    """
    device = image_u8_BSSC.device
    # Planar for the operations.
    image_u8_BCSS = image_u8_BSSC.permute(0, 3, 1, 2).contiguous()

    def column(values_B: F64) -> Tensor:
        return torch.from_numpy(values_B).float().to(device, non_blocking=True).view(-1, 1, 1, 1)

    mixed = column(1 - chains.share_B) * normalise(image_u8_BSSC, config)
    for chain in range(_CHAINS):
        end_u8_BCSS = image_u8_BCSS.clone()
        for depth in range(_DEPTH):
            active_B = chains.depth_BW[:, chain] > depth
            operation_B = chains.operation_BWd[:, chain, depth]
            for is_table in (True, False):
                index = np.flatnonzero(active_B & ((operation_B < _TABLES) == is_table))
                if len(index):
                    at = torch.from_numpy(index).to(device, non_blocking=True)
                    apply = _look_up if is_table else _warp
                    end_u8_BCSS[at] = apply(
                        end_u8_BCSS[at],
                        operation_B[index],
                        chains.level_BWd[index, chain, depth],
                        chains.sign_BWd[index, chain, depth],
                    )
        weight = column(chains.share_B * chains.weight_BW[:, chain])
        mixed = mixed + weight * normalise(end_u8_BCSS.permute(0, 2, 3, 1), config)
    return mixed.contiguous(memory_format=torch.channels_last)


def _warp(image_u8_BCSS: Tensor, operation_B: I64, level_B: F64, sign_B: F64) -> Tensor:
    """Rotate, shear or move each image, bilinear, black outside, as PIL's affine transform does."""
    side = image_u8_BCSS.shape[-1]
    matrix_B23 = np.tile(np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), (len(operation_B), 1, 1))
    for i, (operation, level, sign) in enumerate(zip(operation_B, level_B, sign_B, strict=True)):
        matrix_B23[i] = _affine(OPERATIONS[operation], level, sign, side)
    matrix = torch.from_numpy(matrix_B23).float().to(image_u8_BCSS.device, non_blocking=True)
    # Output pixel centre (x + 0.5, y + 0.5) comes from matrix @ (x + 0.5, y + 0.5, 1), in pixels.
    centre_S = torch.arange(side, device=matrix.device, dtype=torch.float32) + 0.5
    y_SS, x_SS = torch.meshgrid(centre_S, centre_S, indexing="ij")
    from_BSS2 = torch.stack([x_SS, y_SS, torch.ones_like(x_SS)], dim=2) @ matrix.transpose(1, 2).unsqueeze(1)
    inside_B1SS = ((from_BSS2 >= 0) & (from_BSS2 < side)).all(dim=3).unsqueeze(1)
    warped = F.grid_sample(
        image_u8_BCSS.float(),
        from_BSS2 * (2 / side) - 1,
        mode="bilinear",
        padding_mode="border",
        align_corners=False,
    )
    return (warped * inside_B1SS).round().clamp(0, 255).to(torch.uint8)


def _affine(operation: str, level: float, sign: float, side: int) -> F64:
    """Return the 2x3 map from output to source pixels; levels as AugMix scales them, of ten."""
    if operation == "rotate":
        angle = np.radians(-sign * int(level * 30 / 10))
        cos, sin, half = np.cos(angle), np.sin(angle), side / 2
        return np.array(
            [[cos, sin, half - cos * half - sin * half], [-sin, cos, half + sin * half - cos * half]]
        )
    shear = sign * level * 0.3 / 10
    shift = sign * int(level * int(side / 3) / 10)
    return np.array(
        {
            "shear_x": [[1, shear, 0], [0, 1, 0]],
            "shear_y": [[1, 0, 0], [shear, 1, 0]],
            "translate_x": [[1, 0, shift], [0, 1, 0]],
            "translate_y": [[1, 0, 0], [0, 1, shift]],
        }[operation],
        dtype=np.float64,
    )


def _look_up(image_u8_BCSS: Tensor, operation_B: I64, level_B: F64, sign_B: F64) -> Tensor:
    """Map each image's grey levels through the table of its operation, channel by channel, as PIL's ImageOps do."""
    device = image_u8_BCSS.device
    flat_BCP = image_u8_BCSS.flatten(2).long()
    histogram_BCG = torch.zeros((*flat_BCP.shape[:2], 256), dtype=torch.int64, device=device)
    histogram_BCG.scatter_add_(2, flat_BCP, torch.ones_like(flat_BCP))
    table_BCG = torch.empty_like(histogram_BCG)
    grey_G = torch.arange(256, device=device)
    for operation, make in enumerate((_autocontrast, _equalize)):
        at = torch.from_numpy(np.flatnonzero(operation_B == operation)).to(device, non_blocking=True)
        table_BCG[at] = make(histogram_BCG[at])
    for i in np.flatnonzero(operation_B >= 2).tolist():
        if OPERATIONS[operation_B[i]] == "posterize":
            dropped = 4 + int(level_B[i] * 4 / 10)  # of eight bits
            table_BCG[i] = grey_G >> dropped << dropped
        else:
            threshold = 256 - int(level_B[i] * 256 / 10)
            table_BCG[i] = torch.where(grey_G < threshold, grey_G, 255 - grey_G)
    return table_BCG.gather(2, flat_BCP).to(torch.uint8).view_as(image_u8_BCSS)


def _autocontrast(histogram_BCG: Tensor) -> Tensor:
    """Stretch the levels in use over 0 to 255."""
    used_BCG = histogram_BCG > 0
    low_BC1 = used_BCG.int().argmax(2, keepdim=True)
    high_BC1 = 255 - used_BCG.flip(2).int().argmax(2, keepdim=True)
    grey_G = torch.arange(256, device=histogram_BCG.device)
    # In double, as PIL computes it, since the result is cut off to an integer.
    span_BC1 = (high_BC1 - low_BC1).clamp_min(1).double()
    scale_BC1 = (
        torch.full_like(span_BC1, 255.0) / span_BC1
    )  # 255.0 / span would multiply by a rounded reciprocal
    table_BCG = (grey_G * scale_BC1 - low_BC1 * scale_BC1).trunc().clamp(0, 255).long()
    return torch.where(high_BC1 > low_BC1, table_BCG, grey_G)


def _equalize(histogram_BCG: Tensor) -> Tensor:
    """Even out how often the levels are used."""
    grey_G = torch.arange(256, device=histogram_BCG.device)
    high_BC1 = 255 - (histogram_BCG > 0).flip(2).int().argmax(2, keepdim=True)
    step_BC1 = (histogram_BCG.sum(2, keepdim=True) - histogram_BCG.gather(2, high_BC1)) // 255
    before_BCG = histogram_BCG.cumsum(2) - histogram_BCG
    table_BCG = (step_BC1 // 2 + before_BCG) // step_BC1.clamp_min(1)
    return torch.where(step_BC1 > 0, table_BCG.clamp(0, 255), grey_G)
