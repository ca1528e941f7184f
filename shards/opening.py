"""Opens a shard set: one of ours by its manifest, somebody else's by an index that is made once."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import numpy as np

from shards.handles import check_file
from shards.index import indexed
from shards.locate import locate
from shards.manifest import HEADER_NAME, UNFINISHED, Header, Table, join_tables, read_header, read_table
from shards.store import Store


def open(
    path: str | os.PathLike[str],
    max_open_files: int = 128,
    classes: str | os.PathLike[str] | None = None,
) -> Store:
    """Open a shard set.

    A set without a manifest was made by others: it is indexed once, which reads every byte and is said in
    the log; the index is kept beside the files, or in the user's cache where these cannot be written to.

    Args:
        path: a folder (of tools/build_shards.py, of WebDataset tars, or with a `.beton`), one `.tar` or
            `.beton`, or a pattern like `train-{000000..001281}.tar`. Files of a set with a manifest give their
            part of the set, with its keys and classes.
        max_open_files: descriptors kept open for `Store.fetch`; mappings of `Store.read` hold none.
        classes: for sets without a manifest: file with the class names, one a line; without it
            `classes.txt` beside the shards, or else the class numbers are their names.

    Raises:
        FileNotFoundError: no such folder or file, no shards in it, an unfinished build, or a shard missing.
        ValueError: a manifest of another version, damaged, or not matching its shard files; shards of
            others that are damaged, or whose samples lack an image or a label.
    """
    folder = set_folder(path)
    if folder is None:
        files = locate(path)
        header, table = indexed(files, None if classes is None else Path(classes).absolute())
    else:
        if classes is not None:
            raise ValueError(
                f"{folder}: classes is for sets without a manifest; {HEADER_NAME} lists the classes"
            )
        header = read_header(folder)
        table = read_table(folder, header)
        if folder != Path(path).absolute():
            header, table = _some_shards(header, table, [file.name for file in locate(path)])
        files = [folder / shard.name for shard in header.shards]
    for file, shard in zip(files, header.shards, strict=True):
        check_file(file, shard)
    class_file = None if classes is None else str(Path(classes).absolute())
    again = partial(_reopen, str(Path(path).absolute()), max_open_files, class_file, header.table.xxh3_128)
    return Store(files, header, table, max_open_files, again)


def set_folder(path: str | os.PathLike[str]) -> Path | None:
    """The folder whose manifest lists what `path` means; None where there is no manifest to ask."""
    whole = Path(path).absolute()
    if (whole / HEADER_NAME).exists() or (whole / UNFINISHED).exists():
        return whole
    if not whole.exists() and "{" not in whole.name:
        return whole  # reading its manifest says what is missing
    files = locate(whole)
    if not files:
        return whole
    folder = files[0].parent
    if not (folder / HEADER_NAME).is_file():
        return None
    listed = {shard.name for shard in read_header(folder).shards}
    return folder if listed.issuperset(file.name for file in files) else None


def _some_shards(header: Header, table: Table, names: list[str]) -> tuple[Header, Table]:
    """Header and rows of some of a set's shards, in the order of `names`."""
    if names == [shard.name for shard in header.shards]:
        return header, table
    number_of = {shard.name: number for number, shard in enumerate(header.shards)}
    chosen = [number_of[name] for name in names]
    ends = np.cumsum([shard.samples for shard in header.shards])
    keys_end = table.columns["key_end"]
    parts = []
    for number in chosen:
        rows = slice(int(ends[number]) - header.shards[number].samples, int(ends[number]))
        first = int(keys_end[rows.start - 1]) if rows.start else 0
        last = int(keys_end[rows.stop - 1]) if rows.stop else 0
        columns = {name: column[rows] for name, column in table.columns.items()}
        columns["key_end"] = columns["key_end"] - np.uint64(first)
        parts.append(Table(columns, table.keys_u8[first:last]))
    shards = [header.shards[number] for number in chosen]
    samples = sum(shard.samples for shard in shards)
    return header.model_copy(update={"shards": shards, "samples": samples}), join_tables(parts)


def _reopen(
    path: str, max_open_files: int, classes: str | os.PathLike[str] | None, table_xxh3_128: str
) -> Store:
    store = open(path, max_open_files, classes)
    if store.header.table.xxh3_128 != table_xxh3_128:
        raise ValueError(f"{path}: the shard set was built again since this store was opened; open it anew")
    return store
