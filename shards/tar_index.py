"""Where the members of a tar lie, without reading them; a tar inside a tar is a range of the outer file.

tarfile (and so webdataset) takes a damaged header in the middle of a tar for its end and drops the rest
in silence; here it is an error. Sizes are held against the bytes there are before anything is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

_BLOCK = 512
_EMPTY = bytes(_BLOCK)
# Extended headers hold names and times; tar's own end and its padding to a record are 10 KiB.
_MAX_EXTENDED = 1 << 20
_MAX_TAIL = 1 << 20

_FILE = {b"0", b"\0", b"7"}
_FOLDER = b"5"
_KINDS = {b"1": "a hard link", b"2": "a symbolic link", b"S": "a sparse file", b"M": "part of a split file"}
_REMEDY = "copy or make the archive again"


@dataclass(frozen=True, slots=True)
class Member:
    """One regular file in a tar."""

    name: str
    """As the tar says, with its folders; bytes that are not UTF-8 are surrogates, as in `os.fsdecode`."""
    offset: int
    """Of its first byte in the file that holds the tar."""
    size: int
    """Bytes."""


def members(fd: int, begin: int, end: int, where: str) -> Iterator[Member]:
    """Walk the headers of a tar.

    Args:
        fd: descriptor of the file that holds it.
        begin, end: its byte range there.
        where: what it is called in messages.

    Raises:
        ValueError: a header is damaged or reaches past the end, the tar does not end as tars do, or a
            member is no regular file or folder (links and the like cannot be read in place).
        OSError: the file cannot be read.
    """
    at = begin
    global_records: dict[str, bytes] = {}
    records: dict[str, bytes] = {}
    while True:
        header = os.pread(fd, _BLOCK, at) if at + _BLOCK <= end else b""
        if len(header) < _BLOCK:
            raise ValueError(
                f"{where}: cut off: byte {at - begin} should begin a header, the tar ends there; {_REMEDY}"
            )
        if header == _EMPTY:
            _check_tail(fd, at, end, where)
            return
        place = f"{where}: the header at byte {at - begin}"
        name, size, kind = _header(header, place)
        data = at + _BLOCK
        if kind in _FILE or kind == _FOLDER:
            known = global_records | records
            if any(record.startswith("GNU.sparse") for record in known):
                kind = b"S"
            path = known.get("path")
            name = name if path is None else path.decode("utf-8", "surrogateescape")
            size = _decimal(known["size"], place) if "size" in known else size
        size = 0 if kind == _FOLDER else size
        if size > end - data:
            raise ValueError(
                f"{place} ({name!r}) claims {size} bytes, only {end - data} are left; "
                f"the tar is cut off or damaged: {_REMEDY}"
            )
        at = data + -(-size // _BLOCK) * _BLOCK
        if kind in (b"x", b"X", b"g", b"L", b"K"):
            if size > _MAX_EXTENDED:
                raise ValueError(
                    f"{place} is an extended one of {size} bytes, at most {_MAX_EXTENDED} are read"
                )
            text = os.pread(fd, size, data)
            if kind == b"L":
                records["path"] = text.rstrip(b"\0")
            elif kind == b"g":
                global_records |= _pax_records(text, place)
            elif kind != b"K":
                records |= _pax_records(text, place)
            continue
        records = {}
        if kind in _FILE:
            yield Member(name, data, size)
        elif kind != _FOLDER:
            what = _KINDS.get(kind, f"of type {kind!r}")
            raise ValueError(
                f"{place} ({name!r}) is {what}; only regular files are read: pack the files themselves"
            )


def _header(header: bytes, place: str) -> tuple[str, int, bytes]:
    """Name, size and type of a header block whose checksum is right."""
    try:
        wanted = int(header[148:156].strip(b" \0") or b"0", 8)
    except ValueError:
        wanted = -1
    if sum(header) - sum(header[148:156]) + 8 * ord(" ") != wanted:
        raise ValueError(
            f"{place} is damaged or none (its checksum differs); what follows cannot be told: {_REMEDY}"
        )
    field = header[124:136]
    if field[0] & 0x80:  # GNU: binary, for 8 GiB and more
        size = int.from_bytes(field, "big") - (1 << 95)
        if not 0 <= size < 1 << 63:
            raise ValueError(f"{place} claims an impossible size; {_REMEDY}")
    else:
        digits = field.strip(b" \0")
        if not all(c in b"01234567" for c in digits):
            raise ValueError(f"{place} has no number for a size ({digits!r}); {_REMEDY}")
        size = int(digits or b"0", 8)
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0]
    if prefix and header[257:263] == b"ustar\0":
        name = prefix + b"/" + name
    return name.decode("utf-8", "surrogateescape"), size, header[156:157]


def _decimal(text: bytes, place: str) -> int:
    if not text.isdigit() or len(text) > 19:
        raise ValueError(f"{place} has no number for a size ({text[:40]!r}); {_REMEDY}")
    return int(text)


def _pax_records(text: bytes, place: str) -> dict[str, bytes]:
    """The records `length key=value\\n` of a POSIX extended header."""
    found: dict[str, bytes] = {}
    at = 0
    while at < len(text) and text[at] != 0:
        digits, _, _ = text[at : at + 20].partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        record = text[at : at + length]
        key, equals, value = record[len(digits) + 1 : -1].partition(b"=")
        if len(record) != length or not record.endswith(b"\n") or not equals:
            raise ValueError(f"{place} is an extended one that is damaged; {_REMEDY}")
        found[key.decode("utf-8", "replace")] = value
        at += length
    return found


def _check_tail(fd: int, at: int, end: int, where: str) -> None:
    """After its last member a tar has empty blocks and nothing else."""
    size = end - at
    if size < 2 * _BLOCK or size > _MAX_TAIL or os.pread(fd, size, at).strip(b"\0"):
        raise ValueError(
            f"{where}: {size} bytes follow an empty block, where a tar ends with two or more such blocks; it is "
            f"damaged, cut off, or several tars in one file: {_REMEDY}"
        )
