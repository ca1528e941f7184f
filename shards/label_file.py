"""Classes of the images of a flat archive: the ILSVRC2012 devkit, LOC_val_solution.csv, or a plain text file."""

from __future__ import annotations

import csv
import io
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

from shards.labels import label_number, read_text
from shards.source import IMAGE_EXTENSIONS

_META = "data/meta.mat"
_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"
_MAX_BYTES = 64 << 20
_FORMS = (
    "ILSVRC2012_devkit_t12.tar.gz (or its folder), LOC_val_solution.csv, lines `image class`, "
    "or one class name a line in the order of the sorted images"
)


def read_labels(path: Path, images: list[str], where: str) -> list[str]:
    """The class of each image, as a name or as the text of a number.

    Args:
        path: one of the forms named in the error below.
        images: names of the images, sorted.
        where: the archive, for messages.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: it is of no known form, or an image is not in it (named).
    """
    if path.is_dir() or _is_gzip(path):
        return _devkit_classes(path, images)
    text = read_text(path, _FORMS)
    solution = text.startswith("ImageId,")
    rows = list(_solution_rows(text)) if solution else list(_plain_rows(text))
    if rows and not solution and all(len(row) == 1 for _, row in rows):
        if any(label_number(row[0]) is not None for _, row in rows):
            raise ValueError(
                f"{path}: numbers without image names, whose order is not known (those of the devkit are not "
                f"sorted class indices); wanted {_FORMS}"
            )
        if len(rows) != len(images):
            raise ValueError(f"{path}: {len(rows)} classes for the {len(images)} images of {where}")
        return [row[0] for _, row in rows]
    if not rows:
        raise ValueError(f"{path}: no labels in it; wanted {_FORMS}")
    classes: dict[str, str] = {}
    for line, row in rows:
        if len(row) != 2:
            raise ValueError(
                f"{path}, line {line}: an image and its class are two fields, found {len(row)}; wanted {_FORMS}"
            )
        if classes.setdefault(_stem(row[0]), row[1]) != row[1]:
            raise ValueError(
                f"{path}, line {line}: {row[0]} has class {row[1]} here and {classes[_stem(row[0])]} in a line "
                "before; an image has one class, and folders and extensions do not tell images apart"
            )
    for image in images:
        if _stem(image) not in classes:
            raise ValueError(f"{path}: no class for {image} of {where}")
    return [classes[_stem(image)] for image in images]


def _plain_rows(text: str) -> Iterator[tuple[int, list[str]]]:
    """Line number and fields of each line that is not empty."""
    for line, words in enumerate(text.split("\n"), 1):
        if row := words.replace(",", " ").split():
            yield line, row


def _solution_rows(text: str) -> Iterator[tuple[int, list[str]]]:
    """Line number, image and class of each row below the header; a row without a class has one field."""
    rows = csv.reader(io.StringIO(text, newline=""))
    next(rows)
    for row in rows:
        if any(field.strip() for field in row):
            yield rows.line_num, [row[0].strip(), *"".join(row[1:2]).split()[:1]]


def _stem(image: str) -> str:
    """The name by which an image is looked up: some lists leave the extension out."""
    base = os.path.basename(image)
    stem, extension = os.path.splitext(base)
    return stem if extension.lower() in IMAGE_EXTENSIONS else base


def _is_gzip(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _devkit_classes(path: Path, images: list[str]) -> list[str]:
    from scipy.io import loadmat  # takes a second, and only the devkit needs it

    meta, truth = _devkit_files(path)
    try:
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        names = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
        ids = [int(line) for line in truth.split()]
    except Exception as error:  # whatever a damaged MATLAB file makes its reader raise
        raise ValueError(
            f"{path}: {_META} or {_TRUTH} cannot be read ({error}); get the devkit again"
        ) from None
    classes = []
    for image in images:
        number = re.search(r"_(\d{1,12})$", _stem(image))
        if number is None or not 1 <= int(number[1]) <= len(ids) or ids[int(number[1]) - 1] not in names:
            raise ValueError(
                f"{path}: no class for {image}; wanted ILSVRC2012_val_<number>.JPEG with a number in 1..{len(ids)}"
            )
        classes.append(names[ids[int(number[1]) - 1]])
    return classes


def _devkit_files(path: Path) -> tuple[bytes, bytes]:
    found: dict[str, bytes] = {}
    if path.is_dir():
        found = {name: (path / name).read_bytes() for name in (_META, _TRUTH) if (path / name).is_file()}
    else:
        try:
            with tarfile.open(path, "r:gz") as tar:
                for member in tar:
                    name = next((n for n in (_META, _TRUTH) if member.name.endswith(f"/{n}")), None)
                    file = tar.extractfile(member) if name and 0 <= member.size <= _MAX_BYTES else None
                    if name and file:
                        found[name] = file.read()
        except (tarfile.TarError, OSError, EOFError) as error:
            raise ValueError(f"{path}: not a readable .tar.gz ({error}); get the devkit again") from None
    missing = [name for name in (_META, _TRUTH) if name not in found]
    if missing:
        raise ValueError(f"{path}: no {' and no '.join(missing)} in it; wanted {_FORMS}")
    return found[_META], found[_TRUTH]
