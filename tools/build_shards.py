"""Build a shard set: WebDataset tars or an FFCV .beton, from a folder, archives, a list, or other shards.

python tools/build_shards.py --source ILSVRC/train --out /data/imagenet-train --name imagenet-train

Killed or interrupted at any moment, the same command goes on where it was.
"""

from __future__ import annotations

import sys

import tyro

from shards.build import BuildOptions, build
from shards.lists import ODDITIES_NAME, REJECTED_NAME
from shards.plan import one_file


def main() -> int:
    try:
        options = tyro.cli(BuildOptions, description=__doc__)
        report = build(options)
    except KeyboardInterrupt:
        print("interrupted; finished shards are kept: run the same command again to go on", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    size = f"{report.samples} images of {report.classes} classes, {report.image_bytes / 1e6:.1f} MB in the source"
    plural = "" if report.shards == 1 else "s"
    shards = (
        f"{report.shards} piece{plural} of one file"
        if one_file(options)
        else f"{report.shards} shard{plural}"
    )
    if options.dry_run:
        print(f"would build {shards} ({report.reused_shards} are finished) from {size}")
    elif not report.built:
        print(f"nothing to do: {options.out} already holds {size} in {shards}")
    else:
        print(f"{options.out}: {size} in {shards} ({report.reused_shards} from an earlier run)")
    for kind, count in report.counts.items():
        if count:
            print(f"  {kind}: {count}")
    for name in (REJECTED_NAME, ODDITIES_NAME):
        if (options.out / name).is_file() and not options.dry_run:
            print(f"  file by file: {options.out / name}")
    if report.ignored:
        print(f"  passed over {report.ignored} files that are not named as images")
    return 0


if __name__ == "__main__":
    sys.exit(main())
