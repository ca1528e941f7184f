"""Samples that are in shards already: a set of ours, WebDataset tars of others, or a .beton."""

from __future__ import annotations

import os
from pathlib import Path

from shards.keys import clean_key
from shards.opening import open as open_store
from shards.source import Listing, Sample


def list_store(path: Path) -> Listing:
    """List the samples of whatever `shards.open` opens, in stored order, with their keys and classes.

    Raises:
        FileNotFoundError, ValueError: as `shards.open`.
    """
    with open_store(path) as opened:
        files = [str(file) for file in opened.files]
        names = [os.path.basename(file) for file in files]
        stamps = [os.stat(file).st_mtime_ns for file in files]
        columns = (opened.shard, opened.offset, opened.length, opened.label)
        samples = []
        for i, (shard, offset, length, label) in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
            key = opened.key(i)
            samples.append(
                Sample(
                    f"{names[shard]}/{key}",
                    clean_key(key),
                    label,
                    files[shard],
                    offset,
                    length,
                    stamps[shard],
                )
            )
        return Listing(opened.path, opened.classes, samples, 0)
