"""The frost textures: found among the files of PyPI imagecorruptions, without importing it.

Shapes: H = height, W = width.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import threading
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from pipeline.corruptions import core
from pipeline.corruptions.kinds import KINDS

FILES = ("frost1.png", "frost2.png", "frost4.jpg", "frost5.jpg")
"""frost3.png holds the same pixels as frost2.png, and frost6.jpg is never drawn."""

_FROST = KINDS.index("frost")
_lock = threading.Lock()


def find_folder() -> Path | None:
    """Return the folder with the textures: $VQSA_FROST_DIR, else imagecorruptions' own, else None."""
    chosen = os.environ.get("VQSA_FROST_DIR")
    if chosen:
        return Path(chosen) if all((Path(chosen) / name).is_file() for name in FILES) else None
    spec = importlib.util.find_spec("imagecorruptions")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        folder = Path(place) / "frost"
        if all((folder / name).is_file() for name in FILES):
            return folder
    return None


def found() -> bool:
    """True where the textures are loaded or can be found."""
    return bool(core.library().vqsa_has_frost_textures()) or find_folder() is not None


def ensure_loaded(kinds: Iterable[int]) -> None:
    """Hand the textures to the core, once, if any of these kinds needs them.

    Raises:
        FileNotFoundError: frost is asked for and its textures are not there.
    """
    if _FROST not in kinds or core.library().vqsa_has_frost_textures():
        return
    folder = find_folder()
    if folder is None:
        chosen = os.environ.get("VQSA_FROST_DIR")
        where = (
            f"VQSA_FROST_DIR={chosen}" if chosen else "the installed packages (imagecorruptions is not there)"
        )
        raise FileNotFoundError(
            f"frost needs {', '.join(FILES)}, looked in {where}: "
            "pip install --no-deps imagecorruptions, or set VQSA_FROST_DIR to a folder with these files"
        )
    _load(folder)


def load_if_found() -> None:
    """Hand the textures to the core if they can be found."""
    if not core.library().vqsa_has_frost_textures() and (folder := find_folder()) is not None:
        _load(folder)


def _load(folder: Path) -> None:
    from PIL import Image

    with _lock:
        textures: list[np.ndarray] = []
        for name in FILES:
            with Image.open(folder / name) as image:
                textures.append(np.asarray(image.convert("RGB")))
        variants = [
            *textures,
            *(resize_cubic(t, *(int(np.ceil(side * 1.1)) for side in t.shape[:2])) for t in textures),
            *(resize_linear(t, 0.3) for t in textures),
            *(resize_linear(t, 0.2) for t in textures),
        ]
        variants = [np.ascontiguousarray(v) for v in variants]
        count = len(variants)
        pointers = (ctypes.c_void_p * count)(*(v.ctypes.data for v in variants))
        heights = (ctypes.c_int32 * count)(*(v.shape[0] for v in variants))
        widths = (ctypes.c_int32 * count)(*(v.shape[1] for v in variants))
        core.check(core.library().vqsa_set_frost_textures(pointers, heights, widths))


def resize_cubic(image_HWC: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize uint8 (H, W, C) to height x width, bicubic (a = -3/4), as OpenCV 5's INTER_CUBIC."""

    def taps(size: int, length: int) -> list[tuple[np.ndarray, np.ndarray]]:
        at = (np.arange(size) + 0.5) * (length / size) - 0.5
        whole = np.floor(at).astype(np.int64)
        f, g, a = at - whole, 1 - (at - whole), -0.75
        before = ((a * (f + 1) - 5 * a) * (f + 1) + 8 * a) * (f + 1) - 4 * a
        left, right = (((a + 2) * d - (a + 3)) * d * d + 1 for d in (f, g))
        weights = (before, left, right, 1 - before - left - right)
        return [(np.clip(whole - 1 + k, 0, length - 1), w) for k, w in enumerate(weights)]

    image = image_HWC.astype(np.float64)
    across = np.zeros((image.shape[0], width, image.shape[2]))
    for index, weight in taps(width, image.shape[1]):
        across += weight[None, :, None] * image[:, index]
    total = np.zeros((height, width, image.shape[2]))
    for index, weight in taps(height, image.shape[0]):
        total += weight[:, None, None] * across[index]
    resized: np.ndarray = np.clip(np.rint(total), 0, 255).astype(np.uint8)
    return resized


def resize_linear(image_HWC: np.ndarray, factor: float) -> np.ndarray:
    """Scale uint8 (H, W, C) by a factor, bilinear without antialiasing, as cv2.resize's default does.

    OpenCV works in fixed point here: weights in 1/2048, and its own rounding of the vertical pass.
    """
    height, width = (round(side * factor) for side in image_HWC.shape[:2])

    def taps(size: int, length: int) -> list[tuple[np.ndarray, np.ndarray]]:
        at = ((np.arange(size) + 0.5) * (1.0 / factor) - 0.5).astype(np.float32)
        whole = np.floor(at).astype(np.int64)
        # Positions before the first and after the last pixel take that pixel alone.
        f = np.where((whole < 0) | (whole >= length - 1), np.float32(0), (at - whole).astype(np.float32))
        weights = (np.float32(1) - f, f)
        return [
            (np.clip(whole + k, 0, length - 1), np.rint(w * np.float32(2048)).astype(np.int64))
            for k, w in enumerate(weights)
        ]

    image = image_HWC.astype(np.int64)
    across = np.zeros((image.shape[0], width, image.shape[2]), np.int64)
    for index, weight in taps(width, image.shape[1]):
        across += weight[None, :, None] * image[:, index]
    total = np.zeros((height, width, image.shape[2]), np.int64)
    for index, weight in taps(height, image.shape[0]):
        total += (weight[:, None, None] * (across[index] >> 4)) >> 16
    resized: np.ndarray = np.clip((total + 2) >> 2, 0, 255).astype(np.uint8)
    return resized
