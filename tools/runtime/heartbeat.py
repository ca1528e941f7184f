"""Notices a process of the run that died, was stopped, was cut off or failed, and ends the others with its name.

Collectives alone would leave the others waiting: NCCL for ten minutes, and then without saying for whom. Every
process beats into a small key-value store in the first one; the first one watches the beats and posts a verdict,
which all read with their next beat. A process that fails posts its own error. Nobody watches the first one so: a
request to it that stays without an answer is what tells of it, and a second thread waits for that, since the store's
own timeout ends no read from a connection that is open and silent.

Time is counted in wakings of the thread that watches, not read from a clock: where a scheduler stops all processes for
an hour and lets them go on, nobody has been silent.

Beats come from a thread of their own: a process that runs and waits for ever is not noticed here. Waits for data have
their own watchdog; what waits for another process ends when that one is named, or with the collective's timeout.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

log = logging.getLogger(__name__)

EXIT_CODE = 1
_VERDICT = "verdict"
_CLEAN_UP_S = 15.0
_BROKEN_COLLECTIVE = ("gloo", "NCCL", "Connection", "connection")


class Heartbeat:
    """Beats while the process runs. A context manager that all processes enter together; alone it idles.

    An error that leaves it is told to the others at once. What may wait for ever when it is closed (readers on a
    mount that hangs) is to be closed after that, outside of it, and then `all_closed` called: a process that takes
    too long, also one that is alone, prints its error and ends.

    Args:
        lost_after_s: silence after which a process is given up; the others end within a fifth of it.
    """

    def __init__(self, *, lost_after_s: float) -> None:
        self._lost_after_s = lost_after_s
        self._interval_s = min(5.0, lost_after_s / 15)
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._requests = 0
        self._waiting_for = 0
        self._left = threading.Event()
        self._error: BaseException | None = None
        self._store: Any = None
        self._thread: threading.Thread | None = None
        self._rank = self._ranks = 0
        self._places: list[tuple[int, str]] = []
        self._here = pid_space()
        self._names = [f"rank 0 (process {os.getpid()} on {socket.gethostname()})"]
        self._last: threading.Timer | None = None

    def __enter__(self) -> Heartbeat:
        if not (dist.is_initialized() and dist.get_world_size() > 1):
            return self
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        patience = timedelta(seconds=self._lost_after_s)
        # A gloo group, so that neither address nor names have to pass through a GPU.
        group: Any = dist.new_group(backend="gloo")
        port: list[int] = [0]
        if self._rank == 0:
            self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=patience)
            port = [self._store.port]
        dist.broadcast_object_list(port, group=group)
        if self._store is None:
            self._store = TCPStore(host, port[0], is_master=False, timeout=patience)
        places: list[Any] = [None] * self._ranks
        dist.all_gather_object(places, (os.getpid(), self._here, socket.gethostname()), group=group)
        self._places = [(pid, space) for pid, space, _ in places]
        self._names = [f"rank {rank} (process {pid} on {name})" for rank, (pid, _, name) in enumerate(places)]
        if self._rank:
            threading.Thread(target=self._watch_first, name="vqsa-heartbeat-first", daemon=True).start()
        self._beat(0)
        dist.barrier(group=group)
        self._thread = threading.Thread(target=self._watch, name="vqsa-heartbeat", daemon=True)
        self._thread.start()
        return self

    @property
    def told_within_s(self) -> float:
        """Time in which a failure of another process, once posted, ends this one; 0 alone."""
        # Up to one interval to read it; the first process waits two more before it ends.
        return 0.0 if self._thread is None else 4 * self._interval_s

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self._end(error)
        finally:
            self._left.set()

    def _end(self, error: BaseException | None) -> None:
        self._error = error
        if error is not None:
            # What is closed after this may wait for ever: for a broken collective, for a mount that hangs.
            self._last = threading.Timer(self._lost_after_s + _CLEAN_UP_S, self._last_resort, (error,))
            self._last.daemon = True
            self._last.start()
        if self._store is None or self._thread is None:
            return
        if error is not None:
            self._name_the_cause(error)
        self._over.set()
        if error is not None:
            self.fail(f"{type(error).__name__}: {error}")
        self._thread.join()
        if error is None:
            self._leave()
        elif self._rank == 0:
            time.sleep(2 * self._interval_s)  # let the others read it: the store ends with this process

    def all_closed(self) -> None:
        """Say that what was open is closed. Alone, nothing can wait for ever then; a broken collective still can."""
        if self._store is None and self._last is not None:
            self._last.cancel()

    def _name_the_cause(self, error: BaseException) -> None:
        """Say whose end this process's error comes from, where it is another's."""
        cause = self._told() or self._gone()
        if cause and str(error) and str(error) in cause:
            return  # all found the same
        if cause:
            log.critical("%s ends because %s", self._names[self._rank], cause)
        elif isinstance(error, RuntimeError) and any(mark in str(error) for mark in _BROKEN_COLLECTIVE):
            # Of a process elsewhere that died, all see such an error. The thread finds out which, and ends this one.
            log.critical("%s: %s; looking for the process behind it", self._names[self._rank], error)
            self._over.wait(self._lost_after_s + 2 * self._interval_s)

    def _last_resort(self, error: BaseException) -> None:
        traceback.print_exception(error)
        log.critical("%s could not close what it had open; it ends now", self._names[self._rank])
        sys.stdout.flush()
        os._exit(EXIT_CODE)

    def _runs(self, rank: int) -> bool:
        """Whether a process runs, as far as can be told: of another machine or container it cannot."""
        pid, space = self._places[rank]
        return not space or space != self._here or _runs(pid)

    def _gone(self) -> str:
        """Name a process of this machine that no longer runs."""
        for rank in range(self._ranks):
            if not self._runs(rank):
                return f"{self._names[rank]} no longer runs: killed or crashed"
        return ""

    def fail(self, message: str) -> None:
        """Tell the other processes that this one ends, and why; the first to say so is who they name."""
        if self._store is None:
            return
        try:
            with self._request():
                self._store.compare_set(_VERDICT, "", f"{self._names[self._rank]} failed: {message}")
        except (RuntimeError, OSError):
            log.debug("the first process is gone; it will be named")

    def _leave(self) -> None:
        try:
            with self._request():
                self._store.set(f"beat{self._rank}", "left")
                if self._rank:
                    return
            # The store lives in this process: wait for the others' last beat.
            deadline_s = time.monotonic() + self._lost_after_s
            while time.monotonic() < deadline_s and set(self._beats()) != {"left"}:
                time.sleep(0.05)
        except (RuntimeError, OSError) as error:
            log.debug("leaving: %s", error)

    @contextmanager
    def _request(self) -> Iterator[None]:
        """One request to the store at a time, since threads share its connection; `_watch_first` sees its length."""
        with self._lock:
            self._requests += 1
            self._waiting_for = self._requests
            try:
                yield
            finally:
                self._waiting_for = 0

    def _watch_first(self) -> None:
        """End this process once the first one has left a request without an answer for lost_after_s."""
        request, wakings = 0, 0
        while not self._left.wait(self._interval_s):
            before, request = request, self._waiting_for
            wakings = wakings + 1 if request == before else 0
            silent_s = wakings * self._interval_s
            if request and silent_s >= self._lost_after_s:
                if self._error is not None:
                    traceback.print_exception(self._error)
                log.critical(
                    "%s: %s has not answered for %.0f s: dead, stopped or cut off; this process ends too",
                    self._names[self._rank],
                    self._names[0],
                    silent_s,
                )
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(EXIT_CODE)

    def _beat(self, count: int) -> None:
        with self._request():
            self._store.set(f"beat{self._rank}", str(count))

    def _beats(self) -> list[str]:
        with self._request():
            return [v.decode() for v in self._store.multi_get([f"beat{r}" for r in range(self._ranks)])]

    def _verdict(self) -> str:
        with self._request():
            return self._store.get(_VERDICT).decode() if self._store.check([_VERDICT]) else ""

    def _told(self) -> str:
        """Return the verdict, or nothing if there is none or nobody to ask."""
        try:
            return self._verdict()
        except (RuntimeError, OSError):
            return ""

    def _watch(self) -> None:
        count = 0
        last = [""] * self._ranks
        heard = [0] * self._ranks
        while not self._over.wait(self._interval_s):
            count += 1
            try:
                self._beat(count)
                if self._rank == 0:
                    for rank, beat in enumerate(self._beats()):
                        if beat != last[rank] or beat == "left":
                            last[rank], heard[rank] = beat, count
                        elif not self._runs(rank):
                            self._accuse(rank, "no longer runs: killed or crashed")
                        elif (silent_s := (count - heard[rank]) * self._interval_s) >= self._lost_after_s:
                            self._accuse(
                                rank, f"has not been heard of for {silent_s:.0f} s: dead, stopped or cut off"
                            )
                verdict = self._verdict()
            except Exception as error:
                if self._over.is_set():
                    return
                verdict = self._gone() or f"{self._names[0]} no longer answers ({str(error).splitlines()[0]})"
            if verdict and not self._over.is_set():
                log.critical("%s: %s; this process ends too", self._names[self._rank], verdict)
                sys.stdout.flush()
                if self._rank == 0:
                    time.sleep(
                        2 * self._interval_s
                    )  # let the others read it: the store ends with this process
                os._exit(EXIT_CODE)

    def _accuse(self, rank: int, what: str) -> None:
        with self._request():
            self._store.compare_set(_VERDICT, "", f"{self._names[rank]} {what}")


def pid_space() -> str:
    """Return what processes share that can look one another up by their numbers; nothing where that cannot be done.

    A host's name does not say it: containers on the host's network share it, and so do machines called localhost.
    """
    try:
        if os.readlink("/proc/self") != str(os.getpid()):  # /proc is of another name space
            return ""
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _runs(pid: int) -> bool:
    """Whether a process of this machine runs; one that ended and is not waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
