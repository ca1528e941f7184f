"""The index of shard files without a manifest: made once, kept beside them or in the user's cache.

An index is a manifest (the same two files) in a folder of its own, `.vqsa-index/<digest>/` beside the
shards. It holds for these files with these sizes and times, and is made again for others.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import xxhash
from tqdm import tqdm

from shards.foreign import ForeignShard, read_foreign
from shards.labels import read_classes
from shards.locate import storage_of
from shards.manifest import (
    HEADER_NAME,
    Header,
    Table,
    check_shard_name,
    check_table,
    describe_table,
    encode_table,
    join_tables,
    read_header,
    read_table,
    write_manifest,
)

log = logging.getLogger(__name__)

FOLDER = ".vqsa-index"
CLASS_FILE = "classes.txt"


def indexed(files: list[Path], class_file: Path | None = None) -> tuple[Header, Table]:
    """Header and rows of shard files without a manifest, from their index or by making it.

    Args:
        files: shards in their order, in one folder.
        class_file: see `read_classes`; `classes.txt` beside the shards where not given and there.

    Raises:
        ValueError: a file is damaged or a sample has no image or no label (names both), or labels are
            names and no list of classes is there.
        OSError: a file cannot be read, or the index written nowhere.
    """
    classes = _classes(files, class_file)
    for file in files:
        check_shard_name(file)
    stamp = _stamp(files, classes)
    beside, cache = _beside(files, classes), _cache(files, classes)
    for place in (beside, cache):
        if (found := _valid(place, files, stamp)) is not None:
            return found
    place = beside if _writable(beside) else cache
    place.mkdir(parents=True, exist_ok=True)
    # Several processes of one run open the same set: the first one indexes, the others wait and use it.
    fd = os.open(place / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        return _valid(place, files, stamp) or _make(files, classes, stamp, place)
    finally:
        os.close(fd)


def kept_index(files: list[Path], class_file: Path | None = None) -> tuple[Header, Table] | None:
    """The index that was once made of these files, even if they have changed since; None without one."""
    classes = _classes(files, class_file)
    for place in (_beside(files, classes), _cache(files, classes)):
        if (found := _read(place, files)) is not None:
            return found
    return None


def _classes(files: list[Path], class_file: Path | None) -> list[str] | None:
    if class_file is None and (files[0].parent / CLASS_FILE).is_file():
        class_file = files[0].parent / CLASS_FILE
    return None if class_file is None else read_classes(class_file)


def _digest(*parts: object) -> xxhash.xxh3_128:
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(repr(part).encode("utf-8", "surrogateescape"))
    return digest


def _stamp(files: list[Path], classes: list[str] | None) -> str:
    """Another text when a file was replaced or touched."""
    states = [(file.name, (info := file.stat()).st_size, info.st_mtime_ns) for file in files]
    return str(_digest(states, classes).hexdigest())


def _beside(files: list[Path], classes: list[str] | None) -> Path:
    name = _digest([file.name for file in files], classes).hexdigest()[:16]
    return files[0].parent / FOLDER / name


def _cache(files: list[Path], classes: list[str] | None) -> Path:
    name = _digest([str(file) for file in files], classes).hexdigest()[:16]
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "vqsa" / "index" / name


def _writable(place: Path) -> bool:
    there = next(folder for folder in (place, *place.parents) if folder.exists())
    return os.access(there, os.W_OK | os.X_OK)


def _valid(place: Path, files: list[Path], stamp: str) -> tuple[Header, Table] | None:
    try:
        found = _read(place, files)
    except (ValueError, FileNotFoundError) as error:
        log.warning("the index is damaged and made again: %s", error)
        return None
    return found if found is not None and found[0].source == stamp else None


def _read(place: Path, files: list[Path]) -> tuple[Header, Table] | None:
    if not (place / HEADER_NAME).is_file():
        return None
    header = read_header(place)
    # It may have come with the shards, from a stranger: it must be about these files and no others.
    if [shard.name for shard in header.shards] != [file.name for file in files]:
        raise ValueError(
            f"{place / HEADER_NAME}: lists other shards than those it lies beside; delete {place}"
        )
    return header, read_table(place, header)


def _make(files: list[Path], classes: list[str] | None, stamp: str, place: Path) -> tuple[Header, Table]:
    size = sum(file.stat().st_size for file in files)
    log.warning(
        "no manifest for %s%s: indexing %.1f GB once; the index is kept in %s",
        files[0],
        f" and {len(files) - 1} more" if len(files) > 1 else "",
        size / 1e9,
        place,
    )
    found: list[ForeignShard] = []
    with (
        ThreadPoolExecutor(min(8, os.cpu_count() or 1, len(files))) as pool,
        tqdm(total=size, unit="B", unit_scale=True, desc="index", disable=None) as bar,
    ):
        try:
            for shard in pool.map(read_foreign, files):
                found.append(shard)
                bar.update(shard.shard.size)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    header, table, encoded = _manifest(files, found, classes, stamp)
    # An index that would be refused when it is read must not be written, nor used this once.
    where = str(files[0]) if len(files) == 1 else str(files[0].parent)
    check_table(table, header, where, "copy the shards again from where they are whole, or write them again")
    write_manifest(place, header, encoded)
    damaged = [
        f"{file}, sample {shard.table.key(row)}: {words}"
        for file, shard in zip(files, found, strict=True)
        for row, words in shard.damaged.items()
    ]
    if damaged:
        log.warning(
            "%d images are damaged, and will be marked when read; the first: %s", len(damaged), damaged[0]
        )
    return header, table


def _manifest(
    files: list[Path], found: list[ForeignShard], classes: list[str] | None, stamp: str
) -> tuple[Header, Table, bytearray]:
    table = join_tables([shard.table for shard in found])
    label, classes = _labels(files, found, classes, table)
    table = Table({**table.columns, "label": label}, table.keys_u8)
    encoded = encode_table(table)
    header = Header(
        storage=storage_of(files),
        name=_name(files),
        samples=len(table),
        classes=classes,
        options={"indexed": True},
        source=stamp,
        counts={"damaged": sum(len(shard.damaged) for shard in found)},
        table=describe_table(encoded),
        shards=[shard.shard for shard in found],
    )
    return header, table, encoded


def _labels(
    files: list[Path], found: list[ForeignShard], classes: list[str] | None, table: Table
) -> tuple[np.ndarray[tuple[int], np.dtype[np.int32]], list[str]]:
    """Labels as indices into the class names, and these names."""
    label = table.columns["label"]
    named = [shard.names is not None for shard in found if len(shard.table)]
    if not any(named):
        most = int(label.max()) + 1 if len(label) else 0
        if classes is None:
            return label, [str(number) for number in range(most)]
        if most > len(classes):
            first = int(np.argmax(label == most - 1))
            shard = files[int(table.columns["shard"][first])]
            raise ValueError(
                f"{shard}, sample {table.key(first)}: label {most - 1} is outside 0..{len(classes) - 1} of the "
                "list of classes; give the list that belongs to these shards"
            )
        return label, classes
    numbers = {} if classes is None else {name: number for number, name in enumerate(classes)}
    out: list[int] = []
    for part, file in zip(found, files, strict=True):
        names = part.names or [str(number) for number in part.table.columns["label"].tolist()]
        for row, name in enumerate(names):
            if name not in numbers:
                where = f"{file}, sample {part.table.key(row)}: its label is the name {name!r}"
                raise ValueError(
                    f"{where}, and no list says which number it has; put {CLASS_FILE} (one name a line) beside the "
                    "shards, or give it as classes"
                    if classes is None
                    else f"{where}, which is not in the list of {len(classes)} classes"
                )
            out.append(numbers[name])
    return np.array(out, np.int32), classes or []


def _name(files: Sequence[Path]) -> str:
    """A name for the set: its first file's, without the number that counts the files."""
    name = files[0].stem if len(files) == 1 else files[0].stem.rstrip("0123456789").rstrip("-_.")
    clean = re.sub(r"[^A-Za-z0-9._-]+", "-", name or files[0].parent.name).lstrip("._-")
    return clean[:100] or "set"
