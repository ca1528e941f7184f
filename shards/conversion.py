"""What a build does to images, beyond copying them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shards.scan import Scan


@dataclass(frozen=True)
class Conversion:
    """What is done to images; the default does nothing."""

    convert: Literal["none", "oddities"] = "none"
    """`oddities` makes RGB JPEGs of CMYK ones, and JPEGs of PNGs whatever they are called."""
    shorter_side: int | None = None
    """Pixels; an image whose shorter side is longer is made smaller."""
    quality: int | None = None
    """JPEG quality; where it is given, every image is encoded again."""
    apply_exif: bool = False
    """Turn images as their EXIF orientation says."""

    def wanted(self, found: Scan) -> bool:
        """Whether an image must be encoded again."""
        odd = found.format == "png" or found.components == 4
        return (
            self.quality is not None
            or (self.convert == "oddities" and odd)
            or (self.shorter_side is not None and min(found.width, found.height) > self.shorter_side)
            or (self.apply_exif and found.orientation != 1)
        )
