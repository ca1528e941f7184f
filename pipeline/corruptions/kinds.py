"""The corruptions by name and number, without loading anything.

A kind's number is its index in KINDS and is what plans, the DALI operator and the C core use.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

TRAINING_KINDS: tuple[str, ...] = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)
"""The 15 corruptions of the ImageNet-C benchmark, in its order."""

HELD_OUT_KINDS: tuple[str, ...] = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
"""The 4 corruptions that ImageNet-C holds out: not for training."""

KINDS: tuple[str, ...] = ("identity", *TRAINING_KINDS, *HELD_OUT_KINDS)
"""All kinds; a kind's number is its index."""

FLAVOURS: tuple[str, ...] = ("hendrycks", "bethge")
CONSTANT_SETS: tuple[str, ...] = ("imagenet", "tiny_imagenet", "cifar10")
SEVERITIES: tuple[int, ...] = (1, 2, 3, 4, 5)


def suggest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for a near miss, else the known names."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"


def kind_number(name: str) -> int:
    """Return a kind's index in KINDS; ValueError on an unknown one, with the nearest name."""
    if name not in KINDS:
        raise ValueError(f"unknown corruption {name!r}{suggest(str(name), KINDS)}")
    return KINDS.index(name)


def flavour_id(flavour: str) -> int:
    """Return the C core's number of a flavour; ValueError on an unknown one."""
    if flavour not in FLAVOURS:
        raise ValueError(f"unknown flavour {flavour!r}{suggest(str(flavour), FLAVOURS)}")
    return FLAVOURS.index(flavour)


def constants_id(constants: str) -> int:
    """Return the C core's number of a constant set, -1 for "auto"; ValueError on an unknown one."""
    if constants == "auto":
        return -1
    if constants not in CONSTANT_SETS:
        raise ValueError(
            f"unknown constants {constants!r}{suggest(str(constants), ('auto', *CONSTANT_SETS))}"
        )
    return CONSTANT_SETS.index(constants)
