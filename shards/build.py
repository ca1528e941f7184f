"""Build a shard set: plan the shards, write them in parallel, put the manifest on top.

Which image goes into which shard is planned before anything is written, and each shard is a pure
function of its images, so the bytes do not depend on the number of workers or on interruptions.
While a build is unfinished the output folder holds `.build/`: the lock, the options, and for each
finished shard its rows (`<shard>.part`), from which a later run goes on.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import fcntl
import io
import json
import multiprocessing
import os
import shutil
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import xxhash
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as checked_dataclass
from tqdm import tqdm

from shards.keys import unique_keys
from shards.manifest import (
    HEADER_NAME,
    TABLE_NAME,
    FileName,
    Header,
    ShardFile,
    Table,
    decode_table,
    describe_table,
    encode_table,
    join_tables,
    make_table,
    read_header,
    sync_folder,
    write_file,
    write_manifest,
)
from shards.scan import Scan, scan
from shards.side_files import INFO_NAME, SIZES_NAME, side_files
from shards.source_folder import SourceImage, list_image_folder
from shards.target_tar import TarShardWriter

_SAMPLES_PER_SHARD = 1000
_WORK = ".build"
_WORKERS_LOCK = "workers"
_ORPHAN_TIMEOUT_S = 30.0


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class BuildOptions:
    """What to build, from what, and how."""

    source: Path
    """Folder with one folder of images per class: SOURCE/<class>/<image>."""
    out: Path
    """Folder for the shard set; made where it is not there."""
    name: FileName
    """Name of the set; its shards are <name>-000000.tar and so on."""
    samples_per_shard: Annotated[int, Field(ge=1)] | None = None
    """Images in a shard; 1000 where neither this nor --bytes-per-shard is given."""
    bytes_per_shard: Annotated[int, Field(ge=1)] | None = None
    """Close a shard before its images exceed this many bytes."""
    workers: Annotated[int, Field(ge=1)] = os.cpu_count() or 1
    """Processes that read, check and write; the result does not depend on it."""
    on_error: Literal["stop", "skip"] = "stop"
    """At a damaged image: stop and name it, or leave it out and list it in rejected.csv."""
    validate: Literal["scan", "decode"] = "scan"
    """Check of each image: its structure, or a full decode as well (many times slower)."""
    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None
    """Shuffle all images before they are put into shards; sorted by class and name without it."""
    only: Annotated[int, Field(ge=0)] | None = None
    """Write this one shard (its number) of a finished set again, for example after its file was damaged."""
    dry_run: bool = False
    """Only say what would be built."""

    def __post_init__(self) -> None:
        if self.samples_per_shard is not None and self.bytes_per_shard is not None:
            raise ValueError("both samples_per_shard and bytes_per_shard are given; give one of them")
        out, source = self.out.resolve(), self.source.resolve()
        if out == source or source in out.parents:
            raise ValueError(f"--out {self.out} lies in --source {self.source}, where it would be a class")

    def deciding(self) -> dict[str, Any]:
        """The options that decide the bytes of the result, for the manifest."""
        samples = self.samples_per_shard
        if samples is None and self.bytes_per_shard is None:
            samples = _SAMPLES_PER_SHARD
        return {
            "samples_per_shard": samples,
            "bytes_per_shard": self.bytes_per_shard,
            "validate": self.validate,
            "seed": self.seed,
        }


@dataclass(frozen=True)
class BuildReport:
    """What a build did."""

    samples: int
    """In the set; in a dry run, in the source."""
    classes: int
    shards: int
    reused_shards: int
    """Of `shards`, those that an earlier run had finished."""
    image_bytes: int
    ignored: int
    """Files in the source whose names are not those of images."""
    counts: dict[str, int] = field(default_factory=dict)
    """Oddities: `grey`, `cmyk`, `png`, `misnamed` (PNG named .JPEG or the like), `rotated`, `rejected`."""
    built: bool = True
    """False in a dry run and where the finished set was already there."""


@dataclass(frozen=True, slots=True)
class _Image:
    path: str
    key: str
    label: int
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class _Task:
    """One shard to be written; all a worker needs."""

    file_name: str
    out: Path
    source: Path
    images: list[_Image]
    validate: Literal["scan", "decode"]
    on_error: Literal["stop", "skip"]

    @property
    def part(self) -> Path:
        return self.out / _WORK / f"{self.file_name}.part"

    @property
    def bytes(self) -> int:
        return sum(image.size for image in self.images)

    def fingerprint(self) -> str:
        """Changes when an image of the shard is another one, or was touched."""
        digest = xxhash.xxh3_128(self.validate.encode())
        for image in self.images:
            line = f"{image.path}\0{image.key}\0{image.label}\0{image.size}\0{image.mtime_ns}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


@dataclass(frozen=True)
class _Part:
    """A finished shard."""

    shard: ShardFile
    counts: dict[str, int]
    rejected: list[tuple[str, str]]
    table: Table


class _BadImageError(ValueError):
    pass


def _fault_of(image: _Image, data: bytes, found: Scan, validate: str) -> str | None:
    if len(data) != image.size:
        return f"changed during the build: {image.size} bytes when listed, {len(data)} when read"
    if len(data) >= 2**32:
        return "larger than 4 GiB"
    if found.fault:
        return found.words
    if validate == "decode":
        from PIL import Image  # only where wanted: workers start faster without it

        try:
            with Image.open(io.BytesIO(data)) as picture:
                picture.load()
        except Exception as error:  # decoders raise whatever they like on damaged data
            return f"does not decode: {error}"
    return None


def _oddities(path: str, found: Scan) -> Iterator[str]:
    extension = os.path.splitext(path)[1].lower()
    if found.format == "jpeg":
        if found.components == 4:
            yield "cmyk"
    else:
        yield "png"
    if found.components <= 2:
        yield "grey"
    if (extension == ".png") != (found.format == "png"):
        yield "misnamed"
    if found.orientation != 1:
        yield "rotated"


def _write_shard(task: _Task) -> _Part:
    """Write one shard and its part file; the part says that the shard is finished."""
    rows: dict[str, list[int]] = {
        name: [] for name in ("offset", "length", "label", "width", "height", "checksum")
    }
    keys: list[str] = []
    counts: Counter[str] = Counter()
    rejected: list[tuple[str, str]] = []
    temporary = task.out / _WORK / f"{task.file_name}.{os.getpid()}.tmp"
    with TarShardWriter(task.out / task.file_name, temporary) as writer:
        for image in task.images:
            try:
                data = (task.source / image.path).read_bytes()
            except OSError as error:
                fault: str | None = f"cannot be read: {error.strerror}"
            else:
                found = scan(data)
                fault = _fault_of(image, data, found, task.validate)
            if fault is not None:
                if task.on_error == "stop":
                    raise _BadImageError(f"{task.source / image.path}: {fault}")
                rejected.append((image.path, fault))
                continue
            extension = "png" if found.format == "png" else "jpg"
            rows["offset"].append(writer.add(image.key, extension, data, image.label))
            rows["length"].append(len(data))
            rows["label"].append(image.label)
            rows["width"].append(found.width)
            rows["height"].append(found.height)
            rows["checksum"].append(xxhash.xxh3_64_intdigest(data))
            keys.append(image.key)
            counts.update(_oddities(image.path, found))
        shard = writer.finish()
    columns: dict[str, npt.NDArray[Any]] = {
        name: np.array(values, dtype=np.uint64) for name, values in rows.items()
    }
    table = make_table({**columns, "shard": np.zeros(len(keys), dtype=np.uint32)}, keys)
    part = _Part(shard, dict(counts), rejected, table)
    facts = {
        "fingerprint": task.fingerprint(),
        "shard": shard.model_dump(),
        "counts": part.counts,
        "rejected": rejected,
    }
    write_file(task.part, json.dumps(facts).encode() + b"\n" + encode_table(table))
    return part


def _finished_part(task: _Task) -> _Part | None:
    """The part of a shard that an earlier run finished from the same images, if there is one."""
    try:
        text, _, table_bytes = task.part.read_bytes().partition(b"\n")
        facts = json.loads(text)
        shard = ShardFile.model_validate(facts["shard"])
        table = decode_table(table_bytes, str(task.part))
        same = facts["fingerprint"] == task.fingerprint() and shard.name == task.file_name
        tar = task.out / task.file_name
        whole = tar.stat().st_size == shard.size and tar.with_suffix(".idx").is_file()
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not there, or not ours: the shard is written again
    if not (same and whole) or (facts["rejected"] and task.on_error == "stop"):
        return None
    return _Part(shard, facts["counts"], [(path, why) for path, why in facts["rejected"]], table)


def _start_worker(lock: Path) -> None:
    # Ctrl-C is the builder's: it lets running shards finish and starts no more.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A worker whose builder was killed must not write beside the next one: it ends with its builder, and
    # until it has ended the lock (never closed here) keeps the next builder waiting.
    fcntl.flock(os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), fcntl.LOCK_SH)
    parent = multiprocessing.parent_process()
    if parent is None or not parent.is_alive():
        os._exit(1)

    def end_with_builder() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_builder, daemon=True).start()


def _wait_for_orphans(lock: Path) -> None:
    """Wait until the workers of a builder that was killed are gone; they end by themselves."""
    fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        until_s = time.monotonic() + _ORPHAN_TIMEOUT_S
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > until_s:
                    raise ValueError(
                        f"{lock.parent.parent}: worker processes of an earlier builder are still writing here "
                        f"after {_ORPHAN_TIMEOUT_S:.0f} s; end them and run the same command again"
                    ) from None
                time.sleep(0.01)
    finally:
        os.close(fd)


def _plan(options: BuildOptions, images: list[SourceImage], classes: list[str]) -> list[_Task]:
    keys = unique_keys((classes[i.label], i.path.partition("/")[2]) for i in images)
    planned = [_Image(i.path, k, i.label, i.size, i.mtime_ns) for i, k in zip(images, keys, strict=True)]
    if options.seed is not None:
        # Sorting by a keyed hash is the same shuffle on every machine and in every version of numpy.
        seed = options.seed
        planned.sort(
            key=lambda i: (xxhash.xxh3_64_intdigest(i.path.encode("utf-8", "surrogateescape"), seed), i.path)
        )
    deciding = options.deciding()
    most_images, most_bytes = deciding["samples_per_shard"], deciding["bytes_per_shard"]
    groups: list[list[_Image]] = []
    group_bytes = 0
    for image in planned:
        full = not groups or (
            len(groups[-1]) >= most_images
            if most_images is not None
            else group_bytes + image.size > most_bytes
        )
        if full:
            groups.append([])
            group_bytes = 0
        groups[-1].append(image)
        group_bytes += image.size
    return [
        _Task(
            f"{options.name}-{number:06d}.tar",
            options.out.absolute(),
            options.source.absolute(),
            group,
            options.validate,
            options.on_error,
        )
        for number, group in enumerate(groups)
    ]


def _source_hash(tasks: list[_Task]) -> str:
    digest = xxhash.xxh3_128()
    for task in tasks:
        for image in task.images:
            digest.update(f"{image.path}\0{image.size}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _already_built(options: BuildOptions, source: str, classes: list[str]) -> Header | None:
    """The header of the finished set in the output folder, if it is the one that is asked for.

    The shard files must be there and of their size, except the one that is to be written again.
    """
    if not (options.out / HEADER_NAME).is_file():
        return None
    header = read_header(options.out)
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
    for number, shard in enumerate(header.shards):
        tar = options.out / shard.name
        if number == options.only:
            continue
        if not tar.is_file() or tar.stat().st_size != shard.size:
            raise ValueError(
                f"{tar}: missing or of another size than {HEADER_NAME} says; bring it back, or write "
                f"it again with the same command and --only {number}"
            )
    return header


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the output folder; the lock goes with the process, however it ends."""
    path = out / _WORK / "lock"
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:
            continue  # the builder before us has just removed the folder
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), path.stat()):
                    break
            os.close(fd)  # locked a file that the builder before us has removed
        except BlockingIOError:
            owner = os.read(fd, 200).decode(errors="replace").strip()
            os.close(fd)
            raise ValueError(
                f"{out}: another builder is writing here ({owner or 'just started'}); wait for it or stop it"
            ) from None
    try:
        os.ftruncate(fd, 0)
        os.write(fd, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        os.close(fd)


def _begin(options: BuildOptions) -> None:
    """Claim the folder for these options, or refuse; remove what an interrupted run left half written."""
    work = options.out / _WORK
    _wait_for_orphans(work / _WORKERS_LOCK)
    plan = work / "options.json"
    wanted = {"name": options.name, **options.deciding()}
    if plan.is_file():
        found = json.loads(plan.read_text())
        if found != wanted:
            raise ValueError(
                f"{options.out}: holds an unfinished build with other options: {found}, wanted {wanted}. "
                "Finish it with those, give another --out, or delete the folder"
            )
    else:
        foreign = sorted(options.out.glob(f"{options.name}-*.tar"))
        if foreign:
            raise ValueError(
                f"{foreign[0]}: already there, and not from an unfinished build of this tool; "
                "give another --out or --name, or delete it"
            )
        write_file(plan, json.dumps(wanted).encode())
    names = (f"{options.name}-*.idx", HEADER_NAME, TABLE_NAME, "rejected.csv", INFO_NAME, SIZES_NAME)
    ours = [f".{name}.*.tmp" for name in names]
    for leftover in [*work.glob("*.tmp"), *(path for name in ours for path in options.out.glob(name))]:
        leftover.unlink()


def _write_missing(tasks: list[_Task], workers: int, bar: Any) -> tuple[list[_Part], int]:
    """Parts of all shards in their order, writing those that are not there yet; how many were there."""
    parts: dict[int, _Part] = {}
    missing: list[int] = []
    for number, task in enumerate(tasks):
        part = _finished_part(task)
        if part is None:
            missing.append(number)
        else:
            parts[number] = part
            bar.update(len(task.images))
    reused = len(parts)
    bar.unpause()
    written_bytes = 0

    def done(number: int, part: _Part) -> None:
        nonlocal written_bytes
        parts[number] = part
        written_bytes += part.shard.size
        seconds = bar.format_dict["elapsed"]
        bar.set_postfix_str(f"{written_bytes / 1e6 / max(seconds, 1e-9):.0f} MB/s", refresh=False)
        bar.update(len(tasks[number].images))

    if min(workers, len(missing)) <= 1:
        for number in missing:
            done(number, _write_shard(tasks[number]))
        return [parts[number] for number in range(len(tasks))], reused

    # A server that has imported everything forks clean workers; forking this process would copy
    # whatever threads and locks its caller has.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["shards.build"])
    failures: dict[int, BaseException] = {}
    lock = tasks[0].part.with_name(_WORKERS_LOCK)
    pool: Executor = ProcessPoolExecutor(min(workers, len(missing)), context, _start_worker, (lock,))
    try:
        futures: dict[Future[_Part], int] = {pool.submit(_write_shard, tasks[n]): n for n in missing}
        for future in as_completed(futures):
            if future.cancelled():
                continue
            error = future.exception()
            if error is None:
                done(futures[future], future.result())
                continue
            failures[futures[future]] = error
            # Earlier shards were started earlier and go on, so the first fault is found on every run.
            for other in futures:
                other.cancel()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    if failures:
        raise failures[min(failures)]
    return [parts[number] for number in range(len(tasks))], reused


def _remove_others(options: BuildOptions, tasks: list[_Task]) -> None:
    """Remove shards of an earlier, larger plan, so that a glob over the folder finds the set alone."""
    names = {task.file_name for task in tasks}
    for tar in options.out.glob(f"{options.name}-*.tar"):
        if tar.name not in names:
            tar.with_suffix(".idx").unlink(missing_ok=True)
            tar.unlink()


def _write_rejected(out: Path, rejected: list[tuple[str, str]]) -> None:
    path = out / "rejected.csv"
    if not rejected:
        path.unlink(missing_ok=True)
        return
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("file", "reason"))
    rows.writerows(rejected)
    write_file(path, text.getvalue().encode("utf-8", "surrogateescape"))


def build(options: BuildOptions, progress: bool = True) -> BuildReport:
    """Build a shard set from an image folder, or go on with an unfinished one.

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
    folder = list_image_folder(options.source)
    tasks = _plan(options, folder.images, folder.classes)
    image_bytes = sum(image.size for image in folder.images)
    source = _source_hash(tasks)

    def report(header: Header | None, reused: int, built: bool) -> BuildReport:
        return BuildReport(
            samples=header.samples if header else len(folder.images),
            classes=len(folder.classes),
            shards=len(tasks),
            reused_shards=reused,
            image_bytes=image_bytes,
            ignored=folder.ignored,
            counts=header.counts if header else {},
            built=built,
        )

    if options.dry_run:
        return report(None, sum(_finished_part(task) is not None for task in tasks), False)
    work = options.out / _WORK
    header = _already_built(options, source, folder.classes)
    if options.only is not None and (header is None or options.only >= len(tasks)):
        found = f"has shards 0..{len(tasks) - 1}" if header else f"has no {HEADER_NAME}"
        raise ValueError(
            f"{options.out}: --only {options.only} needs that shard of a finished set, and this folder {found}; "
            "leave --only out to build or finish the set"
        )
    if header is not None and options.only is None and not work.exists():
        return report(header, len(tasks), False)
    try:
        with _locked(options.out):
            header = _already_built(options, source, folder.classes)
            if header is not None and options.only is not None:
                _write_again(options.out, tasks[options.only], header.shards[options.only])
                return report(header, len(tasks) - 1, True)
            if header is not None:  # finished by another builder just now, or killed while tidying up
                shutil.rmtree(work, ignore_errors=True)
                return report(header, len(tasks), False)
            _begin(options)
            with tqdm(total=len(folder.images), unit=" img", disable=not progress) as bar:
                parts, reused = _write_missing(tasks, options.workers, bar)
            header = _finish(options, folder.classes, source, tasks, parts)
    except _BadImageError as error:
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
        free_gb = shutil.disk_usage(options.out).free / 1e9
        raise OSError(
            error.errno,
            f"no space left in {options.out}: the set needs about {image_bytes / 1e9:.1f} GB, "
            f"{free_gb:.1f} GB are free. Finished shards are kept: make room and run the same command again",
        ) from None
    return report(header, reused, True)


def _write_again(out: Path, task: _Task, wanted: ShardFile) -> None:
    """Put a shard of a finished set back, if the source still gives the bytes that the manifest lists."""
    aside = out / _WORK / "again"
    try:
        (aside / _WORK).mkdir(parents=True, exist_ok=True)
        found = _write_shard(replace(task, out=aside)).shard
        if found != wanted:
            raise ValueError(
                f"{out / wanted.name}: nothing was replaced: the images in the source no longer give the shard "
                f"that {HEADER_NAME} lists (content differs, or another --on-error); bring them back, or "
                "build the set again in another folder"
            )
        for name in (Path(wanted.name).with_suffix(".idx").name, wanted.name):
            (aside / name).replace(out / name)
        sync_folder(out)
    finally:
        shutil.rmtree(out / _WORK, ignore_errors=True)


def _finish(
    options: BuildOptions, classes: list[str], source: str, tasks: list[_Task], parts: list[_Part]
) -> Header:
    rejected = [entry for part in parts for entry in part.rejected]
    table = join_tables([part.table for part in parts])
    if not len(table):
        raise ValueError(
            f"{options.source}: all {len(rejected)} images are damaged, the first is {rejected[0][0]}: "
            f"{rejected[0][1]}"
        )
    counts: Counter[str] = Counter()
    for part in parts:
        counts.update(part.counts)
    encoded = encode_table(table)
    header = Header(
        name=options.name,
        samples=len(table),
        classes=classes,
        options=options.deciding(),
        source=source,
        counts={**dict(sorted(counts.items())), "rejected": len(rejected)},
        table=describe_table(encoded),
        shards=[part.shard for part in parts],
    )
    _remove_others(options, tasks)
    _write_rejected(options.out, rejected)
    for name, content in side_files(header).items():
        write_file(options.out / name, content)
    write_manifest(options.out, header, encoded)
    # A builder that waits to lock may put the folder back; the next run removes it then.
    shutil.rmtree(options.out / _WORK, ignore_errors=True)
    return header
