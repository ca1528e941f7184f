"""Sample keys: unique, deterministic, and safe for everybody who reads WebDataset tars.

WebDataset cuts a member's base name at its first dot, DALI's index separates fields by blanks, and a
plain ustar header holds 100 bytes. So a key is made of letters and digits (of any script), `_` and
`-`, and is at most 80 bytes long.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

import xxhash

_MAX_BYTES = 80
_HASH_DIGITS = 12


def sample_key(class_name: str, path: str) -> str:
    """The key of one image before duplicates are told apart.

    Args:
        class_name: the class folder's name.
        path: the image's path inside that folder, with `/`.

    Returns:
        The path without its extension, led by the class name unless the file name starts with it, as
        ImageNet's do: (`n01440764`, `n01440764_18.JPEG`) gives `n01440764_18`.
    """
    folder, _, base = path.rpartition("/")
    stem, dot, _ = base.rpartition(".")
    stem = stem if dot and stem else base
    whole = f"{folder}/{stem}" if folder else stem
    if class_name and not whole.startswith(f"{class_name}_"):
        whole = f"{class_name}_{whole}"
    return clean_key(whole)


def clean_key(text: str) -> str:
    """A name with what readers could trip over as `_`, cut with a hash where it is long; a clean one as it is."""
    normal = unicodedata.normalize("NFC", text)
    key = "".join(c if c.isalnum() or c in "_-" else "_" for c in normal)
    if len(key.encode()) <= _MAX_BYTES:
        return key
    digest = xxhash.xxh3_64_hexdigest(text.encode("utf-8", "surrogateescape"))[:_HASH_DIGITS]
    head = key.encode()[: _MAX_BYTES - _HASH_DIGITS - 1].decode(errors="ignore")
    return f"{head}-{digest}"


def unique_keys(wanted: Iterable[str]) -> list[str]:
    """Tell equal keys apart: the second one gets `-2`, and so on.

    Which one is the second follows from the order given alone, so sort first.
    """
    taken: set[str] = set()
    last: dict[str, int] = {}
    keys = []
    for first in wanted:
        key = first
        while key in taken:
            last[first] = last.get(first, 1) + 1
            key = f"{first}-{last[first]}"
        taken.add(key)
        keys.append(key)
    return keys
