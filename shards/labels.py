"""Class lists and label files: how a source's images get their labels.

A source names each image's class, or numbers it. Class names are put in the order of a class file, or
sorted; numbers index the class file, and without one the classes are called "0", "1", and so on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from shards.source import Listing, place

_MAX_CLASSES = 1_000_000
_MAX_FILE_BYTES = 64 << 20
_SYNSET_LINE = re.compile(r"(n\d{8})\s+\S.*")


def read_text(path: Path, what: str) -> str:
    """A text file the user named; a byte order mark is taken off.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is no text, or absurdly large.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; it should be {what}")
    if path.stat().st_size > _MAX_FILE_BYTES:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, too large for {what}")
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text; it should be {what}") from None


def read_classes(path: Path) -> list[str]:
    """Class names of a class file: one a line, or lines `n01440764 tench, Tinca tinca` of a synset mapping.

    Raises:
        FileNotFoundError, ValueError: it is not there, empty, or has a name twice.
    """
    lines = [line.strip() for line in read_text(path, "a list of class names, one a line").split("\n")]
    names = [line for line in lines if line]
    synsets = [_SYNSET_LINE.fullmatch(name) for name in names]
    if all(synsets):
        names = [match[1] for match in synsets if match]
    if not names:
        raise ValueError(f"{path}: no class names in it; wanted one a line")
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{path}: class {name!r} stands there twice; a class has one label")
        if not name.isprintable():
            raise ValueError(f"{path}: class name {name!r} cannot be printed")
        seen.add(name)
    return names


def label_number(text: str) -> int | None:
    """A label written as a number; None where it is none."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else None


def number_classes(labels: Iterable[int], where: str) -> list[str]:
    """Names for classes of which only numbers are known: "0" up to the largest.

    Raises:
        ValueError: a label is absurdly large.
    """
    most = max(labels, default=-1)
    if most >= _MAX_CLASSES:
        raise ValueError(f"{where}: label {most} is absurd; labels count classes from 0")
    return [str(number) for number in range(most + 1)]


def with_classes(listing: Listing, classes: list[str], where: str) -> Listing:
    """The listing with labels that index `classes`.

    Args:
        listing: its classes are names, or where it is numbered the numbers that index `classes`.
        classes: the wanted order.
        where: what the list is called in messages.

    Raises:
        ValueError: naming the first image whose class is not in the list.
    """
    if listing.numbered:
        new = {label: label for label in range(min(len(listing.classes), len(classes)))}
    else:
        index = {name: label for label, name in enumerate(classes)}
        new = {old: index[name] for old, name in enumerate(listing.classes) if name in index}
    for sample in listing.samples:
        if sample.label not in new:
            raise ValueError(
                f"{place(listing.root, sample)}: its label {listing.classes[sample.label]!r} is not one of the "
                f"{len(classes)} classes of {where}; give another --classes, or leave the image out"
            )
    samples = [replace(sample, label=new[sample.label]) for sample in listing.samples]
    return Listing(listing.root, classes, samples, listing.ignored)
