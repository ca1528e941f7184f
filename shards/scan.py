"""Structural scan of one encoded image: format, stored size, and whether a decoder may see it.

The scan walks the headers and markers of a JPEG, or the chunks of a PNG, without decoding pixels.
What it calls sound has well-formed tables, a sane frame, image data for every component and an end
marker, so its headers cannot crash a decoder. Flipped bits inside the entropy-coded data change
pixels and are not found here; checksums and a full decode are for that.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from shards.native import ScanStruct, library

_FORMATS: tuple[Literal["", "jpeg", "png"], ...] = ("", "jpeg", "png")


def _fault_words() -> tuple[str, ...]:
    words: list[str] = []
    while (text := library.vqsa_fault_words(len(words))) is not None:
        words.append(text.decode())
    return tuple(words)


FAULTS: tuple[str, ...] = _fault_words()
"""What each fault code means, in words; code 0 is a sound image."""


@dataclass(frozen=True, slots=True)
class Scan:
    """What the scan found in one encoded image."""

    fault: int
    """0 where the image is sound, else an index into `FAULTS`."""
    format: Literal["", "jpeg", "png"]
    """By signature, not by file name; empty where it is neither."""
    width: int
    """Pixels as stored, before EXIF orientation; 0 where the header was not reached."""
    height: int
    components: int
    """JPEG 1, 3 or 4; PNG 1 to 4 (a palette counts as 3); 0 where the header was not reached."""
    orientation: int
    """EXIF orientation 1 to 8; 1 where there is none."""

    @property
    def words(self) -> str:
        """The fault in words."""
        return FAULTS[self.fault]


def scan(
    data: bytes | bytearray | memoryview | npt.NDArray[np.uint8], width: int = 0, height: int = 0
) -> Scan:
    """Scan one encoded image.

    Args:
        data: the encoded bytes, contiguous.
        width, height: the stored size expected, or 0 to accept any; another size is a fault.

    Returns:
        What was found; never raises for damaged data.
    """
    bytes_u8 = np.frombuffer(data, dtype=np.uint8)
    found = ScanStruct()
    library.vqsa_scan(bytes_u8.ctypes.data, bytes_u8.size, width, height, ctypes.byref(found))
    return Scan(
        found.fault, _FORMATS[found.format], found.width, found.height, found.components, found.orientation
    )
