"""Opens a shard set: one of ours by its manifest, somebody else's by an index that is made once."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from shards.handles import check_file
from shards.index import indexed
from shards.locate import locate
from shards.manifest import HEADER_NAME, UNFINISHED, read_header, read_table
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
            `.beton`, or a pattern like `train-{000000..001281}.tar`.
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
        files = [folder / shard.name for shard in header.shards]
    for file, shard in zip(files, header.shards, strict=True):
        check_file(file, shard)
    again = partial(_reopen, str(Path(path).absolute()), max_open_files, classes, header.table.xxh3_128)
    return Store(files, header, table, max_open_files, again)


def set_folder(path: str | os.PathLike[str]) -> Path | None:
    """The folder whose manifest lists what `path` means; None where there is no manifest to ask."""
    whole = Path(path).absolute()
    if whole.is_file() and (whole.parent / HEADER_NAME).is_file():
        # A file of a set is the set where it is the only one; of a larger set it is opened by itself.
        listed = [shard.name for shard in read_header(whole.parent).shards]
        return whole.parent if listed == [whole.name] else None
    if (whole / HEADER_NAME).exists() or (whole / UNFINISHED).exists():
        return whole
    if (whole.is_dir() and not locate(whole)) or not (whole.exists() or "{" in whole.name):
        return whole  # reading its manifest says what is missing
    return None


def _reopen(
    path: str, max_open_files: int, classes: str | os.PathLike[str] | None, table_xxh3_128: str
) -> Store:
    store = open(path, max_open_files, classes)
    if store.header.table.xxh3_128 != table_xxh3_128:
        raise ValueError(f"{path}: the shard set was built again since this store was opened; open it anew")
    return store
