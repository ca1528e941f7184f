"""Puts two evaluations of one model beside each other: corruptions made on the fly, and files on disk.

    python tools/evaluate.py --models M --data imagenet-sample --flavour bethge --out made
    python tools/evaluate.py --models M --imagenet-c reference-c --out disk
    python benchmarks/compare_cells.py made/cells.csv disk/cells.csv [--out result.json]

`benchmarks/hardness.py write` makes the files, with PyPI imagecorruptions. Bound: 0.5 points for the mean over the 15
benchmark kinds.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import tyro
from pydantic import BaseModel, ConfigDict

from benchmarks.environment import environment, write_result
from tools.runtime.results import CLEAN, Cell, Summary, by_kind, read_csv, summarise

BOUND_POINTS = 0.5


class Comparison(BaseModel):
    """Compare the cells of two evaluations of one model."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    made: Annotated[Path, tyro.conf.Positional]
    """cells.csv of the corruptions made on the fly."""

    disk: Annotated[Path, tyro.conf.Positional]
    """cells.csv of the files."""

    out: Path | None = None
    """JSON file for the result."""


def only_model(path: Path) -> tuple[str, list[Cell]]:
    """Return the one model in a table."""
    found = read_csv(path)
    if len(found) != 1:
        raise ValueError(f"{path}: wanted the cells of one model, found {', '.join(found) or 'none'}")
    return next(iter(found.items()))


def rows_of(made: Summary, disk: Summary) -> dict[str, tuple[float, float]]:
    """Return top-1 on both sides, in percent, by row of the table."""
    rows = {kind: (100 * made.top1[kind], 100 * disk.top1[kind]) for kind in made.top1 if kind in disk.top1}
    for name, attribute in (("clean", "clean_top1"), ("Known", "known_top1"), ("Unknown", "unknown_top1")):
        a, b = getattr(made, attribute), getattr(disk, attribute)
        if a is not None and b is not None:
            rows[name] = (100 * a, 100 * b)
    return rows


def main() -> None:
    """Print the table; exits with 1 where the bound is broken."""
    command = tyro.cli(Comparison, description=Comparison.__doc__)
    (name, made), (_, disk) = only_model(command.made), only_model(command.disk)
    rows = rows_of(summarise(made), summarise(disk))
    images = by_kind(made)[CLEAN][0].images
    print(f"| {name}, {images} images, top-1 % | made on the fly | on disk | difference |\n|---|---|---|---|")
    for kind, (a, b) in rows.items():
        print(f"| {kind} | {a:.2f} | {b:.2f} | {a - b:+.2f} |")
    if command.out:
        record = {
            "model": name,
            "images": images,
            "top1_pct_made_and_disk": rows,
            "bound_points": BOUND_POINTS,
        }
        write_result(command.out, {**environment(), **record})
    if "Known" in rows and abs(rows["Known"][0] - rows["Known"][1]) > BOUND_POINTS:
        sys.exit(f"the means over the 15 kinds differ by more than {BOUND_POINTS} points")


if __name__ == "__main__":
    main()
