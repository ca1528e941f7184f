"""Tell what a source is by what is there, and list it."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path
from typing import Literal

from shards.labels import read_classes, with_classes
from shards.manifest import HEADER_NAME, UNFINISHED
from shards.options import BuildOptions
from shards.source import IMAGE_EXTENSIONS, Listing
from shards.source_archive import list_class_tars, list_flat_tar
from shards.source_folder import list_image_folder
from shards.source_list import LIST_EXTENSIONS, list_listed_images
from shards.source_store import list_shards
from shards.tar_index import members

_GZIP = b"\x1f\x8b"
_PEEK = 50
_KINDS = (
    "a folder of class folders, of WebDataset tars, of class tars or with a .beton; a tar; a .beton; "
    "a .csv or .jsonl list; or a pattern like train-{000000..000099}.tar"
)


def list_source(options: BuildOptions) -> Listing:
    """List the samples of `--source`, with labels in the order of `--classes` where that is given.

    Raises:
        FileNotFoundError: the source, or a file that it names, is not there.
        ValueError: it is none of the known kinds, is damaged, or has a class outside `--classes`.
    """
    listing = _list(options.source, options.labels)
    if options.classes is None:
        return listing
    return with_classes(listing, read_classes(options.classes), str(options.classes))


def _list(source: Path, labels: Path | None) -> Listing:
    flat = source.is_file() and source.suffix.lower() == ".tar" and _kind_of_tar(source) == "images"
    if flat and labels is None:
        raise ValueError(
            f"{source}: a tar of images without labels; say where those are with --labels "
            "(ILSVRC2012_devkit_t12.tar.gz, LOC_val_solution.csv, or lines `image class`)"
        )
    if labels is not None:
        if not flat:
            raise ValueError(f"--labels {labels} goes with a tar of images alone, which {source} is not")
        return list_flat_tar(source, labels)
    if source.is_dir():
        tars = sorted(source.glob("*.tar"))
        ours = (source / HEADER_NAME).exists() or (source / UNFINISHED).exists()
        if ours or any(source.glob("*.beton")) or (tars and _kind_of_tar(tars[0]) == "webdataset"):
            return list_shards(source)
        folders = sorted(e.name for e in os.scandir(source) if e.is_dir() and not e.name.startswith("."))
        if tars and folders:
            raise ValueError(
                f"{source}: holds tars of images ({tars[0].name}) and folders ({folders[0]}), either of which may "
                "be classes; unpack the tars, or move the one or the other elsewhere"
            )
        if tars:
            return list_class_tars(source)
        return list_image_folder(source)
    suffix = source.suffix.lower()
    if suffix in LIST_EXTENSIONS:
        return list_listed_images(source)
    if suffix == ".beton" or "{" in str(source):
        return list_shards(source)
    if suffix == ".tar" and source.is_file():
        return list_class_tars(source) if _kind_of_tar(source) == "tars" else list_shards(source)
    if source.is_file():
        with source.open("rb") as file:
            packed = file.read(2) == _GZIP
        what = "compressed, so it cannot be read in place: gunzip it" if packed else "a file of no known kind"
        raise ValueError(f"{source}: {what}; wanted {_KINDS}")
    raise FileNotFoundError(f"{source}: no such file or folder; wanted {_KINDS}")


def _kind_of_tar(path: Path) -> Literal["tars", "webdataset", "images"]:
    """What the first members of a tar make it: class tars, WebDataset samples, or images alone."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        first = list(islice(members(fd, 0, os.fstat(fd).st_size, str(path)), _PEEK))
    finally:
        os.close(fd)
    extensions = [os.path.splitext(member.name)[1].lower() for member in first]
    if extensions and all(extension == ".tar" for extension in extensions):
        return "tars"
    return "images" if all(extension in IMAGE_EXTENSIONS for extension in extensions) else "webdataset"
