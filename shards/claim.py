"""One builder at a time in an output folder, and one build: locks, and the options of an unfinished build."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from shards.lists import ODDITIES_NAME, REJECTED_NAME
from shards.manifest import HEADER_NAME, TABLE_NAME, write_file
from shards.options import BuildOptions
from shards.plan import TARGETS, WORK
from shards.side_files import INFO_NAME, SIZES_NAME

WORKERS_LOCK = "workers"
_ORPHAN_TIMEOUT_S = 30.0


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the output folder; the lock goes with the process, however it ends.

    Raises:
        ValueError: another builder holds it.
    """
    path = out / WORK / "lock"
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


def hold_as_worker(lock: Path) -> None:
    """Keep the next builder waiting until this process has ended; the descriptor is never closed here."""
    fcntl.flock(os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), fcntl.LOCK_SH)


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


def begin(options: BuildOptions) -> None:
    """Claim a locked folder for these options; remove what an interrupted run left half written.

    Raises:
        ValueError: the folder holds an unfinished build with other options, or somebody else's shards.
    """
    work = options.out / WORK
    suffix = TARGETS[options.target].suffix
    _wait_for_orphans(work / WORKERS_LOCK)
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
        foreign = [
            *options.out.glob(f"{options.name}-*{suffix}"),
            *options.out.glob(f"{options.name}{suffix}"),
        ]
        if foreign:
            raise ValueError(
                f"{min(foreign)}: already there, and not from an unfinished build of this tool; "
                "give another --out or --name, or delete it"
            )
        write_file(plan, json.dumps(wanted).encode())
    beside = (f"{options.name}*{suffix}" for suffix in TARGETS[options.target].beside)
    names = (*beside, HEADER_NAME, TABLE_NAME, REJECTED_NAME, ODDITIES_NAME, INFO_NAME, SIZES_NAME)
    ours = [f".{name}.*.tmp" for name in names]
    for leftover in [*work.glob("*.tmp"), *(path for name in ours for path in options.out.glob(name))]:
        leftover.unlink()
