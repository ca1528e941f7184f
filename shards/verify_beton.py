"""Check one `.beton` of a finished or indexed set against the manifest."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from shards.beton import BetonTables, digest, read_beton
from shards.faults import REBUILD, Fault, chunks, image_problem
from shards.manifest import HEADER_NAME, ShardFile, Table


class BetonCheck:
    """One `.beton` under the check.

    Args:
        path: the file.
        info: what the manifest says of it.
        table: the manifest's rows, of which `rows` are in this file.
        decode: decode every image as well.
        remedy: for a file that is damaged.
    """

    def __init__(
        self, path: Path, info: ShardFile, table: Table, rows: range, decode: bool, remedy: str
    ) -> None:
        self._path, self._info, self._table, self._rows = path, info, table, rows
        self._decode, self._remedy = decode, remedy

    def file_faults(self) -> Iterator[Fault]:
        """The file as a whole: size, tables, pages, what lies between the records, the tables' checksum."""
        info = self._info
        try:
            size = self._path.stat().st_size
            if size != info.size:
                problem = f"{size} bytes, the manifest says {info.size}"
                yield Fault(info.name, None, problem, self._remedy)
            tables = read_beton(self._path)
        except FileNotFoundError:
            yield Fault(info.name, None, "shard file missing, the manifest lists it", self._remedy)
            return
        except OSError as error:
            yield Fault(info.name, None, f"cannot be opened: {error.strerror}", "make it readable")
            return
        except ValueError as error:
            problem = str(error).removeprefix(f"{self._path}: ").partition("; ")[0]
            yield Fault(info.name, None, problem, self._remedy)
            return
        differing = list(self._row_faults(tables))
        yield from differing
        fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            between = list(self._gap_faults(fd, tables))
            yield from between
            checksum = self._table.columns["checksum"][self._rows.start : self._rows.stop]
            if size == info.size and not differing and digest(fd, checksum) != info.xxh3_128:
                problem = f"the checksum of its tables differs from {HEADER_NAME}'s, though each row agrees"
                yield Fault(info.name, None, problem, self._remedy)
        finally:
            os.close(fd)

    def _row_faults(self, tables: BetonTables) -> Iterator[Fault]:
        name, rows = self._info.name, slice(self._rows.start, self._rows.stop)
        if len(tables) != len(self._rows):
            problem = f"{len(tables)} samples, the manifest lists {len(self._rows)}"
            yield Fault(name, None, problem, REBUILD)
            return
        for column, found in (
            ("offset", tables.offset),
            ("length", tables.length),
            ("label", tables.label),
            ("width", tables.width),
            ("height", tables.height),
        ):
            wanted = self._table.columns[column][rows]
            for i in np.flatnonzero(wanted.astype(np.uint64) != found.astype(np.uint64)).tolist():
                problem = f"its {column} is {int(found[i])} in the .beton, {int(wanted[i])} in the manifest"
                yield Fault(name, self._table.key(self._rows[i]), problem, REBUILD)
        page = np.uint64(tables.page_size)
        last = tables.offset + np.maximum(tables.length, np.uint64(1)) - np.uint64(1)
        for i in np.flatnonzero(tables.offset // page != last // page).tolist():
            problem = f"it crosses a page of {tables.page_size} bytes, where ffcv misreads it"
            yield Fault(name, self._table.key(self._rows[i]), problem, "write the file again")

    def _gap_faults(self, fd: int, tables: BetonTables) -> Iterator[Fault]:
        """Bytes that belong to no record must be zeros."""
        order = np.argsort(tables.offset, kind="stable")
        begin = tables.offset[order].tolist()
        end = (tables.offset + tables.length)[order].tolist()
        for at, until in zip([tables.data_begin, *end], [*begin, tables.alloc_ptr], strict=True):
            for chunk in chunks(fd, at, until):
                if any(chunk):
                    problem = f"bytes between its records ({at} to {until}) are not zero"
                    yield Fault(self._info.name, None, problem, self._remedy)
                    return

    def sample_faults(self, rows: range) -> Iterator[Fault]:
        """Some of the samples: checksum, structure, stored size, pixels if wanted."""
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return  # said by file_faults
        try:
            size = os.fstat(fd).st_size
            for row in rows:
                offset, length = (int(self._table.columns[c][row]) for c in ("offset", "length"))
                if offset + length > size:
                    problem: str | None = "cut off: the file ends before the image does"
                else:
                    problem = image_problem(os.pread(fd, length, offset), self._table, row, self._decode)
                if problem is not None:
                    yield Fault(self._info.name, self._table.key(row), problem, self._remedy)
        except OSError as error:
            yield Fault(self._info.name, None, f"cannot be read: {error.strerror}", self._remedy)
        finally:
            os.close(fd)
