"""How building scales from one worker to two, beside how reading and writing alone scales on the same cores.

Part of benchmarks.shard_sets. Rates are those after the start (imports take seconds, once): from the moment by which
every worker has finished a shard to the end. One worker is kept to one core, two to two.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shards.build import BuildOptions, build

_TIMES = 5
_SHARDS = 64
_COPIED = "build to tar after the start"
_ENCODED = "build with --shorter-side 256 --quality 90 after the start"
_FLOOR = "read + write alone"


@contextmanager
def _cores(count: int) -> Iterator[None]:
    """Keep this process, and those that it starts meanwhile, to so many cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _build_img_s(source: Path, out: Path, workers: int, images: int, **options: Any) -> float:
    shutil.rmtree(out, ignore_errors=True)
    per_shard = -(-images // _SHARDS)
    with _cores(workers):
        build(
            BuildOptions(source, out, "bench", workers=workers, samples_per_shard=per_shard, **options),
            progress=False,
        )
    finished_ns = sorted(path.stat().st_mtime_ns for path in out.glob("*.tar"))
    return per_shard * (len(finished_ns) - workers) / (finished_ns[-1] - finished_ns[workers - 1]) * 1e9


def _copy(source: Path, to: Path, number: int, processes: int) -> tuple[float, float]:
    """Read this process's share of the source and write it behind the others; when it began and ended."""
    files = sorted(source.glob("*/*"))[number::processes]
    began_s = time.perf_counter()
    with open(to / str(number), "wb", buffering=0) as out:
        for path in files:
            with open(path, "rb", buffering=0) as file:
                out.write(file.read())
    return began_s, time.perf_counter()


def _floor_img_s(pool: ProcessPoolExecutor, source: Path, out: Path, processes: int, images: int) -> float:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    running = [pool.submit(_copy, source, out, number, processes) for number in range(processes)]
    began_s, ended_s = zip(*(copied.result() for copied in running), strict=True)
    return images / (max(ended_s) - min(began_s))


def scaling(files: list[Path], source: Path, memory: Path, repeats: int) -> dict[str, dict[str, float]]:
    """Images per second of 1 and 2 workers: rows by name.

    Args:
        files: the images of `source`.
        source: class folders.
        memory: where the sets are written.
        repeats: measurements of each row, which take turns.
    """
    many, few = memory / "many", memory / "few"
    for k in range(_TIMES):  # the same files under several names
        for i, path in enumerate(files):
            for folder in (many, few) if k == 0 and i < len(files) // 4 else (many,):
                link = folder / path.parent.name / f"{k}{path.name}"
                link.parent.mkdir(parents=True, exist_ok=True)
                os.link(path, link)
    images, out = _TIMES * len(files), memory / "scaling"
    found: dict[str, list[float]] = {}
    with _cores(2), ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        for done in [pool.submit(time.sleep, 0.5) for _ in range(2)]:  # both processes are there
            done.result()
        for turn in range(repeats + 1):
            for n in (1, 2):
                rates = {
                    f"{_FLOOR}, {n} process{'es' * (n > 1)}": _floor_img_s(pool, many, out, n, images),
                    f"{_COPIED}, {n} worker{'s' * (n > 1)}": _build_img_s(many, out, n, images),
                    f"{_ENCODED}, {n} worker{'s' * (n > 1)}": _build_img_s(
                        few, out, n, len(files) // 4, shorter_side=256, quality=90
                    ),
                }
                for name, rate in rates.items():
                    found.setdefault(name, [])
                    if turn:  # the first turn warms up
                        found[name].append(rate)
    for folder in (out, many, few):
        shutil.rmtree(folder)
    return {name: {"img_per_s": statistics.median(found[name])} for name in sorted(found)}
