"""One shard as a WebDataset tar, with the index that DALI's own reader wants beside it."""

from __future__ import annotations

import contextlib
import io
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import xxhash

from shards.manifest import ShardFile, Storage, Table, sync_folder, write_file
from shards.target import Record

_BLOCK = 512


class HashingFile:
    """A file that is only written to, and hashed on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = xxhash.xxh3_128()
        self.size = 0

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        self.size += len(data)
        return self._file.write(data)

    def abandon(self) -> None:
        """Swallow what is still written: a tar stream writes its end even while it is thrown away."""
        self._file = io.BytesIO()

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


class TarShardWriter:
    """Writes `<key>.cls` and `<key>.<extension>` members; nothing has the final name before `finish`.

    Times, owner and mode are fixed, so the same samples give the same bytes. Used as a context, it
    removes what it wrote when an exception passes through.

    Args:
        path: the tar's final path.
        temporary: where it is written until then, on the same file system.
    """

    def __init__(self, path: Path, temporary: Path) -> None:
        self._path, self._temporary = path, temporary
        self._file = temporary.open("wb", buffering=1 << 20)
        self._out = HashingFile(self._file)
        from webdataset import TarWriter  # which imports torch; a dry run and --help need not wait for it

        self._tar = TarWriter(
            self._out, encoder=False, mtime=0, user="vqsa", group="vqsa", mode=0o444, compress=False
        )
        # TarWriter's own `format` does not reach the tar: extended headers, which DALI's indexer cannot
        # read, would appear before every member whose name is not ASCII.
        self._tar.tarstream.format = tarfile.USTAR_FORMAT
        self._tar.tarstream.encoding = "utf-8"  # not the locale's: the same samples give the same bytes
        self._index: list[str] = []

    def add(self, record: Record) -> int:
        """Append one sample; returns the offset of the image's bytes in the tar."""
        key, data = record.key, record.data
        extension = "png" if record.format == "png" else "jpg"
        text = str(record.label).encode()
        begin: int = self._tar.tarstream.offset
        # Members of a sample are written in the order of their extensions: cls comes first.
        self._tar.write({"__key__": key, "cls": text, extension: data})
        label_offset = begin + _BLOCK
        offset = label_offset + 2 * _BLOCK
        end = offset + -(-len(data) // _BLOCK) * _BLOCK
        assert self._tar.tarstream.offset == end, "a member got more than one header"
        self._index.append(
            f"cls {label_offset} {len(text)} {key}.cls {extension} {offset} {len(data)} {key}.{extension}\n"
        )
        return offset

    def finish(self) -> ShardFile:
        """Make the tar and its index durable under their final names, the tar last."""
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        index = f"v1.2 {len(self._index)}\n" + "".join(self._index)
        write_file(self._path.with_suffix(".idx"), index.encode())
        self._temporary.replace(self._path)
        sync_folder(self._path.parent)
        return ShardFile(
            name=self._path.name,
            size=self._out.size,
            samples=len(self._index),
            xxh3_128=self._out.hexdigest(),
        )

    def __enter__(self) -> TarShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._out.abandon()
            self._temporary.unlink(missing_ok=True)
            # Closing flushes, which fails again on a full disk; the first error already tells.
            with contextlib.suppress(OSError):
                self._file.close()


class TarTarget:
    """WebDataset tars; see `shards.target.Target`."""

    storage: Storage = "webdataset"
    suffix = ".tar"
    beside: tuple[str, ...] = (".idx",)
    imports: tuple[str, ...] = ("webdataset",)
    jpeg_only = False
    most_bytes: int | None = None
    joined = False

    def writer(self, path: Path, temporary: Path, most_records: int) -> TarShardWriter:
        return TarShardWriter(path, temporary)

    def join(
        self, path: Path, temporary: Path, pieces: Sequence[Path], table: Table
    ) -> tuple[ShardFile, Table]:
        raise NotImplementedError("joined is False: a tar set is never one file")
