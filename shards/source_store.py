"""Samples that are in shards already: a set of ours, WebDataset tars of others, or a .beton."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from shards.beton import SUFFIX, read_beton
from shards.foreign import tar_samples
from shards.index import CLASS_FILE
from shards.keys import clean_key
from shards.labels import number_classes, read_classes, with_classes
from shards.locate import locate
from shards.opening import open as open_store
from shards.opening import set_folder
from shards.source import Listing, Sample


def list_shards(path: Path) -> Listing:
    """List the samples of shards in their order, with their keys.

    Args:
        path: whatever `shards.open` opens. Of shards without a manifest only headers and labels are read here,
            so that a damaged image is a matter of the build; their classes are the names in them, sorted, or
            the numbers, which `classes.txt` beside the shards may give names to.

    Raises:
        FileNotFoundError: a file is not there, or the set is unfinished.
        ValueError: a manifest or a shard is damaged, or a sample has no image or no label.
    """
    if set_folder(path) is not None:
        return _ours(path)
    files = locate(path)
    found = [(file, *sample) for file in files for sample in _theirs(file)]
    root = files[0].parent
    stamps = {file: file.stat().st_mtime_ns for file in files}
    numbered = all(isinstance(label, int) for *_, label in found)
    if numbered:
        classes = number_classes((int(label) for *_, label in found), str(path))
    else:
        classes = sorted({str(label) for *_, label in found})
    index = {name: number for number, name in enumerate(classes)}
    samples = [
        Sample(
            f"{file.name}/{name}", clean_key(key), index[str(label)], file.name, offset, size, stamps[file]
        )
        for file, name, key, offset, size, label in found
    ]
    listing = Listing(root, classes, samples, 0, numbered)
    names = root / CLASS_FILE
    return with_classes(listing, read_classes(names), str(names)) if names.is_file() else listing


def _ours(path: Path) -> Listing:
    with open_store(path) as store:
        files = [str(file) for file in store.files]
        names = [os.path.basename(file) for file in files]
        stamps = [os.stat(file).st_mtime_ns for file in files]
        columns = (store.shard, store.offset, store.length, store.label)
        samples = []
        for i, (shard, offset, length, label) in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
            key = store.key(i)
            place = (files[shard], offset, length, stamps[shard])
            samples.append(Sample(f"{names[shard]}/{key}", clean_key(key), label, *place))
        # The manifest does not say whether "0", "1", ... were names; such classes are taken as numbers.
        numbered = store.classes == [str(number) for number in range(len(store.classes))]
        return Listing(store.path, store.classes, samples, 0, numbered)


def _theirs(file: Path) -> Iterator[tuple[str, str, int, int, int | str]]:
    """Name, key, offset, size and label of each sample of one file."""
    if file.suffix == SUFFIX:
        tables = read_beton(file)
        columns = (tables.label.tolist(), tables.offset.tolist(), tables.length.tolist())
        for number, (label, offset, length) in enumerate(zip(*columns, strict=True)):
            if label < 0:
                raise ValueError(
                    f"{file}, sample {number}: label {label} is negative; labels count classes from 0"
                )
            yield f"{number:08d}", f"{number:08d}", offset, length, label
        return
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for key, image, label in tar_samples(fd, file, os.fstat(fd).st_size):
            yield image.name, key, image.offset, image.size, label
    finally:
        os.close(fd)
