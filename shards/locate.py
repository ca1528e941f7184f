"""Which shard files a path means: a folder, one file, or a pattern with braces."""

from __future__ import annotations

import os
import re
from pathlib import Path

from braceexpand import braceexpand

from shards.beton import SUFFIX as BETON
from shards.manifest import Storage

TAR = ".tar"
_MAX_FILES = 1_000_000
_RANGE = re.compile(r"\{(\d{1,18})\.\.(\d{1,18})")


def locate(path: str | os.PathLike[str]) -> list[Path]:
    """The shard files of a path, absolute, in the order of the samples; empty for a folder without any.

    Args:
        path: a folder (its `.tar` files, or its `.beton` files, by name), one such file, or a pattern like
            `train-{000000..001281}.tar`.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: the files are of both kinds or of neither, lie in several folders, or the pattern is none.
    """
    whole = Path(path).absolute()
    if whole.is_dir():
        found = {suffix: sorted(whole.glob(f"*{suffix}")) for suffix in (TAR, BETON)}
        if all(found.values()):
            raise ValueError(
                f"{whole}: holds {len(found[TAR])} {TAR} and {len(found[BETON])} {BETON} files; give one of them, "
                "or a pattern such as train-{000000..001281}.tar"
            )
        files = found[TAR] or found[BETON]
    elif "{" in whole.name and not whole.exists():
        files = [whole.with_name(name) for name in _expand(whole)]
    else:
        files = [whole]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file{f' (from {whole})' if file != whole else ''}")
        if file.suffix not in (TAR, BETON):
            raise ValueError(
                f"{file}: a file, but neither {TAR} nor {BETON}; a shard set is a folder, such a file, or a "
                "pattern of such files with braces"
            )
    if len({file.suffix for file in files}) > 1:
        raise ValueError(f"{whole}: means {TAR} and {BETON} files; give those of one kind")
    if len(set(files)) < len(files):
        raise ValueError(f"{whole}: means the same file twice")
    return files


def storage_of(files: list[Path]) -> Storage:
    """What kind of shards the files are, by their names."""
    return "ffcv" if files[0].suffix == BETON else "webdataset"


def _expand(pattern: Path) -> list[str]:
    count = 1
    for first, last in _RANGE.findall(pattern.name):
        count *= abs(int(last) - int(first)) + 1
    if count > _MAX_FILES:
        raise ValueError(f"{pattern}: means {count} files, more than {_MAX_FILES}")
    try:
        names = list(braceexpand(pattern.name))
    except ValueError:
        raise ValueError(f"{pattern}: braces without a partner; write {{000000..001281}}") from None
    if names == [pattern.name]:
        raise FileNotFoundError(f"{pattern}: no such file, and no pattern such as {{000000..001281}}")
    return names
