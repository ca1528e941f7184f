"""Images named in a list: CSV with a header line, or JSON Lines, one image a line."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from shards.keys import sample_key
from shards.labels import label_number, number_classes, read_text
from shards.source import Listing, Sample

LIST_EXTENSIONS = {".csv", ".jsonl", ".ndjson"}
_WANTED = "a list of images with `path` and `label` or `class`"


def list_listed_images(path: Path) -> Listing:
    """List the images of a CSV file (with a header line) or of a JSON Lines file, in its order.

    Of each line `path` is the image file, relative to the list's folder or absolute; `class` is a class
    name; `label` is a number where all lines have numbers, else a class name. Other columns are ignored.

    Raises:
        FileNotFoundError: the list is not there.
        ValueError: naming the line, if one has no path or no label.
    """
    rows = _csv_rows(path) if path.suffix.lower() == ".csv" else _json_rows(path)
    found = [(line, *_fields(row, f"{path}, line {line}")) for line, row in rows]
    if not found:
        raise ValueError(f"{path}: no images in it; wanted {_WANTED}")
    kinds = {kind for _, _, kind, _ in found}
    if len(kinds) > 1:
        raise ValueError(f"{path}: some lines have `label` and some `class`; give the same to all")
    numbers = [label_number(text) for _, _, _, text in found]
    numbered = kinds == {"label"} and None not in numbers
    if numbered:
        labels = [number for number in numbers if number is not None]
        most = labels.index(max(labels))
        classes = number_classes(labels, f"{path}, line {found[most][0]}")
    else:
        classes = sorted({text for _, _, _, text in found})
        index = {name: label for label, name in enumerate(classes)}
        labels = [index[text] for _, _, _, text in found]
    samples = []
    root = path.absolute().parent
    for (_, file, _, text), label in zip(found, labels, strict=True):
        try:
            info = os.stat(root / file)
            size, stamp = info.st_size, info.st_mtime_ns
        except OSError:  # reading it names the reason
            size = stamp = 0
        samples.append(Sample(file, _key("" if numbered else text, file), label, file, None, size, stamp))
    return Listing(root, classes, samples, 0, numbered)


def _key(class_name: str, file: str) -> str:
    parts = [part for part in PurePosixPath(file).parts if part not in ("/", "..")]
    if class_name in parts[:-1]:  # <anything>/<class>/<image>, as in an image folder
        parts = parts[parts.index(class_name) + 1 :]
    return sample_key(class_name, "/".join(parts))


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    lines = csv.DictReader(io.StringIO(read_text(path, _WANTED), newline=""))
    try:
        for row in lines:
            yield lines.line_num, {str(key).strip().lower(): value for key, value in row.items()}
    except csv.Error as error:
        raise ValueError(f"{path}, line {lines.line_num}: not CSV ({error})") from None


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    for number, line in enumerate(read_text(path, _WANTED).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: wanted an object with `path` and `label` or `class`")
        yield number, row


def _fields(row: dict[str, object], where: str) -> tuple[str, str, str]:
    """Path, which of `label` and `class` there is, and its text."""
    given = [name for name in ("label", "class") if row.get(name) not in (None, "")]
    if len(given) != 1 or not row.get("path"):
        found = ", ".join(f"`{name}`" for name, value in row.items() if value not in (None, "")) or "nothing"
        raise ValueError(f"{where}: wanted `path` and one of `label` and `class`, found {found}")
    file, value = row["path"], row[given[0]]
    if not isinstance(file, str) or not isinstance(value, str | int) or isinstance(value, bool):
        raise ValueError(f"{where}: path must be text and {given[0]} text or a whole number")
    text = str(value).strip()
    if not text.isprintable() or "\0" in file:
        raise ValueError(f"{where}: {given[0]} {text!r} cannot be printed, or the path holds a zero byte")
    if text.startswith("-") and text[1:].isdigit():
        raise ValueError(f"{where}: label {text} is negative; labels count classes from 0")
    return file, given[0], text
