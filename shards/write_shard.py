"""Write one shard: read each sample, check it, put it in, note what it is. Runs in a worker process."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from shards.manifest import make_table
from shards.parts import Part, save_part
from shards.plan import Task
from shards.scan import Scan, scan
from shards.source import Sample, SampleReader, place
from shards.target import Record


class BadImageError(ValueError):
    """An image is damaged, and damage is to stop the build."""


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
    rejected: list[tuple[str, str]] = []
    temporary = task.work / f"{task.path.name}.{os.getpid()}.tmp"
    with (
        SampleReader(task.root) as reader,
        task.target.writer(task.path, temporary, len(task.samples)) as writer,
    ):
        for sample, key in zip(task.samples, task.keys, strict=True):
            data, found, fault = _read(reader, sample, task.options.validate)
            if fault is not None:
                if task.options.on_error == "stop":
                    raise BadImageError(f"{place(task.root, sample)}: {fault}")
                rejected.append((sample.path, fault))
                continue
            assert found.format, "a sound image has a format"
            record = Record(key, found.format, data, sample.label, found.width, found.height)
            rows["offset"].append(writer.add(record))
            rows["length"].append(len(data))
            rows["label"].append(sample.label)
            rows["width"].append(found.width)
            rows["height"].append(found.height)
            rows["checksum"].append(xxhash.xxh3_64_intdigest(data))
            keys.append(key)
            counts.update(_oddities(sample.path, found))
        shard = writer.finish()
    columns: dict[str, npt.NDArray[Any]] = {
        name: np.array(values, dtype=np.uint64) for name, values in rows.items()
    }
    table = make_table({**columns, "shard": np.zeros(len(keys), dtype=np.uint32)}, keys)
    part = Part(shard, dict(counts), rejected, table)
    save_part(task, part)
    return part


_NOTHING = scan(b"")


def _read(reader: SampleReader, sample: Sample, validate: str) -> tuple[bytes, Scan, str | None]:
    """The bytes of a sample, what they are, and what is wrong with them."""
    if sample.size >= 2**32:
        return b"", _NOTHING, "larger than 4 GiB"
    try:
        data = reader.read(sample)
    except OSError as error:
        return b"", _NOTHING, f"cannot be read: {error.strerror}"
    found = scan(data)
    return data, found, _fault_of(sample, data, found, validate)


def _fault_of(sample: Sample, data: bytes, found: Scan, validate: str) -> str | None:
    if len(data) != sample.size:
        return f"changed during the build: {sample.size} bytes when listed, another number when read"
    if found.fault:
        return found.words
    if validate == "decode":
        from PIL import Image  # only where wanted: workers start faster without it

        try:
            with Image.open(io.BytesIO(data)) as picture:
                picture.load()
        except Exception as error:  # decoders raise whatever they like on damaged data
            return f"does not decode: {error}"
    return None


def _oddities(path: str, found: Scan) -> Iterator[str]:
    extension = os.path.splitext(path)[1].lower()
    if found.format == "jpeg":
        if found.components == 4:
            yield "cmyk"
    else:
        yield "png"
    if found.components <= 2:
        yield "grey"
    if (extension == ".png") != (found.format == "png"):
        yield "misnamed"
    if found.orientation != 1:
        yield "rotated"
