"""One run at a time in a folder: a second one would mix its checkpoints and its log with the first one's."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

log = logging.getLogger(__name__)

FILE = "run.lock"
_HELD = (errno.EWOULDBLOCK, errno.EACCES)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold a run's folder. The kernel lets it go with this process, however that ends, so a kill leaves no lock.

    Programs that this process starts do not inherit it. Where the file system has no locks, the log says so, and the
    folder is not held. A file of another user that may only be read holds as well, and is not signed.

    Raises:
        ValueError: another process holds it, or the file may not be opened or held.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / FILE
    descriptor, may_sign = _opened(path)
    with os.fdopen(descriptor) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                holder = file.read().strip() or "a run that has just started"
                raise ValueError(
                    f"{out} is in use by {holder}: two runs would mix their checkpoints; wait for it or stop it, or "
                    f"give another --out. Should its machine be gone and a file server keep the lock, delete {path}"
                ) from None
            if error.errno == errno.EBADF and not may_sign:  # NFS locks only what may be written
                raise _not_ours(path, error) from None
            log.warning("%s cannot be locked (%s): see to it that no other run uses it", out, error.strerror)
        else:
            if may_sign:
                _sign(file.fileno())
            else:
                log.warning("%s is another user's: it holds, but does not name this run", path)
        yield


def _opened(path: Path) -> tuple[int, bool]:
    """Open or make the file; returns its descriptor and whether it may be written."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), True
    except PermissionError as error:
        if not path.exists():  # it is the folder that may not be written
            raise
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC), False
        except PermissionError:
            raise _not_ours(path, error) from None


def _not_ours(path: Path, error: OSError) -> ValueError:
    return ValueError(
        f"{path} cannot be locked ({error.strerror}): it is another user's; have its owner do chmod a+rw on it, or "
        "delete it if no run uses the folder"
    )


def _sign(file: int) -> None:
    """Write whose lock it is; without room for that it holds all the same."""
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    try:
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()} since {now}\n".encode(), 0)
    except OSError as error:
        log.warning("whose run.lock is was not written: %s", error)
