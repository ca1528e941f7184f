"""Lists that a build leaves beside the shards for people: what was left out, and what is unusual."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path

from shards.manifest import write_file
from shards.parts import Part

REJECTED_NAME = "rejected.csv"
ODDITIES_NAME = "oddities.csv"


def write_lists(out: Path, parts: list[Part]) -> None:
    """Write `rejected.csv` and `oddities.csv`, each only where there is something to list."""
    rejected = [entry for part in parts for entry in part.rejected]
    odd = [oddity for part in parts for oddity in part.oddities]
    _write(out / REJECTED_NAME, ("file", "reason"), rejected)
    rows = ((path, key, " ".join(kinds), "encoded" if again else "kept") for path, key, kinds, again in odd)
    _write(out / ODDITIES_NAME, ("file", "key", "oddities", "image"), rows)


def _write(path: Path, columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(columns)
    empty = text.tell()
    lines.writerows(rows)
    if text.tell() == empty:
        path.unlink(missing_ok=True)  # an earlier run may have left one
    else:
        write_file(path, text.getvalue().encode("utf-8", "surrogateescape"))
