"""Write the shards that are missing, in parallel, with a progress bar."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Generator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from tqdm import tqdm

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


def write_missing(tasks: list[Task], workers: int, progress: bool) -> tuple[list[Part], int]:
    """Parts of all shards in their order, writing those that are not there yet; how many were there.

    Args:
        tasks: at least one.
        workers: processes; with 1 this process does the work.
        progress: show images/s, MB/s and the time left on standard error.

    Raises:
        BadImageError, OSError: of the first shard that failed; those before it are finished.
    """
    there = {number: part for number, task in enumerate(tasks) if (part := finished_part(task)) is not None}
    images = [len(task.samples) for task in tasks]
    # What an earlier run finished is no part of the rate.
    initial = sum(images[number] for number in there)
    missing = [number for number in range(len(tasks)) if number not in there]
    parts, image_bytes = dict(there), 0
    with (
        tqdm(total=sum(images), initial=initial, unit=" img", disable=not progress) as bar,
        contextlib.closing(_written(tasks, missing, workers)) as written,
    ):
        for number, part in written:
            parts[number] = part
            image_bytes += int(part.table.columns["length"].sum())
            seconds = max(bar.format_dict["elapsed"], 1e-9)
            bar.set_postfix_str(f"{image_bytes / 1e6 / seconds:.0f} MB/s", refresh=False)
            bar.update(images[number])
    return [parts[number] for number in range(len(tasks))], len(there)


def _written(tasks: list[Task], missing: list[int], workers: int) -> Generator[tuple[int, Part]]:
    """Numbers and parts of shards as they are finished."""
    if min(workers, len(missing)) <= 1:
        for number in missing:
            yield number, write_shard(tasks[number])
        return

    # A server that has imported everything forks clean workers; forking this process would copy
    # whatever threads and locks its caller has.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["shards.write_shard", *tasks[0].target.imports])
    failures: dict[int, BaseException] = {}
    lock = tasks[0].work / WORKERS_LOCK
    others = multiprocessing.active_children()
    pool: Executor = ProcessPoolExecutor(min(workers, len(missing)), context, _start_worker, (lock,))
    try:
        futures: dict[Future[Part], int] = {pool.submit(write_shard, tasks[n]): n for n in missing}
        processes = [child for child in multiprocessing.active_children() if child not in others]
        for future in as_completed(futures):
            if future.cancelled():
                continue
            error = future.exception()
            if error is None:
                yield futures[future], future.result()
                continue
            failures[futures[future]] = error
            if isinstance(error, BrokenProcessPool):
                # The pool asks the others to end and waits for them; one that was only just started can miss that.
                for process in processes:
                    process.kill()
            # Earlier shards were started earlier and go on, so the first fault is found on every run.
            for other in futures:
                other.cancel()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    if failures:
        raise failures[min(failures)]
