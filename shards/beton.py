"""Reads the tables of an FFCV `.beton` file, version 2, and refuses what does not add up.

    header                24 bytes
    field descriptors     1041 bytes each
    metadata table        one row per sample
    records               from a page boundary; none crosses a page
    allocation table      24 bytes each, to the end of the file, in any order

The format has no checksums, names or classes, and ffcv's own reader accepts a file that was cut off or
never finished. Here every count is compared with the file's size before memory is taken for it, and
every pointer with the allocation table, which alone knows how long a record is.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

SUFFIX = ".beton"
VERSION = 2
MIN_PAGE, MAX_PAGE = 1 << 21, 1 << 31
JPEG_MODE, RAW_MODE = 0, 1

HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("fields", "<u2"),
        ("page_size", "<u4"),
        ("samples", "<u8"),
        ("alloc_ptr", "<u8"),
    ]
)
DESCRIPTOR = np.dtype([("type", "u1"), ("name", "S16"), ("arguments", "V1024")])
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("ptr", "<u8")])
ALLOCATION = np.dtype([("sample", "<u8"), ("ptr", "<u8"), ("size", "<u8")])

INT_FIELD, IMAGE_FIELD = 1, 2
_FIELD_KINDS = {
    0: "float",
    INT_FIELD: "int",
    IMAGE_FIELD: "RGB image",
    3: "bytes",
    4: "array",
    5: "JSON",
    6: "torch tensor",
    255: "custom",
}
# Rows are 24 bytes in two tables: what a file beyond this claims is refused before it is sorted in memory.
_CHUNK = 1 << 20
ROW_BYTES = 24
_MAX_SAMPLES = 100_000_000


def metadata_type(image_first: bool = True) -> np.dtype[np.void]:
    """A row of the metadata table of an image and an int field: 24 bytes in either order."""
    fields: list[tuple[str, Any]] = [("image", IMAGE), ("label", "<i8")]
    return np.dtype(fields if image_first else fields[::-1], align=True)


@dataclass(frozen=True)
class BetonTables:
    """What a `.beton` says about its N samples, in their order; all pointers are inside the file."""

    page_size: int
    data_begin: int
    """Where the tables at the front end; the records come after it."""
    alloc_ptr: int
    """Where the records end and the allocation table begins."""
    label: npt.NDArray[np.int64]
    offset: npt.NDArray[np.uint64]
    length: npt.NDArray[np.uint64]
    width: npt.NDArray[np.uint16]
    """Pixels as the file states them."""
    height: npt.NDArray[np.uint16]

    def __len__(self) -> int:
        return len(self.offset)


def read_beton(path: str | os.PathLike[str]) -> BetonTables:
    """Read and check the tables of a `.beton` with one image and one int field.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a `.beton` that can be served; says what is wrong and what to do.
    """
    where = Path(path)
    with where.open("rb") as file:
        return _read(file.fileno(), os.fstat(file.fileno()).st_size, where)


def digest(fd: int, checksum: npt.NDArray[np.uint64]) -> str:
    """A `.beton`'s checksum in the manifest: xxh3-128 of its tables' bytes, then of the samples' xxh3-64.

    Together with the zeros between the records that is every byte, and a file whose records were written
    side by side need not be read again for it.
    """
    header = _rows(fd, HEADER, 1, 0)[0]
    alloc_ptr, size = int(header["alloc_ptr"]), os.fstat(fd).st_size
    front = HEADER.itemsize + int(header["fields"]) * DESCRIPTOR.itemsize + int(header["samples"]) * ROW_BYTES
    whole = xxhash.xxh3_128()
    for at, end in ((0, front), (alloc_ptr, size)):
        while at < end and (chunk := os.pread(fd, min(_CHUNK, end - at), at)):
            whole.update(chunk)
            at += len(chunk)
    whole.update(checksum.astype("<u8").tobytes())
    return str(whole.hexdigest())


def _refusal(where: Path, problem: str, remedy: str = "write the file again") -> ValueError:
    return ValueError(f"{where}: {problem}; {remedy}")


def _rows(fd: int, dtype: np.dtype[Any], count: int, offset: int) -> npt.NDArray[Any]:
    """`count` rows, which the caller knows to be inside the file."""
    rows = np.empty(count, dtype)
    bytes_u8 = rows.view(np.uint8)
    while len(bytes_u8):
        got = os.preadv(fd, [bytes_u8.data], offset)
        if not got:
            raise ValueError("the file became shorter while it was read")
        bytes_u8, offset = bytes_u8[got:], offset + got
    return rows


def _read(fd: int, size: int, where: Path) -> BetonTables:
    if size < HEADER.itemsize:
        raise _refusal(where, f"{size} bytes, too few for a .beton header")
    header = _rows(fd, HEADER, 1, 0)[0]
    fields, page_size, samples, alloc_ptr = (
        int(header[name]) for name in ("fields", "page_size", "samples", "alloc_ptr")
    )
    if int(header["version"]) != VERSION:
        raise _refusal(
            where,
            f".beton version {int(header['version'])}, this vqsa reads version {VERSION}",
            "if it is a .beton, write it again with ffcv 1.0 or tools/build_shards.py",
        )
    if alloc_ptr == 0:
        raise _refusal(where, "unfinished: its writer stopped before the allocation table")
    if page_size & (page_size - 1) or not MIN_PAGE <= page_size <= MAX_PAGE:
        raise _refusal(
            where, f"page size {page_size}, wanted a power of two from {MIN_PAGE} to {MAX_PAGE}: damaged"
        )
    if alloc_ptr > size:
        raise _refusal(
            where, f"cut off: {size} bytes, but its allocation table begins at {alloc_ptr}", "copy it again"
        )
    if (size - alloc_ptr) % ALLOCATION.itemsize:
        raise _refusal(
            where,
            f"the allocation table has {size - alloc_ptr} bytes, no multiple of {ALLOCATION.itemsize}: cut off",
            "copy it again",
        )
    metadata_at = HEADER.itemsize + fields * DESCRIPTOR.itemsize
    if metadata_at > alloc_ptr:
        raise _refusal(where, f"it claims {fields} fields, which do not fit into the file: damaged")
    image_first = _check_fields(_rows(fd, DESCRIPTOR, fields, HEADER.itemsize), where)
    row = metadata_type(image_first)
    data_begin = metadata_at + samples * row.itemsize
    if data_begin > alloc_ptr:
        raise _refusal(where, f"it claims {samples} samples, which do not fit into the file: damaged")
    allocated = (size - alloc_ptr) // ALLOCATION.itemsize
    if allocated < samples:
        raise _refusal(
            where,
            f"the allocation table lists {allocated} records, the header {samples} samples: cut off",
            "copy it again",
        )
    if allocated > _MAX_SAMPLES:
        raise _refusal(where, f"{allocated} records, more than the {_MAX_SAMPLES} that vqsa reads")
    metadata = _rows(fd, row, samples, metadata_at)
    allocations = _rows(fd, ALLOCATION, allocated, alloc_ptr)
    mode = metadata["image"]["mode"]
    raw = mode == RAW_MODE
    if raw.any():
        raise _refusal(
            where,
            f"{int(raw.sum())} of {samples} samples hold raw pixels (sample {int(np.argmax(raw))} is the first), "
            "and vqsa serves encoded images",
            "write it from its images with tools/build_shards.py, or with RGBImageField(write_mode='jpg')",
        )
    if (mode != JPEG_MODE).any():
        first = int(np.argmax(mode != JPEG_MODE))
        raise _refusal(where, f"sample {first} has image mode {int(mode[first])}: damaged")
    ptr = metadata["image"]["ptr"].astype(np.uint64)
    return BetonTables(
        page_size=page_size,
        data_begin=data_begin,
        alloc_ptr=alloc_ptr,
        label=metadata["label"].astype(np.int64),
        offset=ptr,
        length=_lengths(ptr, allocations, data_begin, alloc_ptr, where),
        width=metadata["image"]["width"].astype(np.uint16),
        height=metadata["image"]["height"].astype(np.uint16),
    )


def _check_fields(descriptors: npt.NDArray[np.void], where: Path) -> bool:
    """Whether the image field comes before the int field; refuses any other fields."""
    kinds = descriptors["type"].tolist()
    if kinds in ([IMAGE_FIELD, INT_FIELD], [INT_FIELD, IMAGE_FIELD]):
        return bool(kinds[0] == IMAGE_FIELD)
    found = ", ".join(
        f"{bytes(name).decode('ascii', 'replace')!r} ({_FIELD_KINDS.get(kind, f'unknown type {kind}')})"
        for kind, name in zip(kinds[:8], descriptors["name"].tolist()[:8], strict=True)
    )
    raise _refusal(
        where,
        f"its fields are {found or 'none'}{' and more' if len(kinds) > 8 else ''}; vqsa serves .beton files of "
        "one RGB image and one int field, the label",
        "write it again with these two alone",
    )


def _lengths(
    ptr: npt.NDArray[np.uint64],
    allocations: npt.NDArray[np.void],
    data_begin: int,
    alloc_ptr: int,
    where: Path,
) -> npt.NDArray[np.uint64]:
    """The length of each sample's record, from the allocation table."""
    order = np.argsort(allocations["ptr"], kind="stable")
    at, size, sample = (allocations[name][order] for name in ("ptr", "size", "sample"))
    place = np.searchsorted(at, ptr)
    known = place < len(at)
    known[known] = at[place[known]] == ptr[known]
    known[known] = sample[place[known]] == np.flatnonzero(known).astype(np.uint64)
    if not known.all():
        first = int(np.argmin(known))
        raise _refusal(where, f"the allocation table has no row for sample {first}: damaged", "copy it again")
    length: npt.NDArray[np.uint64] = size[place].astype(np.uint64)
    # alloc_ptr - ptr wraps around for pointers beyond it, which the first comparison has found.
    outside = (
        (ptr < np.uint64(data_begin))
        | (ptr > np.uint64(alloc_ptr))
        | (length > np.uint64(alloc_ptr) - np.minimum(ptr, np.uint64(alloc_ptr)))
    )
    if outside.any():
        first = int(np.argmax(outside))
        raise _refusal(
            where,
            f"sample {first} lies at byte {int(ptr[first])} with {int(length[first])} bytes, outside the records "
            f"({data_begin} to {alloc_ptr}): damaged",
            "copy it again",
        )
    return length
