"""Decoding and encoding one image: the full check that the structural scan is not, and the conversions.

Everything else here keeps an image's bytes; only what these conversions ask for is encoded again.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
import simplejpeg
from PIL import Image

from shards.conversion import Conversion
from shards.scan import Scan

# Twice the size at which Pillow warns; above it Pillow refuses to decode, as a guard against bombs.
_MAX_PIXELS = 178_956_970
_MAX_JPEG_SIDE = 65_500  # libjpeg's
_DEFAULT_QUALITY = 95
_ORIENTATION_TAG = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


_COLOUR_SPACE = {1: "GRAY", 3: "RGB", 4: "CMYK"}


class PictureError(ValueError):
    """An image that does not decode, or cannot be converted."""


def check_decodes(data: bytes, found: Scan) -> None:
    """Decode an image that the scan found sound.

    The JPEG decoder is libjpeg-turbo with its warnings taken as errors: Pillow passes over them, and fills
    what is lost with grey.

    Raises:
        PictureError: saying what the decoder says.
    """
    _check_size(found)
    try:
        if found.format == "jpeg":
            simplejpeg.decode_jpeg(data, _COLOUR_SPACE[found.components])
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                _open(data).load()
    except Exception as error:  # decoders raise whatever they like on damaged data
        raise PictureError(f"does not decode: {error}") from None


def convert(data: bytes, found: Scan, how: Conversion) -> bytes:
    """The image as a JPEG of 1 or 3 components, converted.

    Pixels are Pillow's; transparency is dropped, 16-bit samples keep their high byte, and of the metadata only
    an orientation that is not applied stays.

    Raises:
        PictureError: the image does not decode, or is too wide or too high for a JPEG.
    """
    check_decodes(data, found)
    size = found.width, found.height
    wanted = size if how.shorter_side is None else _reduced(*size, how.shorter_side)
    if max(wanted) > _MAX_JPEG_SIDE:
        raise PictureError(
            f"{wanted[0]} x {wanted[1]} pixels, and a JPEG is written with at most {_MAX_JPEG_SIDE} a side; "
            "make it smaller with --shorter-side"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images and of transparency
            return _converted(data, found, how, wanted)
    except Exception as error:  # Pillow may refuse what another decoder takes
        raise PictureError(f"cannot be made a JPEG: {error}") from None


def _converted(data: bytes, found: Scan, how: Conversion, wanted: tuple[int, int]) -> bytes:
    picture = _open(data)
    # The decoder may leave out what is reduced away anyhow, down to twice the wanted size.
    picture.draft(None, (2 * wanted[0], 2 * wanted[1]))
    image = _eight_bit(picture)
    if wanted != (found.width, found.height):
        image = image.resize(wanted, Image.Resampling.BICUBIC, reducing_gap=2.0)
    exif = Image.Exif()
    if how.apply_exif and found.orientation != 1:
        image = image.transpose(_TRANSPOSE[found.orientation])
    elif found.orientation != 1:
        exif[_ORIENTATION_TAG] = found.orientation
    out = io.BytesIO()
    image.save(out, "JPEG", quality=how.quality or _DEFAULT_QUALITY, exif=exif)
    return out.getvalue()


def _open(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data), formats=("JPEG", "PNG"))


def _check_size(found: Scan) -> None:
    if found.width * found.height > _MAX_PIXELS:
        raise PictureError(
            f"{found.width} x {found.height} pixels, more than the {_MAX_PIXELS} that are decoded here"
        )


def _reduced(width: int, height: int, shorter_side: int) -> tuple[int, int]:
    """The size with the shorter side at most so long, the other one cut to a whole pixel as torchvision does."""
    shorter = min(width, height)
    if shorter <= shorter_side:
        return width, height
    return width * shorter_side // shorter, height * shorter_side // shorter


def _eight_bit(picture: Image.Image) -> Image.Image:
    """The picture in mode L or RGB."""
    if picture.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would cut at 255
        return Image.fromarray((np.asarray(picture).astype(np.uint16) >> 8).astype(np.uint8))
    if picture.mode in ("1", "L", "LA"):
        return picture.convert("L")
    return picture.convert("RGB")
