"""A picture of many small pictures: a glance at what is in a shard set."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageDraw

from shards.store import Store

_CAPTION = 14
_COLUMNS = 10
_RED = (160, 0, 0)


def contact_sheet(store: Store, count: int, side: int = 112) -> tuple[Image.Image, list[str]]:
    """Thumbnails of samples at even distances over the set, each with its class below it.

    Args:
        store: an open set.
        count: how many, at most; at least 1.
        side: pixels of a thumbnail's longer side.

    Returns:
        The sheet (RGB), and a line for each sample that could not be shown; its place on the sheet is red.

    Raises:
        ValueError: the set has no samples.
    """
    if not len(store):
        raise ValueError(f"{store.path}: a set without samples has no contact sheet")
    ids = np.unique(np.linspace(0, len(store) - 1, min(count, len(store))).round().astype(np.int64))
    columns = min(_COLUMNS, len(ids))
    rows = -(-len(ids) // columns)
    sheet = Image.new("RGB", (columns * side, rows * (side + _CAPTION)), "white")
    draw = ImageDraw.Draw(sheet)
    faults = []
    for place, index in enumerate(ids.tolist()):
        left, top = place % columns * side, place // columns * (side + _CAPTION)
        try:
            with Image.open(io.BytesIO(store.read(index).tobytes())) as picture:
                picture.draft("RGB", (side, side))  # JPEGs are decoded no larger than needed
                small = picture.convert("RGB")
            small.thumbnail((side, side))
            sheet.paste(small, (left + (side - small.width) // 2, top + (side - small.height) // 2))
        except Exception as error:  # decoders raise whatever they like on damaged data
            faults.append(f"{store.location(index)}: cannot be shown: {error}")
            draw.rectangle((left, top, left + side - 1, top + side - 1), fill=_RED)
        name = store.classes[int(store.label[index])]
        # The built-in font may know Latin letters alone.
        draw.text(
            (left + 2, top + side + 1),
            name[: side // 7].encode("latin-1", "replace").decode("latin-1"),
            "black",
        )
    return sheet, faults
