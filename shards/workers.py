"""Write the shards that are missing, in parallel, with a progress bar."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from shards.claim import WORKERS_LOCK, hold_as_worker
from shards.parts import Part, finished_part
from shards.plan import Task
from shards.write_shard import write_shard


def _start_worker(lock: Path) -> None:
    # Ctrl-C is the builder's: it lets running shards finish and starts no more.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A worker whose builder was killed must not write beside the next one: it ends with its builder, and
    # until it has ended the lock keeps the next builder waiting.
    hold_as_worker(lock)
    parent = multiprocessing.parent_process()
    if parent is None or not parent.is_alive():
        os._exit(1)

    def end_with_builder() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_builder, daemon=True).start()


def write_missing(tasks: list[Task], workers: int, bar: Any) -> tuple[list[Part], int]:
    """Parts of all shards in their order, writing those that are not there yet; how many were there.

    Args:
        tasks: at least one.
        workers: processes; with 1 this process does the work.
        bar: a tqdm bar that counts images.

    Raises:
        BadImageError, OSError: of the first shard that failed; those before it are finished.
    """
    parts: dict[int, Part] = {}
    missing: list[int] = []
    for number, task in enumerate(tasks):
        part = finished_part(task)
        if part is None:
            missing.append(number)
        else:
            parts[number] = part
            bar.update(len(task.samples))
    reused = len(parts)
    bar.unpause()
    written_bytes = 0

    def done(number: int, part: Part) -> None:
        nonlocal written_bytes
        parts[number] = part
        written_bytes += part.shard.size
        seconds = bar.format_dict["elapsed"]
        bar.set_postfix_str(f"{written_bytes / 1e6 / max(seconds, 1e-9):.0f} MB/s", refresh=False)
        bar.update(len(tasks[number].samples))

    if min(workers, len(missing)) <= 1:
        for number in missing:
            done(number, write_shard(tasks[number]))
        return [parts[number] for number in range(len(tasks))], reused

    # A server that has imported everything forks clean workers; forking this process would copy
    # whatever threads and locks its caller has.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["shards.write_shard", *tasks[0].target.imports])
    failures: dict[int, BaseException] = {}
    lock = tasks[0].work / WORKERS_LOCK
    pool: Executor = ProcessPoolExecutor(min(workers, len(missing)), context, _start_worker, (lock,))
    try:
        futures: dict[Future[Part], int] = {pool.submit(write_shard, tasks[n]): n for n in missing}
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
