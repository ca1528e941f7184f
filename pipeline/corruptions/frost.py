"""The frost textures: found among the files of PyPI imagecorruptions, without importing it."""

from __future__ import annotations

from collections.abc import Iterable


def ensure_loaded(kinds: Iterable[int]) -> None:
    """Hand the textures to the core, once, if any of these kinds needs them."""


def load_if_found() -> None:
    """Hand the textures to the core if they can be found."""


def found() -> bool:
    """True where the textures can be found."""
    return False
