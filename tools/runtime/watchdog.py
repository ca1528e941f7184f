"""Reports a wait for data that takes too long: what is being read, and for how long; and ends the run in the end."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

log = logging.getLogger(__name__)

EXIT_CODE = 74  # EX_IOERR of sysexits.h


class _Wait(NamedTuple):
    since_s: float
    what: str
    reading: Callable[[], str]


class Watchdog:
    """Watches the training thread's waits for data from a thread of its own. Use as a context manager.

    Args:
        warn_s: report a wait this long, and again after each further such time.
        stop_s: end the process after a wait this long: the training thread cannot be reached inside a read.
        stop: called with the message just before that, to tell the other processes.
    """

    def __init__(self, *, warn_s: float, stop_s: float, stop: Callable[[str], None]) -> None:
        self._warn_s, self._stop_s = warn_s, stop_s
        self._stop = stop
        self._wait: _Wait | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="vqsa-watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    @contextmanager
    def waiting(self, what: str, reading: Callable[[], str]) -> Iterator[None]:
        """Mark a wait for data.

        Args:
            what: whose data, such as "training".
            reading: says what is being read now; called while the training thread is stuck.
        """
        self._wait = _Wait(time.monotonic(), what, reading)
        try:
            yield
        finally:
            self._wait = None

    def _watch(self) -> None:
        reported = 0.0
        of: _Wait | None = None
        while not self._over.wait(min(1.0, self._warn_s / 4)):
            wait = self._wait
            if wait is None:
                continue
            if wait is not of:
                reported, of = 0.0, wait
            waited_s = time.monotonic() - wait.since_s
            if waited_s >= reported + self._warn_s:
                reported = waited_s
                log.warning("no %s data for %.0f s: %s", wait.what, waited_s, wait.reading())
            if waited_s >= self._stop_s:
                message = f"no {wait.what} data for {waited_s:.0f} s: {wait.reading()}"
                log.critical("%s; the run ends (data_stop_s = %g)", message, self._stop_s)
                self._stop(message)
                sys.stdout.flush()
                os._exit(EXIT_CODE)
