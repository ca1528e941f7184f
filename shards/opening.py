"""Opens a shard set: one of ours by its manifest, somebody else's by an index that is made once."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from shards.handles import check_file
from shards.manifest import read_header, read_table
from shards.store import Store


def open(path: str | os.PathLike[str], max_open_files: int = 128) -> Store:
    """Open a shard set.

    Args:
        path: the folder that tools/build_shards.py wrote.
        max_open_files: descriptors kept open for `Store.fetch`; mappings of `Store.read` hold none.

    Raises:
        FileNotFoundError: no such folder, no manifest (the build is unfinished), or a shard missing.
        ValueError: a manifest of another version, damaged, or not matching its shard files.
    """
    folder = Path(path).absolute()
    header = read_header(folder)
    table = read_table(folder, header)
    files = [folder / shard.name for shard in header.shards]
    for file, shard in zip(files, header.shards, strict=True):
        check_file(file, shard)
    reopen = partial(_reopen, folder, header.table.xxh3_128, max_open_files)
    return Store(files, header, table, max_open_files, reopen)


def _reopen(path: Path, table_xxh3_128: str, max_open_files: int) -> Store:
    store = open(path, max_open_files)
    if store.header.table.xxh3_128 != table_xxh3_128:
        raise ValueError(f"{path}: the shard set was built again since this store was opened; open it anew")
    return store
