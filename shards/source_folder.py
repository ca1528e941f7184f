"""Images of a folder `<class>/<image>`, the layout of torchvision's ImageFolder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from shards.keys import sample_key
from shards.source import IMAGE_EXTENSIONS, Listing, Sample


def list_image_folder(root: Path) -> Listing:
    """List a source folder: classes are the sorted folder names, samples sorted by class, then by path.

    Folders inside a class folder are walked too; names beginning with a dot are passed over.

    Raises:
        ValueError: if it holds no class folders, one of them holds no images, or a link that may be a folder's
            leads nowhere.
    """
    with os.scandir(root) as entries:
        top = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
    classes = [entry.name for entry in top if entry.is_dir()]
    loose = [entry.name for entry in top if not entry.is_dir()]
    for entry in top:
        _refuse_broken_link(entry)  # a class that is left out would shift the labels behind it
    if not classes:
        found = f"{len(loose)} files and no folders" if loose else "nothing"
        raise ValueError(f"{root}: wanted one folder per class (<class>/<image>), found {found}")
    for name in classes:
        if not name.isprintable():
            raise ValueError(f"{root}: class folder {name!r} has a name that cannot be printed; rename it")
    samples: list[Sample] = []
    ignored = len(loose)
    for label, name in enumerate(classes):
        before = len(samples)
        for path, entry in sorted(_files(os.path.join(root, name), name, ()), key=lambda found: found[0]):
            if os.path.splitext(path)[1].lower() not in IMAGE_EXTENSIONS:
                _refuse_broken_link(entry)
                ignored += 1
                continue
            try:
                info = entry.stat()
                size, stamp = info.st_size, info.st_mtime_ns
            except OSError:  # a broken link: reading it names the reason
                size = stamp = 0
            key = sample_key(name, path.partition("/")[2])
            samples.append(Sample(path, key, label, path, None, size, stamp))
        if len(samples) == before:
            raise ValueError(
                f"{os.path.join(root, name)}: a class folder without images; every folder in --source is "
                "a class: remove this one, or put its images there"
            )
    return Listing(root.absolute(), classes, samples, ignored)


def _refuse_broken_link(entry: os.DirEntry[str]) -> None:
    if entry.is_symlink() and not os.path.exists(entry.path):
        raise ValueError(
            f"{entry.path}: a link to {os.readlink(entry.path)!r}, which is not there; it may have been a folder "
            "of images: mend the link, or remove it"
        )


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
