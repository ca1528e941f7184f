"""The ILSVRC2012 archives as they were published, read in place: a tar of class tars, and the flat
validation tar with its labels in another file.

The samples are named, ordered and keyed as those of the unpacked folder `<class>/<image>`, so both give
the same shards.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from shards.keys import sample_key
from shards.label_file import read_labels
from shards.labels import label_number, number_classes
from shards.source import IMAGE_EXTENSIONS, Listing, Sample
from shards.tar_index import Member, members


def list_class_tars(path: Path) -> Listing:
    """List a tar of class tars, or a folder of them: classes are the inner tars' names, sorted.

    Args:
        path: `ILSVRC2012_img_train.tar`, or a folder with `n01440764.tar` and so on.

    Raises:
        ValueError: an archive is damaged, a class has no images, or a member's name leads out of it.
    """
    archives = sorted(path.glob("*.tar")) if path.is_dir() else [path]
    root = path.absolute() if path.is_dir() else path.absolute().parent
    found: dict[str, list[Sample]] = {}
    ignored = 0
    for archive in archives:
        fd = os.open(archive, os.O_RDONLY | os.O_CLOEXEC)
        try:
            info = os.fstat(fd)
            inner = (
                [Member(archive.name, 0, info.st_size)]
                if path.is_dir()
                else list(members(fd, 0, info.st_size, str(archive)))
            )
            for tar in inner:
                name, extension = os.path.splitext(os.path.basename(tar.name))
                if extension.lower() != ".tar":
                    ignored += 1
                    continue
                if name in found or not name or not name.isprintable():
                    raise ValueError(
                        f"{archive}: class {name!r} stands there twice, or its name cannot be printed"
                    )
                where = str(archive) if path.is_dir() else f"{archive}: {tar.name}"
                images = []
                for member in members(fd, tar.offset, tar.offset + tar.size, where):
                    below = _inside(member, where)
                    if os.path.splitext(below)[1].lower() not in IMAGE_EXTENSIONS:
                        ignored += 1
                        continue
                    place = (archive.name, member.offset, member.size, info.st_mtime_ns)
                    images.append(Sample(f"{name}/{below}", sample_key(name, below), 0, *place))
                if not images:
                    raise ValueError(f"{where}: a class without images; every inner tar is a class")
                found[name] = images
        finally:
            os.close(fd)
    if not found:
        raise ValueError(f"{path}: wanted class tars (n01440764.tar and so on) inside, found none")
    classes = sorted(found)
    return Listing(root, classes, list(_in_order(found, classes)), ignored)


def list_flat_tar(path: Path, labels: Path) -> Listing:
    """List a tar of images whose classes are in another file.

    Args:
        path: `ILSVRC2012_img_val.tar`.
        labels: see `read_labels`.

    Raises:
        ValueError: an archive or the label file is damaged, or they do not fit.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        info = os.fstat(fd)
        inside = [(_inside(member, str(path)), member) for member in members(fd, 0, info.st_size, str(path))]
    finally:
        os.close(fd)
    images = sorted(
        ((name, m) for name, m in inside if os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS),
        key=lambda found: found[0],
    )
    ignored = len(inside) - len(images)
    classes = read_labels(labels, [name for name, _ in images], str(path))
    numbers = [number for text in classes if (number := label_number(text)) is not None]
    numbered = len(numbers) == len(classes)
    found: dict[str, list[Sample]] = {}
    for (name, member), class_name in zip(images, classes, strict=True):
        base = os.path.basename(name)
        place = (path.name, member.offset, member.size, info.st_mtime_ns)
        key = sample_key("" if numbered else class_name, base)
        found.setdefault(class_name, []).append(Sample(f"{class_name}/{base}", key, 0, *place))
    order = number_classes(numbers, str(labels)) if numbered else sorted(found)
    return Listing(path.absolute().parent, order, list(_in_order(found, order)), ignored, numbered)


def _inside(member: Member, where: str) -> str:
    """A member's name without a leading `./`, which must not lead out of the archive."""
    parts = [part for part in member.name.split("/") if part not in ("", ".")]
    if member.name.startswith("/") or ".." in parts or not parts:
        raise ValueError(
            f"{where}: a member named {member.name!r}, which leads out of the archive; remove it"
        )
    return "/".join(parts)


def _in_order(found: dict[str, list[Sample]], classes: list[str]) -> Iterator[Sample]:
    """Labelled samples by class and path, as in an image folder."""
    for label, name in enumerate(classes):
        for sample in sorted(found.get(name, []), key=lambda s: s.path):
            yield replace(sample, label=label)
