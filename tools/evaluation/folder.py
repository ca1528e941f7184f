"""Image files on disk as a store of records, without building shards: every file is a shard of one sample.

The training and evaluation loaders read it as they read a shard set: in threads, structure checked, decoded by
DALI, which gives Pillow's own pixels for JPEG and PNG.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from shards import Records, Store
from shards.manifest import Header, ShardFile, TableFile, make_table

_READERS = 8
_OPEN_FILES = 128
SUFFIXES = (".jpg", ".jpeg", ".png")


def class_folders(root: Path) -> dict[str, list[Path]]:
    """Return the image files of `<class>/…/<image>`, by class, both sorted.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: it has no class folders, or one without images.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; give a folder of class folders with images")
    classes = {p.name: image_files(p) for p in sorted(root.iterdir()) if p.is_dir() and p.name[0] != "."}
    if not classes:
        raise ValueError(f"{root}: wanted one folder per class (<class>/<image>), found no folders")
    empty = [name for name, files in classes.items() if not files]
    if empty:
        raise ValueError(
            f"{root / empty[0]}: a class folder without JPEG or PNG images; remove it or fill it"
        )
    return classes


def image_files(root: Path) -> list[Path]:
    """Return the JPEG and PNG files under a folder, sorted."""
    return sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))


def open_folder(root: Path, name: str, side: int | None = None) -> Store:
    """Open `<class>/<image>` as a store; labels are places in the sorted list of classes.

    Args:
        root: the folder.
        name: of the set, for messages and results.
        side: refuse images that are not `side` x `side` pixels.

    Raises:
        FileNotFoundError, ValueError: as `class_folders`; an image of another size than `side`.
    """
    classes = class_folders(root)
    files = [path for paths in classes.values() for path in paths]
    labels = np.repeat(np.arange(len(classes)), [len(paths) for paths in classes.values()])
    return open_files(root, files, labels.tolist(), list(classes), name, side)


def open_files(
    root: Path, files: Sequence[Path], labels: Sequence[int], classes: list[str], name: str, side: int | None
) -> Store:
    """Open image files as a store. Keys are their paths below `root`, without the extension.

    A file that is no image becomes a damaged record: it is named and left out when it is read.

    Raises:
        ValueError: an image is not `side` x `side`.
    """
    with ThreadPoolExecutor(_READERS) as pool:
        sizes = list(pool.map(_size, files))
    unreadable = (side or 1, side or 1)
    if side is not None:
        for path, found in zip(files, sizes, strict=True):
            if found is not None and found != (side, side):
                raise ValueError(
                    f"{path}: {found[0]} x {found[1]} pixels, but images of this kind are scored as they are, "
                    f"without resizing, and the model takes {side} x {side}; use the set made for that size, or "
                    "score the folder with --sets, which resizes"
                )
    width, height = zip(*(found or unreadable for found in sizes), strict=True)
    names = [path.relative_to(root).as_posix() for path in files]
    lengths = [path.stat().st_size for path in files]
    # Not validated: these are file names of the user's, which may hold any character, in memory only.
    shards = [
        ShardFile.model_construct(name=file, size=length, samples=1, xxh3_128="")
        for file, length in zip(names, lengths, strict=True)
    ]
    zeros = np.zeros(len(files), np.uint64)
    table = make_table(
        {
            "shard": np.arange(len(files)),
            "length": np.array(lengths),
            "offset": zeros,
            "checksum": zeros,
            "label": np.array(labels),
            "width": np.array(width),
            "height": np.array(height),
        },
        [file.rpartition(".")[0] for file in names],
    )
    header = Header.model_construct(
        name=name,
        samples=len(files),
        classes=classes,
        options={},
        source="",
        counts={},
        table=TableFile.model_construct(size=0, xxh3_128=""),
        shards=shards,
    )
    reopen = partial(open_files, root, files, labels, classes, name, side)
    store = _FileStore(list(files), header, table, _OPEN_FILES, reopen)
    store.path = root  # rather than the first file's folder
    return store


class _FileStore(Store):
    def fetch(self, ids: Sequence[int] | npt.NDArray[Any], check: bool = True, copy: bool = True) -> Records:
        # A process may map some 65,000 files, and needs some of these mappings for other things.
        return super().fetch(ids, check, copy=True)


def _size(path: Path) -> tuple[int, int] | None:
    """Width and height by the file's header; None where it is no image."""
    try:
        with Image.open(path) as image:
            return image.size
    except (OSError, ValueError, SyntaxError):  # Pillow raises each of them for damaged files
        return None
