"""Build a shard set from a folder of images.

python tools/build_shards.py --source ILSVRC/train --out /data/imagenet-train --name imagenet-train
"""

from __future__ import annotations

import sys

import tyro

from shards.build import BuildOptions, build


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
    size = f"{report.samples} images of {report.classes} classes, {report.image_bytes / 1e6:.1f} MB"
    if options.dry_run:
        print(f"would build {report.shards} shards ({report.reused_shards} are finished) from {size}")
    elif not report.built:
        print(f"nothing to do: {options.out} already holds {size} in {report.shards} shards")
    else:
        print(f"{options.out}: {size} in {report.shards} shards ({report.reused_shards} from an earlier run)")
    for kind, count in report.counts.items():
        if count:
            print(f"  {kind}: {count}")
    if report.counts.get("rejected"):
        print(f"  the rejected files and why: {options.out / 'rejected.csv'}")
    if report.ignored:
        print(f"  passed over {report.ignored} files that are not named as images")
    return 0


if __name__ == "__main__":
    sys.exit(main())
