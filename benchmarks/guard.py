"""Runs a command that does not outlive whoever started it.

    python -m benchmarks.guard COMMAND ARGUMENT...

Meant to be started as the leader of a process group of its own, with a pipe as standard input that the starter keeps
open. When the starter goes, in whatever way, the pipe ends, and the whole group is killed: nothing of it is left to
share a GPU with what is measured next. The exit status is the command's, 128 + n for one that signal n ended.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading


def _end_with_the_starter() -> None:
    while os.read(0, 4096):
        pass
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Run the command of the command line."""
    if os.getpgrp() != os.getpid():
        sys.exit("benchmarks.guard must lead a process group of its own, which it ends with its starter")
    process = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    threading.Thread(target=_end_with_the_starter, daemon=True).start()
    status = process.wait()
    # Not sys.exit: the thread that reads must not be waited for.
    os._exit(128 - status if status < 0 else status)


if __name__ == "__main__":
    main()
