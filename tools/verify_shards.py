"""Verify a shard set: every file against the manifest, every image against its checksum.

python tools/verify_shards.py /data/imagenet-train

Sets without a manifest (tars or .beton files of others) are compared with the index made when they were first
opened.

Exit code: 0 where the set is sound, 1 where there are faults, 2 where there is no set to verify:
no shards, or shards of others that are too damaged to be indexed.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import tyro
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from shards.verify import verify


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class VerifyOptions:
    """What to verify."""

    path: tyro.conf.Positional[Path]
    """Folder of the shard set, one .tar or .beton, or a pattern such as 'train-{000000..001281}.tar'."""
    decode: bool = False
    """Decode every image as well (many times slower)."""
    workers: Annotated[int, Field(ge=1)] = os.cpu_count() or 1
    """Shards, and parts of a .beton, looked at side by side."""
    class_file: Path | None = None
    """For shards without a manifest: file with the class names, one a line."""
    max_faults: Annotated[int, Field(ge=1)] = 100
    """Faults printed; all are counted."""


def main() -> int:
    try:
        options = tyro.cli(VerifyOptions, description=__doc__)
        found = verify(options.path, options.decode, options.workers, True, options.class_file)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for fault in found.faults[: options.max_faults]:
        print(fault)
    if len(found.faults) > options.max_faults:
        print(f"... and {len(found.faults) - options.max_faults} more")
    looked_at = f"{found.samples} samples in {found.shards} shards"
    print(f"{options.path}: {looked_at}, {f'{len(found.faults)} faults' if found.faults else 'sound'}")
    return 1 if found.faults else 0


if __name__ == "__main__":
    sys.exit(main())
