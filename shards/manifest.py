"""The manifest of a shard set: a small JSON header and a binary table that is mapped, not parsed.

    manifest.json    what the set is: version, storage, classes, build options, shard files
    manifest.table   one row per sample, column by column (below)

Table layout, little-endian, every part on a 64-byte boundary and zero-padded to the next: 8 bytes
`VQSATAB1`, u64 rows, u64 bytes of keys; then the columns of `COLUMNS` in their order, `rows` values
each; then the keys as UTF-8 without separators (`key_end` says where each one ends).

The header names the table's size and xxh3 checksum, so two halves of different builds do not pass for
one set. It is written last: a folder without it is an unfinished build. What is loaded here may come
from a stranger: sizes and counts are checked against the files before anything is mapped, the rows
against the shards' sizes before anyone reads through them, and names cannot leave the folder.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import pydantic_core
import xxhash
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

VERSION = 1
HEADER_NAME = "manifest.json"
TABLE_NAME = "manifest.table"
UNFINISHED = ".build"
"""Folder in a set's folder while it is being built."""

COLUMNS: tuple[tuple[str, str], ...] = (
    ("shard", "<u4"),  # index into the header's shards
    ("length", "<u4"),  # bytes of the encoded image
    ("offset", "<u8"),  # of the encoded image in its shard
    ("checksum", "<u8"),  # xxh3-64 of the encoded image
    ("key_end", "<u8"),  # in the bytes of keys
    ("label", "<i4"),  # index into the header's classes
    ("width", "<i4"),  # pixels as stored, before EXIF orientation
    ("height", "<i4"),
)

_MAGIC = b"VQSATAB1"
_ALIGN = 64
_MAX_HEADER_BYTES = 64 << 20
MAX_SIDE = 1_000_000


def _printable(name: str) -> str:
    if not name.isprintable():
        raise ValueError(f"file name {name!r} cannot be printed")
    return name


FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)]
# Of a shard, which may be somebody else's file: anything that stays in the folder and can be printed.
_SHARD_NAME = r"^[^./\\][^/\\]*$"
ShardName = Annotated[str, Field(pattern=_SHARD_NAME, max_length=250), AfterValidator(_printable)]
Storage = Literal["webdataset", "ffcv"]
Hex128 = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Count = Annotated[int, Field(ge=0, lt=2**62)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class ShardFile(_Record):
    """One file with records."""

    name: ShardName
    size: Count
    """Bytes."""
    samples: Count
    xxh3_128: Hex128
    """Of the whole file; of a `.beton` see `shards.beton.digest`."""


def check_shard_name(path: Path) -> None:
    """Refuse a file whose name no manifest can hold.

    Raises:
        ValueError: the name is hidden, too long, or cannot be printed.
    """
    try:
        ShardFile(name=path.name, size=0, samples=0, xxh3_128="0" * 32)
    except ValidationError:
        raise ValueError(
            f"{path.parent}{os.sep}{path.name!r}: a name that a manifest cannot hold (hidden, longer than 250 "
            "characters, a backslash, or not to be printed); rename the file"
        ) from None


class TableFile(_Record):
    """What the binary table beside the header must be."""

    size: Count
    xxh3_128: Hex128


class Header(_Record):
    """`manifest.json`."""

    format: Literal["vqsa-shards"] = "vqsa-shards"
    version: Literal[1] = 1
    storage: Storage = "webdataset"
    """How the shard files are laid out: WebDataset tars or FFCV `.beton` files; the table is the same."""
    name: FileName
    samples: Count
    classes: list[str]
    """Class names; a label is an index into them."""
    options: dict[str, Any]
    """The build options that decide the shards' bytes."""
    source: Hex128
    """xxh3-128 over the sources' relative names, labels and sizes, in the order of the rows before any
    sample was rejected."""
    counts: dict[str, Count]
    """Oddities met while building, by kind (`grey`, `cmyk`, `png`, `misnamed`, `rotated`, `rejected`)."""
    table: TableFile
    shards: list[ShardFile]


@dataclass(frozen=True)
class Table:
    """The rows of a manifest: one read-only array per column (`COLUMNS` has the dtypes), N values each."""

    columns: dict[str, npt.NDArray[Any]]
    keys_u8: npt.NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.columns["shard"])

    def key(self, index: int) -> str:
        """The key of row `index` (0 <= index < N)."""
        ends = self.columns["key_end"]
        begin = int(ends[index - 1]) if index else 0
        return self.keys_u8[begin : int(ends[index])].tobytes().decode("utf-8", errors="replace")


def make_table(columns: dict[str, npt.NDArray[Any]], keys: Sequence[str]) -> Table:
    """Build a table from columns without `key_end` and one key per row."""
    encoded = [key.encode("utf-8") for key in keys]
    ends = np.cumsum(np.array([len(key) for key in encoded], dtype=np.uint64), dtype=np.uint64)
    given = {**columns, "key_end": ends}
    return Table(
        {name: np.ascontiguousarray(given[name], dtype=dtype) for name, dtype in COLUMNS},
        np.frombuffer(b"".join(encoded), dtype=np.uint8),
    )


def join_tables(tables: Sequence[Table]) -> Table:
    """Put tables one after the other; table k's rows get shard number k."""
    columns: dict[str, npt.NDArray[Any]] = {}
    for name, dtype in COLUMNS:
        columns[name] = np.concatenate([np.empty(0, dtype), *(t.columns[name] for t in tables)], dtype=dtype)
    rows = [len(t) for t in tables]
    columns["shard"] = np.repeat(np.arange(len(tables), dtype="<u4"), rows)
    key_bytes = np.array([len(t.keys_u8) for t in tables], dtype=np.uint64)
    columns["key_end"] = columns["key_end"] + np.repeat(np.cumsum(key_bytes) - key_bytes, rows)
    return Table(columns, np.concatenate([np.empty(0, np.uint8), *(t.keys_u8 for t in tables)]))


def _layout(rows: int, key_bytes: int) -> tuple[list[int], int, int]:
    """Offsets of the columns, offset of the keys, and size of a table file."""
    at, begins = _ALIGN, []
    for _, dtype in COLUMNS:
        begins.append(at)
        at += -(-rows * np.dtype(dtype).itemsize // _ALIGN) * _ALIGN
    return begins, at, at + -(-key_bytes // _ALIGN) * _ALIGN


def encode_table(table: Table) -> bytearray:
    """The bytes of a table file."""
    rows, key_bytes = len(table), len(table.keys_u8)
    begins, keys_at, size = _layout(rows, key_bytes)
    out = bytearray(size)
    out[:24] = _MAGIC + rows.to_bytes(8, "little") + key_bytes.to_bytes(8, "little")
    for (name, _), begin in zip(COLUMNS, begins, strict=True):
        column = table.columns[name]
        out[begin : begin + column.nbytes] = column.tobytes()
    out[keys_at : keys_at + key_bytes] = table.keys_u8.tobytes()
    return out


def decode_table(buffer: bytes | bytearray | memoryview | mmap.mmap, where: str) -> Table:
    """Views into the bytes of a table file.

    Raises:
        ValueError: if the bytes are not a table or are longer or shorter than it says.
    """
    size = len(buffer)
    if size < _ALIGN or bytes(buffer[:8]) != _MAGIC:
        raise ValueError(
            f"{where}: not a manifest table ({size} bytes without its signature); build the set again"
        )
    rows, key_bytes = (int.from_bytes(buffer[at : at + 8], "little") for at in (8, 16))
    begins, keys_at, wanted = _layout(rows, key_bytes)
    if wanted != size:
        raise ValueError(
            f"{where}: {rows} rows and {key_bytes} bytes of keys make {wanted} bytes, found {size}; "
            "the table is damaged or cut off: copy or build the set again"
        )
    columns: dict[str, npt.NDArray[Any]] = {}
    for (name, dtype), begin in zip(COLUMNS, begins, strict=True):
        columns[name] = np.frombuffer(buffer, dtype=dtype, count=rows, offset=begin)
        columns[name].flags.writeable = False
    keys_u8 = np.frombuffer(buffer, dtype=np.uint8, count=key_bytes, offset=keys_at)
    keys_u8.flags.writeable = False
    return Table(columns, keys_u8)


def check_table(
    table: Table, header: Header, where: str, remedy: str = "the table is damaged: build the set again"
) -> None:
    """Refuse rows that point outside their shard, overlap, or point outside the class list or the keys.

    Raises:
        ValueError: naming the first bad row and what is wrong with it.
    """
    c = table.columns
    if not len(table) == header.samples == sum(shard.samples for shard in header.shards):
        raise ValueError(
            f"{where}: {len(table)} rows, but the header says {header.samples} samples and its shards "
            f"{sum(shard.samples for shard in header.shards)}; build the set again"
        )
    if len({shard.name for shard in header.shards}) != len(header.shards):
        raise ValueError(f"{where}: a shard file is listed twice; build the set again")

    def refuse(bad: npt.NDArray[np.bool_], what: str) -> None:
        if bad.any():
            row = int(np.argmax(bad))
            raise ValueError(f"{where}: row {row}: {what}; {remedy}")

    samples = np.array([shard.samples for shard in header.shards], dtype=np.int64)
    rows_of_shard = np.repeat(np.arange(len(samples), dtype="<u4"), samples)
    refuse(c["shard"] != rows_of_shard, "does not lie in the shard that the header's counts put it in")
    size = np.array([shard.size for shard in header.shards], dtype=np.uint64)[rows_of_shard]
    end = c["offset"] + c["length"]
    past_end = (c["offset"] > size) | (c["length"] > size - c["offset"])
    refuse(past_end, "the record reaches past the end of its shard")
    # Several writers may have worked on one file, so rows and records need not be in the same order.
    ascending = bool(
        np.all((c["offset"][1:] >= c["offset"][:-1]) | (rows_of_shard[1:] != rows_of_shard[:-1]))
    )
    order = slice(None) if ascending else np.lexsort((c["offset"], rows_of_shard))
    begin, stop, shard = c["offset"][order], end[order], rows_of_shard[order]
    overlap = np.zeros(len(table), dtype=np.bool_)
    overlap[order] = np.append(False, (begin[1:] < stop[:-1]) & (shard[1:] == shard[:-1]))[: len(table)]
    refuse(overlap, "the record overlaps another one")
    no_class = (c["label"] < 0) | (c["label"] >= len(header.classes))
    refuse(no_class, f"its label is outside 0..{len(header.classes) - 1}")
    for side in ("width", "height"):
        refuse((c[side] < 1) | (c[side] > MAX_SIDE), f"its {side} is outside 1..{MAX_SIDE}")
    backwards = np.zeros(len(table), dtype=np.bool_)
    backwards[1:] = c["key_end"][1:] < c["key_end"][:-1]
    refuse(backwards | (c["key_end"] > len(table.keys_u8)), "its key lies outside the bytes of keys")


def write_manifest(folder: Path, header: Header, encoded_table: bytes | bytearray) -> None:
    """Write both files durably, the header last; `header.table` must describe `encoded_table`."""
    write_file(folder / TABLE_NAME, encoded_table)
    text = pydantic_core.to_json(header.model_dump(), indent=1) + b"\n"
    write_file(folder / HEADER_NAME, text)


def describe_table(encoded_table: bytes | bytearray) -> TableFile:
    """What a header must say about a table file."""
    return TableFile(size=len(encoded_table), xxh3_128=xxhash.xxh3_128_hexdigest(encoded_table))


def write_file(path: Path, data: bytes | bytearray) -> None:
    """Write a file so that after a crash it is either whole or not there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def read_header(folder: Path) -> Header:
    """Read and validate `manifest.json`.

    Raises:
        FileNotFoundError: if the folder or the manifest is not there.
        ValueError: if it is not a manifest this version reads.
    """
    if not folder.exists():
        raise FileNotFoundError(
            f"{folder}: no such folder; build shards with tools/build_shards.py --out {folder}"
        )
    if not folder.is_dir():
        raise ValueError(f"{folder}: a file, but a shard set is a folder with {HEADER_NAME}; give its folder")
    path = folder / HEADER_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder}: no {HEADER_NAME}, so this is not a finished shard set; if a build was interrupted, "
            "run the same tools/build_shards.py command again and it continues"
        )
    size = path.stat().st_size
    if size > _MAX_HEADER_BYTES:
        raise ValueError(f"{path}: {size} bytes, but a manifest header has at most {_MAX_HEADER_BYTES}")
    text = path.read_bytes()
    try:
        loose = pydantic_core.from_json(text)
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); copy or build the set again") from None
    if not isinstance(loose, dict) or loose.get("format") != "vqsa-shards":
        raise ValueError(f'{path}: not a vqsa shard manifest (no "format": "vqsa-shards")')
    if loose.get("version") != VERSION:
        raise ValueError(
            f"{path}: manifest version {loose.get('version')!r}, this vqsa reads version {VERSION}; "
            "build the set again or use the vqsa that built it"
        )
    try:
        return Header.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ValueError(
            f"{path}: {place}: {first['msg']}; the manifest is damaged: build the set again"
        ) from None


def read_table(folder: Path, header: Header) -> Table:
    """Map and validate `manifest.table`.

    Raises:
        FileNotFoundError: if the table is not there.
        ValueError: if it is not the table that the header describes, or a row of it is not possible.
    """
    path = folder / TABLE_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: missing, and {HEADER_NAME} alone lists no samples; copy or build the set again"
        )
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size != header.table.size or size < _ALIGN:
            raise ValueError(
                f"{path}: {size} bytes, {HEADER_NAME} says {header.table.size}; copy or build the set again"
            )
        mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    if xxhash.xxh3_128_hexdigest(mapped) != header.table.xxh3_128:
        raise ValueError(f"{path}: checksum differs from {HEADER_NAME}'s; copy or build the set again")
    table = decode_table(mapped, str(path))
    check_table(table, header, str(path))
    return table
