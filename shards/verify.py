"""Check a finished shard set against its manifest: every file, every sample, every byte.

The manifest says where each sample lies, so the check does not walk a tar from header to header: one
damaged header is one fault, and the samples behind it are still looked at.
"""

from __future__ import annotations

import io
import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import xxhash
from tqdm import tqdm

from shards.manifest import HEADER_NAME, TABLE_NAME, Header, ShardFile, Table, read_header, read_table
from shards.scan import scan
from shards.side_files import side_files

_BLOCK = 512
_CHUNK = 1 << 20
_COPY_SIDE = "copy it again, or build the set again"
_REBUILD = "the manifest and the shard are not of one build: copy both again, or build the set again"


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


@dataclass(frozen=True)
class Verification:
    """What was looked at, and what is wrong with it."""

    shards: int
    samples: int
    """As the manifest lists them; 0 where it cannot be read."""
    faults: list[Fault]
    """In the order of the manifest; empty where the set is sound."""


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


class _Shard:
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
        self._copy = (
            "copy the shard again from where it is whole, or write it again with "
            f"tools/build_shards.py --only {number}"
        )
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
        same_bytes = size == info.size and _hash_file(fd) == info.xxh3_128
        remedy = _REBUILD if same_bytes else self._copy
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
        if size < at + 2 * _BLOCK or any(any(part) for part in _chunks(fd, at)):
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
        data = os.pread(fd, length, offset)
        if xxhash.xxh3_64_intdigest(data) != int(self._table.columns["checksum"][row]):
            return "the image's checksum differs from the manifest's"
        width, height = (int(self._table.columns[c][row]) for c in ("width", "height"))
        seen = scan(data, width, height)
        if seen.fault:
            return f"{seen.words} (the manifest says {width} x {height} pixels)"
        if self._decode:
            return _decode_problem(data)
        return None

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


def _chunks(fd: int, at: int) -> Iterator[bytes]:
    while chunk := os.pread(fd, _CHUNK, at):
        yield chunk
        at += len(chunk)


def _hash_file(fd: int) -> str:
    digest = xxhash.xxh3_128()
    for chunk in _chunks(fd, 0):
        digest.update(chunk)
    return digest.hexdigest()


def _decode_problem(data: bytes) -> str | None:
    from PIL import Image  # only where wanted

    try:
        with Image.open(io.BytesIO(data)) as picture:
            picture.load()
    except Exception as error:  # decoders raise whatever they like on damaged data
        return f"does not decode: {error}"
    return None


def _side_faults(folder: Path, header: Header) -> Iterator[Fault]:
    for name, wanted in side_files(header).items():
        try:
            with (folder / name).open("rb") as file:
                text = file.read(4 * len(wanted) + 1)  # enough for any layout of the same content
        except FileNotFoundError:
            yield Fault(name, None, "missing", _COPY_SIDE)
            continue
        except OSError as error:
            yield Fault(name, None, f"cannot be read: {error.strerror}", "make it readable")
            continue
        try:
            same = text == wanted or json.loads(text) == json.loads(wanted)
        except (ValueError, RecursionError):
            same = False
        if not same:
            yield Fault(name, None, "does not list the shards and counts of the manifest", _COPY_SIDE)


def _stray_files(folder: Path, header: Header) -> Iterator[Fault]:
    """Shards that a glob over the folder would find and the manifest does not list."""
    listed = {shard.name for shard in header.shards}
    for path in sorted(folder.glob(f"{header.name}-*.tar")):
        if path.name not in listed:
            yield Fault(
                path.name, None, "not in the manifest, though named as a shard of the set", "remove it"
            )


def verify(
    path: str | os.PathLike[str], decode: bool = False, workers: int = 1, progress: bool = False
) -> Verification:
    """Check a finished set: sizes, checksums of shards and images, tar headers, labels, `.idx`, structure.

    Args:
        path: the folder of the set.
        decode: decode every image as well.
        workers: shards looked at side by side.
        progress: show a progress bar on standard error.

    Returns:
        All faults; damage is reported, not raised.

    Raises:
        FileNotFoundError: no such folder, or no manifest in it.
        ValueError: `path` is no folder.
    """
    folder = Path(path).absolute()
    if not folder.is_dir() or not (folder / HEADER_NAME).is_file():
        read_header(folder)  # says what is missing
    try:
        header = read_header(folder)
    except ValueError as error:
        remedy = "nothing else can be checked without it"
        return Verification(0, 0, [Fault(HEADER_NAME, None, _without(folder, error), remedy)])
    try:
        table = read_table(folder, header)
    except (ValueError, FileNotFoundError) as error:
        remedy = "no sample can be checked without it"
        fault = Fault(TABLE_NAME, None, _without(folder, error), remedy)
        return Verification(len(header.shards), header.samples, [fault])

    stop = threading.Event()
    with tqdm(total=header.samples, unit=" img", disable=not progress) as bar:

        def check(task: tuple[int, ShardFile, range]) -> list[Fault]:
            if stop.is_set():
                return []
            found = list(_Shard(folder, *task[:2], table, task[2], decode).faults())
            bar.update(len(task[2]))
            return found

        tasks, first = [], 0
        for number, shard in enumerate(header.shards):
            tasks.append((number, shard, range(first, first + shard.samples)))
            first += shard.samples
        with ThreadPoolExecutor(workers) as pool:
            try:
                faults = [fault for found in pool.map(check, tasks) for fault in found]
            except BaseException:
                stop.set()  # an interrupt must not wait for the rest of the set
                raise
    faults.extend(_side_faults(folder, header))
    faults.extend(_stray_files(folder, header))
    return Verification(len(header.shards), header.samples, faults)


def _without(folder: Path, error: Exception) -> str:
    """An error's words without the folder, which the reader of a fault knows."""
    text = str(error).removeprefix(f"{folder}{os.sep}")
    return text.removeprefix(f"{HEADER_NAME}: ").removeprefix(f"{TABLE_NAME}: ")
