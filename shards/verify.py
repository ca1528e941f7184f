"""Check a shard set: every file, every sample, every byte, against its manifest or its index."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from shards.faults import Fault, copy_or_rebuild
from shards.index import indexed, kept_index
from shards.locate import locate
from shards.manifest import HEADER_NAME, TABLE_NAME, Header, Table, read_header, read_table
from shards.opening import set_folder
from shards.side_files import side_files
from shards.target import is_shard_name
from shards.verify_beton import BetonCheck
from shards.verify_foreign import foreign_tar_faults
from shards.verify_tar import TarCheck

_COPY_SIDE = "copy it again, or run the build command again, which writes it"
_WHOLE_FILE = "copy the file again from where it is whole, or build the set again"
_ROWS = 500  # samples of a .beton that one thread takes at a time


@dataclass(frozen=True)
class Verification:
    """What was looked at, and what is wrong with it."""

    shards: int
    samples: int
    """As the manifest lists them; 0 where it cannot be read."""
    faults: list[Fault]
    """In the order of the manifest; empty where the set is sound."""


@dataclass(frozen=True)
class _Job:
    """A part of the check that can be done beside others."""

    run: Callable[[], Iterable[Fault]]
    samples: int


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
    suffix = ".beton" if header.storage == "ffcv" else ".tar"
    for path in sorted({*folder.glob(f"{header.name}-*{suffix}"), *folder.glob(f"{header.name}{suffix}")}):
        ours = path.name == f"{header.name}{suffix}" or is_shard_name(path.name, header.name, suffix)
        if ours and path.name not in listed:
            yield Fault(
                path.name, None, "not in the manifest, though named as a shard of the set", "remove it"
            )


def verify(
    path: str | os.PathLike[str],
    decode: bool = False,
    workers: int = 1,
    progress: bool = False,
    classes: str | os.PathLike[str] | None = None,
) -> Verification:
    """Check a set: sizes, checksums of shards and images, tar headers or .beton tables, labels, `.idx`, structure.

    Shards that others made are compared with the index that was made of them when they were first opened.

    Args:
        path: as for `shards.open`; files of a set with a manifest mean the whole set.
        decode: decode every image as well.
        workers: threads that look at parts of the set side by side.
        progress: show a progress bar on standard error.
        classes: as for `shards.open`.

    Returns:
        All faults; damage is reported, not raised.

    Raises:
        FileNotFoundError: no such folder or file, or nothing to verify in it.
        ValueError: `path` is neither a set nor shards; shards of others that cannot be indexed.
    """
    folder = set_folder(path)
    if folder is None:
        files = locate(path)
        class_file = None if classes is None else Path(classes).absolute()
        header, table = kept_index(files, class_file) or indexed(files, class_file)
        return _run(header, _foreign_jobs(files, header, table, decode), workers, progress)
    if not (folder / HEADER_NAME).is_file():
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
    jobs = [
        *_set_jobs(folder, header, table, decode),
        _Job(lambda: _side_faults(folder, header), 0),
        _Job(lambda: _stray_files(folder, header), 0),
    ]
    return _run(header, jobs, workers, progress)


def _rows_of_shards(header: Header) -> Iterator[range]:
    first = 0
    for shard in header.shards:
        yield range(first, first + shard.samples)
        first += shard.samples


def _set_jobs(folder: Path, header: Header, table: Table, decode: bool) -> Iterator[_Job]:
    one_file = len(header.shards) == 1
    for number, (shard, rows) in enumerate(zip(header.shards, _rows_of_shards(header), strict=True)):
        if header.storage == "webdataset":
            yield _Job(TarCheck(folder, number, shard, table, rows, decode).faults, len(rows))
        else:
            remedy = _WHOLE_FILE if one_file else copy_or_rebuild(number)
            yield from _beton_jobs(BetonCheck(folder / shard.name, shard, table, rows, decode, remedy), rows)


def _foreign_jobs(files: list[Path], header: Header, table: Table, decode: bool) -> Iterator[_Job]:
    for file, shard, rows in zip(files, header.shards, _rows_of_shards(header), strict=True):
        if header.storage == "webdataset":
            check = partial(foreign_tar_faults, file, shard, table, rows, header.classes, decode)
            yield _Job(check, len(rows))
        else:
            yield from _beton_jobs(BetonCheck(file, shard, table, rows, decode, _WHOLE_FILE), rows)


def _beton_jobs(check: BetonCheck, rows: range) -> Iterator[_Job]:
    yield _Job(check.file_faults, 0)
    for begin in range(rows.start, rows.stop, _ROWS):
        part = range(begin, min(begin + _ROWS, rows.stop))
        yield _Job(partial(check.sample_faults, part), len(part))


def _run(header: Header, jobs: Iterable[_Job], workers: int, progress: bool) -> Verification:
    stop = threading.Event()
    with tqdm(total=header.samples, unit=" img", disable=not progress) as bar:

        def check(job: _Job) -> list[Fault]:
            if stop.is_set():
                return []
            found = list(job.run())
            bar.update(job.samples)
            return found

        with ThreadPoolExecutor(workers) as pool:
            try:
                faults = [fault for found in pool.map(check, jobs) for fault in found]
            except BaseException:
                stop.set()  # an interrupt must not wait for the rest of the set
                raise
    return Verification(len(header.shards), header.samples, faults)


def _without(folder: Path, error: Exception) -> str:
    """An error's words without the folder, which the reader of a fault knows."""
    text = str(error).removeprefix(f"{folder}{os.sep}")
    return text.removeprefix(f"{HEADER_NAME}: ").removeprefix(f"{TABLE_NAME}: ")
