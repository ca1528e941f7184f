"""Reports a wait for data that takes too long: what is being read, and for how long; and ends the run in the end."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)

EXIT_CODE = 74  # EX_IOERR of sysexits.h


class Watchdog:
    """Watches the waits of the training thread from a thread of its own. Use as a context manager.

    Args:
        describe: says what is being read now; called while the training thread is stuck.
        warn_s: report a wait this long, and again after each further such time.
        stop_s: end the process after a wait this long: the training thread cannot be reached inside a read.
        stop: called with the message just before that, to tell the other processes.
    """

    def __init__(
        self, describe: Callable[[], str], *, warn_s: float, stop_s: float, stop: Callable[[str], None]
    ) -> None:
        self._describe = describe
        self._warn_s, self._stop_s = warn_s, stop_s
        self._stop = stop
        self._since_s: float | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="vqsa-watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Mark a wait for data."""
        self._since_s = time.monotonic()
        try:
            yield
        finally:
            self._since_s = None

    def _watch(self) -> None:
        reported = 0.0
        while not self._over.wait(min(1.0, self._warn_s / 4)):
            since_s = self._since_s
            if since_s is None:
                reported = 0.0
                continue
            waited_s = time.monotonic() - since_s
            if waited_s >= reported + self._warn_s:
                reported = waited_s
                log.warning("no training data for %.0f s: %s", waited_s, self._describe())
            if waited_s >= self._stop_s:
                message = f"no training data for {waited_s:.0f} s: {self._describe()}"
                log.critical("%s; the run ends (data_stop_s = %g)", message, self._stop_s)
                self._stop(message)
                sys.stdout.flush()
                os._exit(EXIT_CODE)
