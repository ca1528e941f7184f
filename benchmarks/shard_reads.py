"""Random reads of encoded images: the store against DALI's own reader; cold files and other threads.

Part of benchmarks.shard_sets. Both get the same threads and queues. DALI's reader goes through the tars in order
behind a shuffle window of 1024 and looks at nothing; the store is read in an order that is random over the whole set.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from nvidia.dali import Pipeline, fn, types

import shards
from benchmarks.turns import Rows
from pipeline.corruptions import dali_operator

ENDS: dict[str, tuple[Callable[[Any], Any], int]] = {
    "header": (fn.peek_image_shape, 1),
    "bytes": (lambda jpeg: jpeg, 1),
    "decoded": (fn.decoders.image, 20),
}
"""What the graphs end in, and how many times fewer batches of it are measured."""


class _RandomBatches:
    """Reads random batches from the store a few ahead of DALI, as the loader does."""

    def __init__(self, store: shards.Store, batch: int, check: bool, depth: int = 4) -> None:
        self._store, self._batch, self._check = store, batch, check
        self._rng = np.random.default_rng(0)
        self._pool = ThreadPoolExecutor(2)
        self._ahead = [self._submit() for _ in range(depth)]
        self._alive: list[Any] = []

    def _submit(self) -> Any:
        ids = self._rng.integers(0, len(self._store), self._batch)
        return self._pool.submit(
            lambda: (self._store.fetch(ids, self._check).span, self._store.label[ids].reshape(-1, 1))
        )

    def __call__(self) -> Any:
        self._ahead.append(self._submit())
        batch = self._ahead.pop(0).result()
        self._alive = [*self._alive[-6:], batch]
        return batch

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _store_pipe(store: shards.Store, batch: int, end: str = "header", check: bool = True) -> Iterator[Any]:
    dali_operator.load()
    source = _RandomBatches(store, batch, check)
    pipe = Pipeline(batch_size=batch, num_threads=2, device_id=None, prefetch_queue_depth=2)
    with pipe:
        span, label = fn.external_source(
            source=source,
            num_outputs=2,
            batch=True,
            no_copy=False,  # of the addresses; the images are read in place
            dtype=[types.INT64, types.INT32],
            ndim=[1, 1],
        )
        pipe.set_outputs(ENDS[end][0](fn.vqsa.records(span)), label)
    pipe.build()
    try:
        yield pipe
    finally:
        source.close()


def _dali_reader_pipe(folder: Path, batch: int, end: str) -> Any:
    tars = sorted(folder.glob("*.tar"))
    pipe = Pipeline(batch_size=batch, num_threads=2, device_id=None, prefetch_queue_depth=2)
    with pipe:
        jpeg, label = fn.readers.webdataset(
            paths=[str(tar) for tar in tars],
            index_paths=[str(tar.with_suffix(".idx")) for tar in tars],
            ext=["jpg", "cls"],
            random_shuffle=True,
            initial_fill=1024,
            missing_component_behavior="error",
        )
        pipe.set_outputs(ENDS[end][0](jpeg), label)
    pipe.build()
    return pipe


def _run(pipe: Any, batches: int) -> None:
    for _ in range(batches):
        pipe.run()


def random_reads(rows: Rows, sets: Path, batch: int, images: int) -> None:
    """Measure each reader in graphs with each end.

    Args:
        rows: gets `random reads, END: READER` for each.
        sets: has the folders `tar1` and `beton1`.
        batch: samples per batch.
        images: samples of one measurement, fewer where they are decoded.
    """
    for end, (_, fewer) in ENDS.items():
        batches = max(2, images // batch // fewer)
        with contextlib.ExitStack() as stack:
            name = f"random reads, {end}"
            jobs: dict[str, Callable[[], object]] = {
                f"{name}: fn.readers.webdataset": partial(
                    _run, _dali_reader_pipe(sets / "tar1", batch, end), batches
                )
            }
            for kind, check in (("tar", True), ("tar", False), ("beton", True), ("beton", False)):
                if kind == "beton" and end != "header":
                    continue
                store = stack.enter_context(shards.open(sets / f"{kind}1"))
                pipe = stack.enter_context(_store_pipe(store, batch, end, check))
                jobs[f"{name}: store, {kind}, {'scanned' if check else 'not scanned'}"] = partial(
                    _run, pipe, batches
                )
            rows.measure(batches * batch, jobs)


def _stall_ms(work: Callable[[], object]) -> dict[str, float]:
    """How late another Python thread, which wants to run every millisecond, gets its turn meanwhile."""
    late_ms: list[float] = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.is_set():
            began_s = time.perf_counter()
            time.sleep(0.001)
            late_ms.append((time.perf_counter() - began_s) * 1000 - 1)

    thread = threading.Thread(target=tick)
    thread.start()
    work()
    stop.set()
    thread.join()
    return {f"p{q}": float(np.percentile(late_ms, q)) for q in (50, 99, 100)}


def _evict(folder: Path) -> None:
    os.sync()
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def stalls(tars: Path, disk: Path, batch: int, images: int) -> dict[str, dict[str, float]]:
    """Stalls of another thread while DALI is fed from files that are not in memory, and while nothing is done."""
    folder = disk / "cold"
    shutil.copytree(tars, folder)
    batches = max(8, images // batch)

    def through_the_store() -> None:
        with shards.open(folder) as store, _store_pipe(store, batch) as pipe:
            for _ in range(batches):
                pipe.run()

    def through_mappings_alone() -> None:
        with shards.open(folder) as store:
            rng, alive = np.random.default_rng(0), []

            def source() -> Any:
                ids = rng.integers(0, len(store), batch)
                alive.append([store.read(int(i)) for i in ids])
                return alive[-1]

            pipe = Pipeline(batch_size=batch, num_threads=2, device_id=None, prefetch_queue_depth=2)
            with pipe:
                pipe.set_outputs(
                    fn.external_source(source=source, batch=True, no_copy=True, dtype=types.UINT8, ndim=1)
                )
            pipe.build()
            for _ in range(batches):
                pipe.run()

    found = {"nothing else": _stall_ms(lambda: time.sleep(1))}
    for name, work in (("store", through_the_store), ("mappings alone", through_mappings_alone)):
        _evict(folder)
        began_s = time.perf_counter()
        found[name] = _stall_ms(work)
        found[name]["img_per_s"] = batches * batch / (time.perf_counter() - began_s)
    return found
