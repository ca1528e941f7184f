"""Check one tar of a finished set against the manifest.

The manifest says where each sample lies, so the check does not walk from header to header: one damaged
header is one fault, and the samples behind it are still looked at.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from shards.faults import REBUILD, Fault, chunks, copy_or_rebuild, hash_file, image_problem
from shards.manifest import HEADER_NAME, ShardFile, Table

_BLOCK = 512


class _MemberError(ValueError):
    pass


def _member(block: bytes, names: tuple[str, ...], size: int) -> str:
    """The name in a tar header, which must be one of `names`, for a member of `size` bytes."""
    if len(block) < _BLOCK or block[257:263] != b"ustar\0":
        raise _MemberError(f"no tar header where that of {names[0]} should be")
    name = block[:100].rstrip(b"\0").decode("utf-8", "replace")
    try:
        wanted_sum, found_size = (
            int(block[a:b].strip(b" \0") or b"0", 8) for a, b in ((148, 156), (124, 136))
        )
    except ValueError:
        raise _MemberError(f"the tar header of {names[0]} is damaged (a number in it is none)") from None
    if wanted_sum != sum(block[:148]) + 8 * ord(" ") + sum(block[156:]):
        raise _MemberError(f"the tar header of {names[0]} is damaged (its checksum differs)")
    if name not in names:
        raise _MemberError(f"the tar names this member {name!r}, the manifest {names[0]}")
    if found_size != size:
        raise _MemberError(f"{name} has {found_size} bytes in the tar, {size} in the manifest")
    return name


class TarCheck:
    """One shard file under the check."""

    def __init__(
        self, folder: Path, number: int, info: ShardFile, table: Table, rows: range, decode: bool
    ) -> None:
        self._path, self._info, self._table, self._rows, self._decode = (
            folder / info.name,
            info,
            table,
            rows,
            decode,
        )
        self._copy = copy_or_rebuild(number)
        # Where a sample's header is unreadable its extension is not known, and its index line is not compared.
        self._extension: dict[int, str] = {}

    def faults(self) -> Iterator[Fault]:
        name = self._info.name
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            yield Fault(name, None, "shard file missing, the manifest lists it", self._copy)
            return
        except OSError as error:
            yield Fault(name, None, f"cannot be opened: {error.strerror}", "make it readable")
            return
        try:
            yield from self._file_faults(fd)
        except OSError as error:
            yield Fault(name, None, f"cannot be read: {error.strerror}", self._copy)
        finally:
            os.close(fd)
        yield from self._index_faults()

    def _file_faults(self, fd: int) -> Iterator[Fault]:
        info, rows = self._info, self._rows
        size = os.fstat(fd).st_size
        if size != info.size:
            yield Fault(info.name, None, f"{size} bytes, the manifest says {info.size}", self._copy)
        same_bytes = size == info.size and hash_file(fd) == info.xxh3_128
        remedy = REBUILD if same_bytes else self._copy
        found, at = 0, 0
        for row in rows:
            key = self._table.key(row)
            offset, length = (int(self._table.columns[c][row]) for c in ("offset", "length"))
            if offset + length > size:
                lost = rows.stop - row
                yield Fault(info.name, key, f"cut off here: {lost} of {len(rows)} samples are lost", remedy)
                return
            problem = self._sample_problem(fd, row, key, at, offset, length)
            # From where it should be, not from where the manifest puts it: one wrong row is one fault.
            at += 3 * _BLOCK + -(-length // _BLOCK) * _BLOCK
            if problem is not None:
                found += 1
                yield Fault(info.name, key, problem, remedy)
        if size != info.size:
            return
        if size < at + 2 * _BLOCK or any(any(part) for part in chunks(fd, at)):
            yield Fault(
                info.name, None, "the tar does not end with empty blocks after its last sample", remedy
            )
        elif not same_bytes and not found:
            problem = f"the file's checksum differs from {HEADER_NAME}'s, though its samples are whole"
            yield Fault(info.name, None, problem, remedy)

    def _sample_problem(self, fd: int, row: int, key: str, at: int, offset: int, length: int) -> str | None:
        if offset != at + 3 * _BLOCK:
            return f"the manifest puts its image at byte {offset}, after the member before it comes {at + 3 * _BLOCK}"
        label = str(int(self._table.columns["label"][row])).encode()
        lead = os.pread(fd, 3 * _BLOCK, at)
        try:
            _member(lead[:_BLOCK], (f"{key}.cls",), len(label))
            image = _member(lead[2 * _BLOCK :], (f"{key}.jpg", f"{key}.png"), length)
        except _MemberError as error:
            return str(error)
        self._extension[row] = image.rpartition(".")[2]
        if lead[_BLOCK : _BLOCK + len(label)] != label:
            text = lead[_BLOCK : _BLOCK + len(label)].decode("ascii", "replace")
            return f"its label is {text} in the tar, {label.decode()} in the manifest"
        return image_problem(os.pread(fd, length, offset), self._table, row, self._decode)

    def _index_faults(self) -> Iterator[Fault]:
        path = self._path.with_suffix(".idx")
        remedy = "write it again with DALI's wds2idx, or copy it again"
        # A sound index has a line per sample, of bounded length; a longer file is not read.
        most = 64 + 512 * len(self._rows)
        try:
            with path.open("rb") as file:
                lines = file.read(most + 1).decode("utf-8", "replace").split("\n")
                tail = file.tell()
        except FileNotFoundError:
            yield Fault(path.name, None, "index file missing", remedy)
            return
        except OSError as error:
            yield Fault(path.name, None, f"cannot be read: {error.strerror}", "make it readable")
            return
        wanted = [f"v1.2 {len(self._rows)}"]
        for row in self._rows:
            key = self._table.key(row)
            offset, length = (int(self._table.columns[c][row]) for c in ("offset", "length"))
            label, ext = str(int(self._table.columns["label"][row])), self._extension.get(row)
            cls = f"cls {offset - 2 * _BLOCK} {len(label)} {key}.cls"
            wanted.append("" if ext is None else f"{cls} {ext} {offset} {length} {key}.{ext}")
        if tail > most or len(lines) != len(wanted) + 1 or lines[-1]:
            yield Fault(path.name, None, f"not one line for each of {len(self._rows)} samples", remedy)
            return
        for number, (line, right) in enumerate(zip(lines, wanted, strict=False)):
            if right and line != right:
                sample = self._table.key(self._rows[number - 1]) if number else None
                yield Fault(
                    path.name, sample, f"line {number + 1} is {line[:200]!r}, wanted {right!r}", remedy
                )
                return
