"""Starts train.py on several CPU processes in about a second: forks of a process that has imported everything.

The processes are what torchrun would start (same environment variables), without a launcher that would end them
when one of them dies: what they do about it themselves can be seen.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tqdm import tqdm  # noqa: E402

import train  # noqa: E402
from tools.runtime import checkpoint  # noqa: E402
from tools.runtime.config import parse_command  # noqa: E402
from tools.runtime.launch import set_up_log  # noqa: E402

checkpoint.code_version()  # forks take it along: of their starts one and the same, whatever happens to the files


def free_port() -> int:
    """Return a TCP port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@dataclass
class Ranks:
    """Processes of one run. `log` takes what they print; "{rank}" in an argument becomes a process's rank."""

    arguments: list[str]
    ranks: int
    log: Path
    pids: list[int] = field(default_factory=list)
    codes: dict[int, int] = field(default_factory=dict)

    def start(self) -> Ranks:
        """Fork the processes."""
        port = free_port()
        sys.stdout.flush()
        for rank in range(self.ranks):
            pid = os.fork()
            if pid == 0:
                self._be(rank, port)
            self.pids.append(pid)
        return self

    def _be(self, rank: int, port: int) -> None:
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.ranks, "LOCAL_WORLD_SIZE": self.ranks}
        os.environ.update({name: str(value) for name, value in numbers.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")
        # tqdm's own lock is shared by forks: one that is killed while it holds it would stop the others.
        tqdm.set_lock(threading.RLock())
        set_up_log()
        code = 1
        try:
            arguments = [argument.replace("{rank}", str(rank)) for argument in self.arguments]
            code = train.train(parse_command(train.TrainCommand, arguments))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def poll(self) -> bool:
        """Whether all have ended; `codes` has the exit codes by rank, negative for a signal."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return len(self.codes) == self.ranks

    def wait(self, timeout_s: float) -> dict[int, int]:
        """Wait for all and return their exit codes; what is left after the timeout is killed and an error."""
        deadline_s = time.monotonic() + timeout_s
        while not self.poll():
            if time.monotonic() > deadline_s:
                self.kill(*range(self.ranks))
                raise TimeoutError(
                    f"processes still there after {timeout_s} s:\n{self.log.read_text()[-4000:]}"
                )
            time.sleep(0.005)
        return self.codes

    def kill(self, *ranks: int) -> None:
        """kill -9 those of these ranks that live."""
        for rank in ranks:
            if rank not in self.codes:
                os.kill(self.pids[rank], signal.SIGKILL)


def run(arguments: list[str], ranks: int, log: Path, timeout_s: float = 240) -> str:
    """Run train.py to its end on so many processes and return what they printed; an error unless all exit with 0."""
    codes = Ranks(arguments, ranks, log).start().wait(timeout_s)
    output = log.read_text()
    assert set(codes.values()) == {0}, (codes, output)
    return output
