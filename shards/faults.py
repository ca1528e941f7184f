"""Faults of shard sets, in words, and what can be wrong with one image whatever file it lies in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import xxhash

from shards.manifest import Table
from shards.scan import Scan, scan

_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong."""

    file: str
    """Name of the file in the set's folder."""
    sample: str | None
    """Key of the sample; None where the whole file is meant."""
    problem: str
    remedy: str

    def __str__(self) -> str:
        place = self.file if self.sample is None else f"{self.file}, sample {self.sample}"
        return f"{place}: {self.problem}; {self.remedy}"


def copy_or_rebuild(number: int) -> str:
    """The remedy for shard `number` of a set that the builder wrote."""
    return (
        "copy the shard again from where it is whole, or write it again with "
        f"tools/build_shards.py --only {number}"
    )


REBUILD = "the manifest and the shard are not of one build: copy both again, or build the set again"


def image_problem(data: bytes, table: Table, row: int, decode: bool) -> str | None:
    """What is wrong with the bytes of an image, against its row; None where nothing is."""
    if xxhash.xxh3_64_intdigest(data) != int(table.columns["checksum"][row]):
        return "the image's checksum differs from the manifest's"
    width, height = (int(table.columns[c][row]) for c in ("width", "height"))
    seen = scan(data, width, height)
    if seen.fault:
        return f"{seen.words} (the manifest says {width} x {height} pixels)"
    return decode_problem(data, seen) if decode else None


def decode_problem(data: bytes, seen: Scan) -> str | None:
    """What a decoder says against an image that the scan finds sound; None where it decodes."""
    from shards.picture import PictureError, check_decodes  # only where wanted

    try:
        check_decodes(data, seen)
    except PictureError as error:
        return str(error)
    return None


def chunks(fd: int, at: int, until: int = 2**63 - 1) -> Iterator[bytes]:
    """The bytes of a file from `at`, to `until` or its end."""
    while at < until and (chunk := os.pread(fd, min(_CHUNK, until - at), at)):
        yield chunk
        at += len(chunk)


def hash_file(fd: int) -> str:
    """xxh3-128 of a whole file."""
    digest = xxhash.xxh3_128()
    for chunk in chunks(fd, 0):
        digest.update(chunk)
    return digest.hexdigest()
