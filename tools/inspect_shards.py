"""Show what is in a shard set: totals, classes, sizes, and a contact sheet.

python tools/inspect_shards.py /data/imagenet-train --sheet sheet.png
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import tyro
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

import shards
from shards.contact_sheet import contact_sheet
from shards.summary import summary


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class InspectOptions:
    """What to show."""

    path: tyro.conf.Positional[Path]
    """Folder of the shard set, one .tar or .beton, or a pattern such as 'train-{000000..001281}.tar'."""
    class_file: Path | None = None
    """For shards without a manifest: file with the class names, one a line."""
    classes: Annotated[int, Field(ge=1)] = 10
    """How many of the largest and of the smallest classes to list."""
    sheet: Path | None = None
    """Write a contact sheet to this PNG file."""
    pictures: Annotated[int, Field(ge=1, le=1000)] = 60
    """Pictures on the contact sheet, at even distances over the set."""


def main() -> int:
    try:
        options = tyro.cli(InspectOptions, description=__doc__)
        with shards.open(options.path, classes=options.class_file) as store:
            print(summary(store, options.classes))
            if options.sheet is None:
                return 0
            sheet, faults = contact_sheet(store, options.pictures)
        sheet.save(options.sheet, "PNG")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"contact sheet: {options.sheet}")
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
