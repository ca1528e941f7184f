"""Build a shard set: plan the shards, write them in parallel, put the manifest on top.

Which image goes into which shard is planned before anything is written, and each shard is a pure
function of its images, so the bytes do not depend on the number of workers or on interruptions.
While a build is unfinished the output folder holds `.build/`: the lock, the options, and for each
finished shard its rows (`<shard>.part`), from which a later run goes on.
"""

from __future__ import annotations

import errno
import shutil
from collections import Counter
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

from shards.claim import begin, locked
from shards.lists import write_lists
from shards.manifest import (
    HEADER_NAME,
    Header,
    ShardFile,
    describe_table,
    encode_table,
    join_tables,
    read_header,
    read_table,
    sync_folder,
    write_file,
    write_manifest,
)
from shards.options import BuildOptions, BuildReport
from shards.parts import Part, finished_part, forget_stale_join
from shards.plan import TARGETS, WORK, Task, make_plan, one_file, source_hash
from shards.side_files import side_files
from shards.sources import list_source
from shards.target import is_shard_name
from shards.workers import write_missing
from shards.write_shard import BadImageError, write_shard

__all__ = ["BuildOptions", "BuildReport", "build"]

_WHOLE_AGAIN = f"delete {HEADER_NAME} and the file and run the command without --only to build the set again"
_AFRESH = "To build the set again, delete the folder or give another --out"


def _already_built(options: BuildOptions, source: str, classes: list[str]) -> Header | None:
    """The header of the finished set in the output folder, if it is the one that is asked for.

    The shard files must be there and of their size, unless one is to be written again: others may be gone too.
    """
    if not (options.out / HEADER_NAME).is_file():
        return None
    try:
        header = read_header(options.out)
    except ValueError as error:
        raise ValueError(f"{error}. {_AFRESH}") from None
    found = {"name": header.name, **header.options}
    wanted = {"name": options.name, **options.deciding()}
    differing = [
        f"{key} is {found.get(key)!r}, wanted {value!r}"
        for key, value in wanted.items()
        if found.get(key) != value
    ]
    if not differing and (header.source != source or header.classes != classes):
        differing = ["the images or classes in --source are others (names or sizes differ)"]
    if differing:
        raise ValueError(
            f"{options.out}: holds a finished set of another build: {'; '.join(differing)}. "
            "Give another --out, or delete this one first"
        )
    for number, shard in enumerate(header.shards if options.only is None else []):
        path = options.out / shard.name
        if not path.is_file() or path.stat().st_size != shard.size:
            raise ValueError(
                f"{path}: missing or of another size than {HEADER_NAME} says; bring it back, or "
                + (
                    _WHOLE_AGAIN
                    if one_file(options)
                    else f"write it again with the same command and --only {number}"
                )
            )
    try:
        read_table(options.out, header)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{error}. {_AFRESH}") from None
    return header


def _mend_side_files(out: Path, header: Header) -> bool:
    """Write those side files of a finished set that are gone or differ; whether there were any."""
    lost = {
        name: content
        for name, content in side_files(header).items()
        if not (out / name).is_file() or (out / name).read_bytes() != content
    }
    for name, content in lost.items():
        write_file(out / name, content)
    return bool(lost)


def _remove_others(options: BuildOptions, shards: list[ShardFile]) -> None:
    """Remove shards of an earlier, larger plan, so that a glob over the folder finds the set alone."""
    target = TARGETS[options.target]
    names = {shard.name for shard in shards}
    for path in options.out.glob(f"{options.name}-*{target.suffix}"):
        if path.name not in names and is_shard_name(path.name, options.name, target.suffix):
            for suffix in target.beside:
                path.with_suffix(suffix).unlink(missing_ok=True)
            path.unlink()


def build(options: BuildOptions, progress: bool = True) -> BuildReport:
    """Build a shard set, or go on with an unfinished one.

    Args:
        options: what to build.
        progress: show a progress bar on standard error.

    Raises:
        FileNotFoundError: the source is not there.
        ValueError: the source is empty or has a class without images; the output folder holds another
            build or another builder works in it; an image is damaged (with `on_error="stop"`; names the
            first one, and keeps the shards that were finished).
        OSError: an output file cannot be written, for example on a full disk; run again to go on.
    """
    listing = list_source(options)
    tasks = make_plan(options, listing)
    image_bytes = sum(sample.size for sample in listing.samples)
    source = source_hash(tasks)

    def report(header: Header | None, reused: int, built: bool) -> BuildReport:
        return BuildReport(
            samples=header.samples if header else len(listing.samples),
            classes=len(listing.classes),
            shards=len(tasks),
            reused_shards=reused,
            image_bytes=image_bytes,
            ignored=listing.ignored,
            counts=header.counts if header else {},
            built=built,
        )

    work = options.out / WORK
    header = _already_built(options, source, listing.classes)
    if options.dry_run:
        reused = len(tasks) if header else sum(finished_part(task) is not None for task in tasks)
        return report(header, reused, False)
    if options.only is not None and one_file(options):
        raise ValueError(
            f"{options.out}: the set is one file, and --only is for one of several; {_WHOLE_AGAIN}"
        )
    if options.only is not None and (header is None or options.only >= len(tasks)):
        found = f"has shards 0..{len(tasks) - 1}" if header else f"has no {HEADER_NAME}"
        raise ValueError(
            f"{options.out}: --only {options.only} needs that shard of a finished set, and this folder {found}; "
            "leave --only out to build or finish the set"
        )
    if header is not None and options.only is None and not work.exists():
        return report(header, len(tasks), _mend_side_files(options.out, header))
    try:
        with locked(options.out):
            header = _already_built(options, source, listing.classes)
            if header is not None and options.only is not None:
                _write_again(options.out, tasks[options.only], header.shards[options.only])
                return report(header, len(tasks) - 1, True)
            if header is not None:  # finished by another builder just now, or killed while tidying up
                shutil.rmtree(work, ignore_errors=True)
                return report(header, len(tasks), False)
            begin(options)
            if one_file(options):
                forget_stale_join(tasks, _joining(options))
            parts, reused = write_missing(tasks, options.workers, progress)
            header = _finish(options, listing.classes, source, tasks, parts)
    except BadImageError as error:
        raise ValueError(
            f"{error}. Finished shards are kept: replace or remove the file and run the same command again, "
            "or add --on-error skip"
        ) from None
    except BrokenProcessPool:
        raise ChildProcessError(
            "a worker process was killed, most likely for want of memory; finished shards are kept: run the "
            "same command again with fewer --workers"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        there = next(folder for folder in (options.out, *options.out.absolute().parents) if folder.exists())
        free_gb = shutil.disk_usage(there).free / 1e9
        raise OSError(
            error.errno,
            f"no space left in {options.out}: the set needs about {image_bytes / 1e9:.1f} GB, "
            f"{free_gb:.1f} GB are free. Finished shards are kept: make room and run the same command again",
        ) from None
    return report(header, reused, True)


def _joining(options: BuildOptions) -> Path:
    return options.out / WORK / f"{options.name}.joining"


def _write_again(out: Path, task: Task, wanted: ShardFile) -> None:
    """Put a shard of a finished set back, if the source still gives the bytes that the manifest lists."""
    aside = task.work / "again"
    try:
        aside.mkdir(parents=True, exist_ok=True)
        found = write_shard(replace(task, path=aside / wanted.name, work=aside)).shard
        if found != wanted:
            raise ValueError(
                f"{out / wanted.name}: nothing was replaced: the images in the source no longer give the shard "
                f"that {HEADER_NAME} lists (content differs, or another --on-error); bring them back, or "
                "build the set again in another folder"
            )
        for suffix in (*task.target.beside, task.target.suffix):
            (aside / wanted.name).with_suffix(suffix).replace(task.path.with_suffix(suffix))
        sync_folder(out)
    finally:
        shutil.rmtree(task.work, ignore_errors=True)


def _finish(
    options: BuildOptions, classes: list[str], source: str, tasks: list[Task], parts: list[Part]
) -> Header:
    rejected = [entry for part in parts for entry in part.rejected]
    table = join_tables([part.table for part in parts])
    shards = [part.shard for part in parts]
    if not len(table):
        raise ValueError(
            f"{options.source}: all {len(rejected)} images are damaged, the first is {rejected[0][0]}: "
            f"{rejected[0][1]}"
        )
    counts: Counter[str] = Counter()
    for part in parts:
        counts.update(part.counts)
    if one_file(options):
        target, name = TARGETS[options.target], f"{options.name}{TARGETS[options.target].suffix}"
        pieces = [task.path for task in tasks]
        whole, table = target.join(options.out / name, _joining(options), pieces, table)
        shards = [whole]
    encoded = encode_table(table)
    header = Header(
        storage=TARGETS[options.target].storage,
        name=options.name,
        samples=len(table),
        classes=classes,
        options=options.deciding(),
        source=source,
        counts={**dict(sorted(counts.items())), "rejected": len(rejected)},
        table=describe_table(encoded),
        shards=shards,
    )
    _remove_others(options, shards)
    write_lists(options.out, parts)
    for name, content in side_files(header).items():
        write_file(options.out / name, content)
    write_manifest(options.out, header, encoded)
    # A builder that waits to lock may put the folder back; the next run removes it then.
    shutil.rmtree(options.out / WORK, ignore_errors=True)
    return header
