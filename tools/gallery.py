"""A contact sheet of the corruptions of an image: one row per kind, one column per severity.

    python -m tools.gallery photo.jpg --out gallery.png
    python -m tools.gallery photo.jpg --kinds fog frost snow --flavour bethge --out weather.png

The image is prepared as ImageNet-C's were: shorter side to 256 (bilinear), centre crop 224.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from PIL import Image, ImageDraw, ImageFont

from pipeline.corruptions import SEVERITIES, available_kinds, corrupt, frost

_MARGIN, _LABEL_WIDTH, _HEADER = 4, 150, 22


@dataclass(frozen=True)
class Options:
    """What to draw."""

    image: tyro.conf.Positional[Path]
    """The picture, in any format that Pillow reads."""
    out: Path = Path("gallery.png")
    """Where the sheet goes; PNG, JPEG or any format that Pillow writes."""
    kinds: Annotated[tuple[str, ...], tyro.conf.arg(metavar="KIND...")] = ()
    """Corruptions to show; all 19 by default."""
    flavour: str = "hendrycks"
    """hendrycks or bethge."""
    key: int = 0
    """Names the random draws."""
    side: int = 224
    """Side of the corrupted square in pixels, at least 32."""
    cell: int = 112
    """Side of each picture on the sheet in pixels."""


def load_square(path: Path, side: int) -> torch.Tensor:
    """Return the centre square of a picture as (side, side, 3) uint8, resized as ImageNet-C's were.

    Raises:
        FileNotFoundError, ValueError: the file is missing or no picture.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; give the path of a picture")
    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
    except OSError as error:
        raise ValueError(f"{path} is no picture that Pillow can read: {error}") from error
    scale = side * 256 / 224 / min(picture.size)
    width, height = (max(side, round(length * scale)) for length in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - side) // 2, (height - side) // 2
    return torch.from_numpy(np.array(picture.crop((left, top, left + side, top + side))))


def contact_sheet(
    image_u8_HWC: torch.Tensor,
    kinds: tuple[str, ...],
    flavour: str = "hendrycks",
    key: int = 0,
    cell: int = 112,
) -> Image.Image:
    """Return a sheet with a row per kind and a column per severity.

    Args:
        image_u8_HWC: (H, W, 3) uint8.
        kinds: names of KINDS.
        flavour, key: see pipeline.corruptions.corrupt.
        cell: side of each picture on the sheet in pixels.
    """
    columns, rows = len(SEVERITIES), len(kinds)
    step = cell + _MARGIN
    sheet = Image.new(
        "RGB", (_LABEL_WIDTH + columns * step + _MARGIN, _HEADER + rows * step + _MARGIN), "white"
    )
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for column, severity in enumerate(SEVERITIES):
        draw.text(
            (_LABEL_WIDTH + column * step + cell // 2, 3), f"severity {severity}", "black", font, anchor="ma"
        )
    batch = image_u8_HWC.expand(columns, *image_u8_HWC.shape)
    for row, kind in enumerate(kinds):
        top = _HEADER + row * step
        draw.text((6, top + cell // 2), kind, "black", font, anchor="lm")
        pictures = corrupt(batch, kind, list(SEVERITIES), [key] * columns, flavour=flavour)
        for column, picture in enumerate(pictures):
            tile = Image.fromarray(picture.numpy()).resize((cell, cell), Image.Resampling.LANCZOS)
            sheet.paste(tile, (_LABEL_WIDTH + column * step, top))
    return sheet


def main(options: Options) -> None:
    """Draw the sheet and write it."""
    kinds = options.kinds or tuple(
        k for k in available_kinds() if k != "identity" and (k != "frost" or frost.found())
    )
    image = load_square(options.image, options.side)
    sheet = contact_sheet(image, kinds, options.flavour, options.key, options.cell)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(options.out)
    print(f"{len(kinds)} corruptions x {len(SEVERITIES)} severities: {options.out}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
