"""Write one shard: read each sample, check it, put it in, note what it is. Runs in a worker process."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from shards.manifest import make_table
from shards.parts import Oddity, Part, save_part
from shards.plan import Task
from shards.scan import Scan, scan
from shards.source import Sample, SampleReader, place
from shards.target import Record

_JPEG_NAMES = {".jpg", ".jpeg", ".jpe", ".jfif"}
# From here Pillow warns: an image takes 270 MB when it is decoded.
_HUGE_PIXELS = 89_478_485
_PNG_DEPTH_AT = 24


class BadImageError(ValueError):
    """An image is damaged, and damage is to stop the build."""


class _FaultError(ValueError):
    pass


@dataclass(frozen=True)
class _Image:
    data: bytes
    found: Scan
    oddities: list[str]
    """Of the image as the source has it."""
    encoded: bool
    """Whether it was encoded again."""


def write_shard(task: Task) -> Part:
    """Write one shard and its part file.

    Raises:
        BadImageError: naming the image and what is wrong with it.
        OSError: the shard cannot be written.
    """
    rows: dict[str, list[int]] = {
        name: [] for name in ("offset", "length", "label", "width", "height", "checksum")
    }
    keys: list[str] = []
    counts: Counter[str] = Counter()
    oddities: list[Oddity] = []
    rejected: list[tuple[str, str]] = []
    temporary = task.work / f"{task.path.name}.{os.getpid()}.tmp"
    with (
        SampleReader(task.root) as reader,
        task.target.writer(task.path, temporary, len(task.samples)) as writer,
    ):
        for sample, key in zip(task.samples, task.keys, strict=True):
            try:
                image = _image(task, reader, sample)
            except _FaultError as fault:
                if task.options.on_error == "stop":
                    raise BadImageError(f"{place(task.root, sample)}: {fault}") from None
                rejected.append((sample.path, str(fault)))
                continue
            data, found = image.data, image.found
            assert found.format, "a sound image has a format"
            checksum = xxhash.xxh3_64_intdigest(data)
            record = Record(key, found.format, data, sample.label, found.width, found.height, checksum)
            rows["offset"].append(writer.add(record))
            rows["length"].append(len(data))
            rows["label"].append(sample.label)
            rows["width"].append(found.width)
            rows["height"].append(found.height)
            rows["checksum"].append(checksum)
            keys.append(key)
            counts.update(image.oddities)
            if image.encoded:
                counts["encoded"] += 1
            if image.oddities:
                oddities.append((sample.path, key, image.oddities, image.encoded))
        shard = writer.finish()
    columns: dict[str, npt.NDArray[Any]] = {
        name: np.array(values, dtype=np.uint64) for name, values in rows.items()
    }
    table = make_table({**columns, "shard": np.zeros(len(keys), dtype=np.uint32)}, keys)
    part = Part(shard, dict(counts), oddities, rejected, table)
    save_part(task, part)
    return part


def _image(task: Task, reader: SampleReader, sample: Sample) -> _Image:
    """A sample as it goes into the shard.

    Raises:
        _FaultError: what is wrong with it.
    """
    data, found = _read(reader, sample)
    oddities = list(_oddities(sample.path, data, found))
    how = task.options.conversion()
    encoded = how.wanted(found)
    if not encoded and task.target.jpeg_only and (found.format != "jpeg" or found.components == 4):
        kind = "PNG" if found.format == "png" else "CMYK JPEG"
        raise _FaultError(
            f"a {kind}, and a .beton holds grey and RGB JPEGs only; build with --convert oddities"
        )
    if encoded or task.options.validate == "decode":
        from shards.picture import PictureError, check_decodes, convert  # workers start faster without it

        try:
            if encoded:
                data = convert(data, found, how)
                found = scan(data)
            else:
                check_decodes(data, found)
        except PictureError as error:
            raise _FaultError(str(error)) from None
    most = task.target.most_bytes
    if most is not None and len(data) > most:
        raise _FaultError(
            f"{len(data)} bytes, and a page of a .beton holds {most}; make the image smaller "
            "(--shorter-side, --quality), or build tars"
        )
    return _Image(data, found, oddities, encoded)


def _read(reader: SampleReader, sample: Sample) -> tuple[bytes, Scan]:
    """The bytes of a sample and what they are; sound by their structure."""
    if sample.size >= 2**32:
        raise _FaultError("larger than 4 GiB")
    try:
        data = reader.read(sample)
    except OSError as error:
        raise _FaultError(f"cannot be read: {error.strerror}") from None
    if len(data) != sample.size:
        number = "more" if len(data) > sample.size else len(data)
        raise _FaultError(f"changed during the build: {sample.size} bytes when listed, {number} when read")
    found = scan(data)
    if found.fault:
        raise _FaultError(found.words)
    return data, found


def _oddities(path: str, data: bytes, found: Scan) -> Iterator[str]:
    extension = os.path.splitext(path)[1].lower()
    if found.format == "png":
        yield "png"
        if extension in _JPEG_NAMES:
            yield "misnamed"
        if data[_PNG_DEPTH_AT] == 16:
            yield "deep"
    else:
        if extension == ".png":
            yield "misnamed"
        if found.components == 4:
            yield "cmyk"
    if found.components <= 2:
        yield "grey"
    if found.orientation != 1:
        yield "rotated"
    if found.width * found.height > _HUGE_PIXELS:
        yield "huge"
