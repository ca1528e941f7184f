"""Which images an evaluation reads: shards, folders, ImageNet-C on disk."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import shards
from pipeline.corruptions import KINDS
from pipeline.corruptions.kinds import suggest
from shards import Store
from tools.evaluation.folder import SUFFIXES, class_folders, open_files, open_folder
from tools.runtime.results import C_BAR_KINDS, CLEAN, SEVERITIES, CellName


class Outline(NamedTuple):
    """What is known of a set without reading its images: names of the classes, number of images."""

    classes: list[str]
    images: int


@dataclass(frozen=True)
class Source:
    """A set of images to be opened when its turn comes.

    name: of the set; unique.
    cells: the cells it gives.
    path: where it is, for messages.
    open: opens it.
    look: says what it holds, for less time than `open`.
    on_disk: scored as it is, in one cell.
    resize: False where images must have the model's size already.
    fewer: a set of fewer classes than the model: "refuse" it, "mask" the logits of the others, or "keep" them.
    labelled: False where nobody said what is on the images.
    """

    name: str
    cells: list[CellName]
    path: Path
    open: Callable[[], Store]
    look: Callable[[], Outline]
    on_disk: bool = False
    resize: bool = True
    fewer: str = "refuse"
    labelled: bool = True


def open_images(path: Path, name: str = "") -> Store:
    """Open a shard set, or a folder of class folders."""
    if (path / "manifest.json").is_file():
        return shards.open(path)
    if path.is_dir() and any(p.is_dir() for p in path.iterdir()):
        return open_folder(path, name or path.resolve().name)
    return shards.open(path)  # says what is wrong with it


def outline(path: Path) -> Outline:
    """Say what `open_images` would open."""
    if not (path / "manifest.json").is_file() and path.is_dir() and any(p.is_dir() for p in path.iterdir()):
        return _outline_of_folder(path)
    with shards.open(path) as store:
        return Outline(list(store.classes), len(store))


def _outline_of_folder(path: Path) -> Outline:
    classes = class_folders(path)
    return Outline(list(classes), sum(map(len, classes.values())))


def made_on_the_fly(path: Path, kinds: list[str], fewer: str) -> Source:
    """Clean images, and their corruptions made in the same pass."""
    cells = [(CLEAN, 0), *((kind, severity) for kind in kinds for severity in SEVERITIES)]
    return Source("on-the-fly", cells, path, lambda: open_images(path), lambda: outline(path), fewer=fewer)


def plain_set(name: str, path: Path) -> Source:
    """ImageNet-V2, -Sketch, -A, -R and the like: class folders, scored among the classes they have.

    Raises:
        ValueError: the name is a corruption's.
    """
    if not name or name == CLEAN or name in (*KINDS, *C_BAR_KINDS):
        raise ValueError(
            f"--sets: {name!r} cannot be the name of a set, it is a kind of image in the results"
        )
    return Source(
        f"sets/{name}",
        [(name, 0)],
        path,
        lambda: open_images(path, name),
        lambda: outline(path),
        on_disk=True,
        fewer="mask",
    )


def corruptions_on_disk(root: Path, benchmark: str, side: int, fewer: str) -> list[Source]:
    """List `<corruption>/<severity>/<class>/<image>`, and `clean/<class>/<image>` where it is there.

    Args:
        root: the folder.
        benchmark: its name in messages and file names.
        side: images must be `side` x `side` pixels; the first one of each cell is looked at now, the others when
            their cell is opened.
        fewer: see `Source`.

    Raises:
        FileNotFoundError, ValueError: no such folder, another layout, an unknown corruption, images of another size.
    """
    if not root.is_dir():
        raise FileNotFoundError(
            f"{root}: no such folder; --{benchmark} wants <corruption>/<severity>/<class>/<image>"
        )
    sources: list[Source] = []
    for folder in sorted(p for p in root.iterdir() if p.is_dir()):
        kind = folder.name
        if kind == CLEAN:
            sources.insert(0, _cell(folder, (CLEAN, 0), benchmark, side, fewer))
            continue
        known = (*KINDS[1:], *C_BAR_KINDS)
        if kind not in known:
            raise ValueError(
                f"{folder}: {kind!r} is no corruption of ImageNet-C or ImageNet-C-bar{suggest(kind, known)}; "
                f"--{benchmark} wants <corruption>/<severity>/<class>/<image>"
            )
        # ImageNet-C-bar's severities are real numbers: the mildest is 1, the strongest 5.
        found = sorted(
            (p for p in folder.iterdir() if p.is_dir() and _number(p.name) is not None), key=_severity
        )
        whole = [p for p in found if p.name in set("12345")]
        numbered = {int(p.name): p for p in whole} if len(whole) == len(found) else dict(enumerate(found, 1))
        if not found or len(found) > len(SEVERITIES):
            raise ValueError(
                f"{folder}: wanted a folder for each severity 1 to 5, found "
                f"{', '.join(p.name for p in found) or 'none'}"
            )
        for number, path in numbered.items():
            sources.append(_cell(path, (kind, number), benchmark, side, fewer))
    if not sources:
        raise ValueError(
            f"{root}: no corruption folders; --{benchmark} wants <corruption>/<severity>/<class>/<image>"
        )
    return sources


def _number(name: str) -> float | None:
    try:
        return float(name)
    except ValueError:
        return None


def _severity(path: Path) -> float:
    return float(path.name)


def _cell(path: Path, cell: CellName, benchmark: str, side: int, fewer: str) -> Source:
    name = f"{benchmark}/{cell[0]}/{cell[1]}"

    def open_cell() -> Store:
        return open_folder(path, name, side)

    _check_first(path, side)
    return Source(
        name,
        [cell],
        path,
        open_cell,
        lambda: _outline_of_folder(path),
        on_disk=True,
        resize=False,
        fewer=fewer,
    )


def _check_first(path: Path, side: int) -> None:
    """Refuse a cell whose first image has another size, before any cell is scored."""
    first = next((p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES), None)
    if first is None:
        raise ValueError(f"{path}: no JPEG or PNG images; wanted <class>/<image>")
    open_files(path, [first], [0], ["any"], "first", side).close()


def read_opinions(path: Path, images: Path) -> dict[Path, float]:
    """Return the mean opinion scores of the images that are there, by file.

    Raises:
        FileNotFoundError: no table.
        ValueError: not such a table, a score that is no number, or none of its images is there.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--mos {path}: no such file; wanted a CSV with the columns file and mos")
    found: dict[Path, float] = {}
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        if not {"file", "mos"} <= set(reader.fieldnames or ()):
            raise ValueError(
                f"{path}: wanted the columns file and mos, found {', '.join(reader.fieldnames or ())}"
            )
        for row in reader:
            image = images / row["file"]
            if image.suffix.lower() not in SUFFIXES or not image.is_file():
                continue
            try:
                found[image] = float(row["mos"])
            except ValueError:
                raise ValueError(f"{path}, line {reader.line_num}: mos {row['mos']!r} is no number") from None
    if not found:
        raise ValueError(
            f"{path}: none of the images it names is in {images}; give their folder as --mos-images"
        )
    return dict(sorted(found.items()))


def opinions(path: Path, images: Path) -> Source:
    """Images with mean opinion scores instead of classes; in ascending order of their files."""
    files = list(read_opinions(path, images))

    def open_set() -> Store:
        return open_files(images, files, [0] * len(files), ["unlabelled"], "mos", None)

    known = Outline(["unlabelled"], len(files))
    return Source("mos", [("mos", 0)], images, open_set, lambda: known, on_disk=True, labelled=False)
