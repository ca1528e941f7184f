"""What every source is to the builder: a list of byte ranges of files, each with a label and a key.

A file of a folder is a range of its own; a member of a tar or a record of a .beton is a range of that
file, read in place. So the worker that writes a shard has one way to read, whatever the source is.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

_MAX_OPEN = 8

# What counts as an image by its name. Formats that shards cannot hold are listed too, so that they are
# named as faults instead of being passed over.
IMAGE_EXTENSIONS = {".jpg", ".jpeg", ".jpe", ".jfif", ".png"}
IMAGE_EXTENSIONS |= {".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp", ".avif", ".heic", ".jp2"}


@dataclass(frozen=True, slots=True)
class Sample:
    """One encoded image of a source."""

    path: str
    """Its name in the source, with `/`: `n01440764/n01440764_18.JPEG`."""
    key: str
    """The key it should have; the plan tells equal ones apart."""
    label: int
    """Index into the listing's classes."""
    file: str
    """The file that holds it, below the listing's root."""
    offset: int | None
    """First byte in that file; None where the image is the whole file."""
    size: int
    """Bytes; 0 where the file cannot be looked at, which reading it will explain."""
    stamp: int
    """Another value when the file was replaced or touched."""


@dataclass(frozen=True)
class Listing:
    """What a source holds."""

    root: Path
    """Absolute; the files of the samples are below it, or absolute themselves."""
    classes: list[str]
    samples: list[Sample]
    """In the order in which an unshuffled set has them; the same on every run."""
    ignored: int
    """Files that were passed over because their names are not those of images."""
    numbered: bool = False
    """Whether the source numbers its classes and `classes` are these numbers, not names that it gives."""


def place(root: Path, sample: Sample) -> str:
    """Where a sample is, in words for messages."""
    file = os.path.join(root, sample.file)
    return file if sample.offset is None else f"{file}: {sample.path}"


class SampleReader:
    """Reads samples of one listing; keeps the last few archives open. Use it as a context, in one thread."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._fds: OrderedDict[str, int] = OrderedDict()

    def read(self, sample: Sample) -> bytes:
        """The sample's bytes; fewer or more than `sample.size` where the file has changed.

        Raises:
            OSError: the file cannot be read.
        """
        path = os.path.join(self._root, sample.file)
        if sample.offset is None:
            fd = _open(path)
            try:
                # One byte more than listed shows a file that has grown, however large it is now.
                return _exactly(fd, sample.size + 1, 0)
            finally:
                os.close(fd)
        found = self._fds.get(path)
        if found is None:
            if len(self._fds) == _MAX_OPEN:
                os.close(self._fds.popitem(last=False)[1])
            found = self._fds[path] = _open(path)
        self._fds.move_to_end(path)
        return _exactly(found, sample.size, sample.offset)

    def __enter__(self) -> SampleReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._fds:
            os.close(self._fds.popitem()[1])


def _open(path: str) -> int:
    """A descriptor of a regular file; anything else could keep the reader waiting for ever."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file")
    return fd


def _exactly(fd: int, size: int, offset: int) -> bytes:
    """`size` bytes of a file from `offset`, fewer only at its end."""
    data = os.pread(fd, size, offset)
    while len(data) < size and (more := os.pread(fd, size - len(data), offset + len(data))):
        data += more
    return data
