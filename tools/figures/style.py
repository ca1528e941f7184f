"""What all figures share: colours that colour-blind readers can tell apart, sizes that a phone can show."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed
import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

INK, PALE = "#1c2733", "#d8dee5"
# Okabe and Ito's palette, without yellow, which vanishes on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#1c2733")
WIDTH_IN = 5.2  # two side by side on a laptop; still legible at the width of a phone

Picture = npt.NDArray[np.uint8]


def figure(height_in: float, columns: int = 1) -> tuple[Figure, Any]:
    """Return a figure of the usual width and its axes, without frames above and to the right."""
    drawn, axes = plt.subplots(1, columns, figsize=(WIDTH_IN, height_in), squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.2)
        axis.set_axisbelow(True)
    return drawn, axes[0, 0] if columns == 1 else axes[0]


def png(drawn: Figure) -> bytes:
    """Return a figure as PNG and close it."""
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png", dpi=150, bbox_inches="tight", facecolor="white")
    plt.close(drawn)
    return buffer.getvalue()


def jpeg(picture: Image.Image, quality: int = 85) -> bytes:
    """Return a picture as JPEG; photographs would be several times larger as PNG."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[Picture]]], heads: Sequence[str], cell: int, label_width: int
) -> Image.Image:
    """Return rows of square pictures with a label in front of each and a head above the columns.

    Args:
        rows: label and uint8 (H, W, 3) pictures.
        heads: one per column.
        cell: side of a picture on the sheet, in pixels.
        label_width: room for the labels, in pixels.
    """
    gap, header = 4, 24
    columns = len(heads)
    size = (label_width + columns * (cell + gap), header + len(rows) * (cell + gap))
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for column, head in enumerate(heads):
        draw.text((label_width + column * (cell + gap) + cell // 2, 3), head, INK, font, anchor="ma")
    for row, (label, pictures) in enumerate(rows):
        top = header + row * (cell + gap)
        draw.text((2, top + cell // 2), label, INK, font, anchor="lm")
        for column, picture in enumerate(pictures):
            tile = Image.fromarray(picture).resize((cell, cell), Image.Resampling.LANCZOS)
            sheet.paste(tile, (label_width + column * (cell + gap), top))
    return sheet


def stack(strips: Sequence[Image.Image]) -> Image.Image:
    """Put pictures below each other."""
    sheet = Image.new("RGB", (max(s.width for s in strips), sum(s.height for s in strips)), "white")
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    return sheet
