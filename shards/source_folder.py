"""Images of a folder `<class>/<image>`, the layout of torchvision's ImageFolder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# What counts as an image by its name. Formats that shards cannot hold are listed too, so that they are
# named as faults instead of being passed over.
_READABLE = {".jpg", ".jpeg", ".jpe", ".jfif", ".png"}
_OTHERS = {".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp", ".avif", ".heic", ".jp2"}


@dataclass(frozen=True, slots=True)
class SourceImage:
    """One image file."""

    path: str
    """Below the source folder, with `/`: `n01440764/n01440764_18.JPEG`."""
    label: int
    size: int
    """Bytes; 0 where the file cannot be looked at, which reading it will explain."""
    mtime_ns: int


@dataclass(frozen=True)
class SourceFolder:
    """What a source folder holds."""

    classes: list[str]
    """Sorted names of the class folders."""
    images: list[SourceImage]
    """Sorted by class, then by path."""
    ignored: int
    """Files whose names are not those of images."""


def list_image_folder(root: Path) -> SourceFolder:
    """List a source folder.

    Folders inside a class folder are walked too; names beginning with a dot are passed over.

    Raises:
        FileNotFoundError: if the folder is not there.
        ValueError: if it holds no class folders, or one of them holds no images.
    """
    if not root.exists():
        raise FileNotFoundError(
            f"{root}: no such folder; --source must be a folder of class folders with images"
        )
    if not root.is_dir():
        raise ValueError(f"{root}: a file; --source must be a folder of class folders with images")
    with os.scandir(root) as entries:
        top = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
    classes = [entry.name for entry in top if entry.is_dir()]
    loose = [entry.name for entry in top if not entry.is_dir()]
    if not classes:
        found = f"{len(loose)} files and no folders" if loose else "nothing"
        raise ValueError(f"{root}: wanted one folder per class (<class>/<image>), found {found}")
    for name in classes:
        if not name.isprintable():
            raise ValueError(f"{root}: class folder {name!r} has a name that cannot be printed; rename it")
    images: list[SourceImage] = []
    ignored = len(loose)
    for label, name in enumerate(classes):
        before = len(images)
        for path, entry in sorted(_files(os.path.join(root, name), name, ()), key=lambda found: found[0]):
            if os.path.splitext(path)[1].lower() not in _READABLE | _OTHERS:
                ignored += 1
                continue
            try:
                info = entry.stat()
                images.append(SourceImage(path, label, info.st_size, info.st_mtime_ns))
            except OSError:  # a broken link: reading it names the reason
                images.append(SourceImage(path, label, 0, 0))
        if len(images) == before:
            raise ValueError(
                f"{os.path.join(root, name)}: a class folder without images; every folder in --source is "
                "a class: remove this one, or put its images there"
            )
    return SourceFolder(classes, images, ignored)


def _files(
    folder: str, below: str, seen: tuple[tuple[int, int], ...]
) -> Iterator[tuple[str, os.DirEntry[str]]]:
    info = os.stat(folder)
    here = (info.st_dev, info.st_ino)
    if here in seen:
        raise ValueError(f"{folder}: a link that leads back into a folder above it; remove it")
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            path = f"{below}/{entry.name}"
            if entry.is_dir():
                yield from _files(entry.path, path, (*seen, here))
            else:
                yield path, entry
