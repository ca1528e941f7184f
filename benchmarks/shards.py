"""Speed of the shard builder and the store, each beside what people would use instead, in one run.

    python -m benchmarks.shards --source FOLDER [--ffcv-python .venv-ffcv/bin/python] [--out result.json]

FOLDER holds JPEGs (at any depth), best of 110 to 150 kB, copied as often as needed. Rates of writers are images
per second of CPU time, which a busy machine disturbs least; those of scaling over workers and of random reads
are by the clock. Each row is the median of repeats that take turns with the others'.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import resource
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tyro
import webdataset
import xxhash
from nvidia.dali import Pipeline, fn, types
from pydantic import BaseModel, ConfigDict, Field

import shards
from benchmarks.environment import environment
from shards.build import BuildOptions, build
from shards.manifest import (
    Header,
    ShardFile,
    describe_table,
    encode_table,
    join_tables,
    make_table,
    read_header,
    read_table,
    write_manifest,
)
from shards.scan import scan
from shards.verify import verify

ROOT = Path(__file__).resolve().parent.parent
PEER = ROOT / "tests" / "ffcv_peer.py"
_IMAGENET = 1_281_167
_MORE = 5


class ShardsBenchmark(BaseModel):
    """Measure the shard builder and the store."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    source: Path
    """Folder with JPEGs, best of 110 to 150 kB."""

    out: Path | None = None
    """JSON file for the result."""

    images: int = Field(4000, ge=100)
    """Images in the sets that are built."""

    repeats: int = Field(5, ge=1)
    """Measurements of each row."""

    memory: Path = Path("/dev/shm")
    """Folder in memory, for the rows that must not wait for a disk; needs about 14 times the images' bytes."""

    disk: Path = Path(tempfile.gettempdir())
    """Folder on a disk, for reading what is not in memory."""

    ffcv_python: Path = ROOT / ".venv-ffcv" / "bin" / "python"
    """Python that has ffcv (tests/install_ffcv.sh); without it ffcv's row is left out."""

    ffcv_images: int = Field(300, ge=10)
    """Images that ffcv's DatasetWriter writes, which takes about 4 ms each."""

    batch: int = Field(128, ge=1)
    """Samples per batch of the readers."""


def _cpu_s() -> float:
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)


class _Rows:
    """Measurements by row; the rows of one call take turns, so that a busy moment disturbs all of them."""

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats
        self.rows: dict[str, dict[str, float]] = {}

    def measure(self, images: int, jobs: dict[str, Callable[[], object]], *, cpu_too: bool = True) -> None:
        cpu: dict[str, list[float]] = {name: [] for name in jobs}
        wall: dict[str, list[float]] = {name: [] for name in jobs}
        for turn in range(self.repeats + 1):
            for name, job in jobs.items():
                began_s, cpu_s = time.perf_counter(), _cpu_s()
                job()
                if turn:  # the first turn warms up
                    cpu[name].append(_cpu_s() - cpu_s)
                    wall[name].append(time.perf_counter() - began_s)
        for name in jobs:
            self.rows[name] = {"img_per_s": images / statistics.median(wall[name])}
            if cpu_too:
                self.rows[name]["img_per_cpu_s"] = images / max(statistics.median(cpu[name]), 1e-9)


def _copies(source: Path, to: Path, count: int) -> list[Path]:
    """`count` files of their own in ten class folders, so that reading them is not reading one cache line."""
    originals = sorted(p for p in source.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
    if not originals:
        raise ValueError(f"{source}: no .jpg or .jpeg files in it or below")
    files = []
    for i in range(count):
        path = to / f"class{i % 10}" / f"{i:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(originals[i % len(originals)], path)
        files.append(path)
    return sorted(files)


def _read(path: Path) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.read()


def _floor(files: list[Path], to: Path) -> None:
    """Read each file and write it behind the others: what no writer of images can be faster than."""
    with open(to / "floor", "wb", buffering=0) as out:
        for path in files:
            out.write(_read(path))


def _shard_writer(files: list[Path], to: Path) -> None:
    pattern = str(to / "plain-%06d.tar")
    with webdataset.ShardWriter(pattern, maxcount=1000, verbose=0, mtime=0) as writer:
        for i, path in enumerate(files):
            writer.write({"__key__": f"{i:06d}", "cls": str(i % 10), "jpg": _read(path)})


def _ours(source: Path, to: Path, target: str, workers: int) -> None:
    shutil.rmtree(to / f"{target}{workers}", ignore_errors=True)
    build(
        BuildOptions(source, to / f"{target}{workers}", "bench", target=target, workers=workers),  # type: ignore[arg-type]
        progress=False,
    )


def _writers(command: ShardsBenchmark, rows: _Rows, files: list[Path], memory: Path) -> None:
    source, out = memory / "source", memory / "out"
    out.mkdir()
    rows.measure(
        len(files),
        {
            "floor: read + write": lambda: _floor(files, out),
            "webdataset.ShardWriter(mtime=0)": lambda: _shard_writer(files, out),
            "build to tar, 1 worker": lambda: _ours(source, out, "tar", 1),
            "build to .beton, 1 worker": lambda: _ours(source, out, "beton", 1),
        },
    )
    for target in ("tar1", "beton1"):
        faults = verify(out / target).faults
        if faults:
            raise ValueError(f"what was measured is not sound: {faults[0]}")
    data = [_read(path) for path in files[:500]]
    rows.measure(
        len(data),
        {
            "structural scan alone": lambda: [scan(d) for d in data],
            "xxh3-64 alone": lambda: [xxhash.xxh3_64_intdigest(d) for d in data],
            "sha256 alone": lambda: [hashlib.sha256(d).digest() for d in data],
        },
    )


def _scaling(rows: _Rows, files: list[Path], memory: Path) -> None:
    """Images per second of 1 and 2 workers without their start (imports take seconds): a larger set's time less
    a smaller one's. The larger set is the same files under several names."""
    folders = {1: memory / "source", _MORE: memory / "many"}
    for path in files:
        for k in range(_MORE):
            link = folders[_MORE] / path.parent.name / f"{k}{path.name}"
            link.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, link)
    out = memory / "scaling"
    jobs: dict[str, Callable[[], object]] = {
        f"{workers} {times}": partial(_ours, folders[times], out, "tar", workers)
        for workers in (1, 2)
        for times in folders
    }
    timed = _Rows(rows.repeats)
    timed.measure(1, jobs, cpu_too=False)
    for workers in (1, 2):
        whole_s, part_s = (1 / timed.rows[f"{workers} {times}"]["img_per_s"] for times in (_MORE, 1))
        rows.rows[f"build to tar after the start, {workers} worker{'s' * (workers > 1)}"] = {
            "img_per_s": len(files) * (_MORE - 1) / max(whole_s - part_s, 1e-9)
        }
    shutil.rmtree(out)
    shutil.rmtree(folders[_MORE])


def _ffcv(command: ShardsBenchmark, rows: _Rows, files: list[Path], memory: Path) -> None:
    folder = memory / "for_ffcv"
    folder.mkdir()
    for i, path in enumerate(files[: command.ffcv_images]):
        os.link(path, folder / f"{i % 10}_{i:06d}.jpg")
    rates = []
    job = ["write", str(folder), str(memory / "ffcv.beton"), "jpg", 1, 1 << 23]
    for _ in range(max(1, command.repeats // 2)):
        ran = subprocess.run(
            [command.ffcv_python, PEER, json.dumps([job])],
            capture_output=True,
            text=True,
            check=True,
            timeout=600,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
        )
        rates.append(command.ffcv_images / float(ran.stdout.rsplit(":", 1)[1]))
    rows.rows["ffcv.DatasetWriter, 1 worker"] = {"img_per_cpu_s": statistics.median(rates)}


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
            lambda: (self._store.fetch(ids, self._check).data, self._store.label[ids].reshape(-1, 1))
        )

    def __call__(self) -> Any:
        self._ahead.append(self._submit())
        batch = self._ahead.pop(0).result()
        self._alive = [*self._alive[-6:], batch]  # DALI reads the arrays in place
        return batch

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _store_pipe(store: shards.Store, batch: int, check: bool = True) -> Iterator[Any]:
    source = _RandomBatches(store, batch, check)
    pipe = Pipeline(batch_size=batch, num_threads=2, device_id=None, prefetch_queue_depth=2)
    with pipe:
        jpeg, label = fn.external_source(
            source=source,
            num_outputs=2,
            batch=True,
            no_copy=True,
            dtype=[types.UINT8, types.INT32],
            ndim=[1, 1],
        )
        pipe.set_outputs(fn.peek_image_shape(jpeg), label)
    pipe.build()
    try:
        yield pipe
    finally:
        source.close()


def _dali_reader_pipe(folder: Path, batch: int) -> Any:
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
        pipe.set_outputs(fn.peek_image_shape(jpeg), label)
    pipe.build()
    return pipe


def _run(pipe: Any, batches: int) -> None:
    for _ in range(batches):
        pipe.run()


def _readers(command: ShardsBenchmark, rows: _Rows, memory: Path) -> None:
    batches = max(8, command.images // command.batch)
    theirs = _dali_reader_pipe(memory / "out" / "tar1", command.batch)
    with contextlib.ExitStack() as stack:
        jobs: dict[str, Callable[[], object]] = {
            "random reads: fn.readers.webdataset": partial(_run, theirs, batches)
        }
        for kind, check in (("tar", True), ("beton", True), ("tar", False)):
            store = stack.enter_context(shards.open(memory / "out" / f"{kind}1"))
            pipe = stack.enter_context(_store_pipe(store, command.batch, check))
            what = "checked" if check else "unchecked, as DALI's"
            jobs[f"random reads: store, {kind}, {what}"] = partial(_run, pipe, batches)
        rows.measure(batches * command.batch, jobs)


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


def _stalls(command: ShardsBenchmark, memory: Path, disk: Path) -> dict[str, dict[str, float]]:
    """Stalls of another thread while DALI is fed from files that are not in memory, and while nothing is done."""
    folder = disk / "cold"
    shutil.copytree(memory / "out" / "tar1", folder)
    batches = max(8, command.images // command.batch)

    def through_the_store() -> None:
        with shards.open(folder) as store, _store_pipe(store, command.batch) as pipe:
            for _ in range(batches):
                pipe.run()

    def through_mappings_alone() -> None:
        with shards.open(folder) as store:
            rng, alive = np.random.default_rng(0), []

            def source() -> Any:
                ids = rng.integers(0, len(store), command.batch)
                alive.append([store.read(int(i)) for i in ids])
                return alive[-1]

            pipe = Pipeline(batch_size=command.batch, num_threads=2, device_id=None, prefetch_queue_depth=2)
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
        found[name]["img_per_s"] = batches * command.batch / (time.perf_counter() - began_s)
    return found


def _manifest_open_s(disk: Path, repeats: int) -> float:
    """Seconds to open a manifest as long as ImageNet's."""
    per_shard = 1000
    tables, rows_left = [], _IMAGENET
    while rows_left:
        rows = min(per_shard, rows_left)
        at = np.arange(rows, dtype=np.uint64)
        columns = {
            "offset": at * 120_000,
            "length": np.full(rows, 110_000),
            "checksum": at * 2**40,
            "label": at % 1000,
            "width": at % 500 + 1,
            "height": at % 500 + 1,
            "shard": np.zeros(rows),
        }
        tables.append(make_table(columns, [f"n{k % 1000:08d}_{rows_left - k}" for k in range(rows)]))
        rows_left -= rows
    encoded = encode_table(join_tables(tables))
    header = Header(
        name="large",
        samples=_IMAGENET,
        classes=[f"n{k:08d}" for k in range(1000)],
        options={},
        source="0" * 32,
        counts={},
        table=describe_table(encoded),
        shards=[
            ShardFile(name=f"large-{k:06d}.tar", size=len(t) * 120_000, samples=len(t), xxh3_128="0" * 32)
            for k, t in enumerate(tables)
        ],
    )
    folder = disk / "large"
    folder.mkdir()
    write_manifest(folder, header, encoded)
    for shard in header.shards:
        with (folder / shard.name).open("wb") as file:
            file.truncate(shard.size)
    times = []
    for _ in range(repeats):
        began_s = time.perf_counter()
        with shards.open(folder) as store:
            times.append(time.perf_counter() - began_s)
            assert len(store) == len(read_table(folder, read_header(folder)))
    return statistics.median(times)


def _ratios(rows: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """The project's targets: what was measured, and what is wanted."""

    def ratio(a: str, b: str, unit: str) -> float | None:
        return rows[a][unit] / rows[b][unit] if a in rows and b in rows else None

    cpu, clock = "img_per_cpu_s", "img_per_s"
    found = {
        "tar / ShardWriter": (ratio("build to tar, 1 worker", "webdataset.ShardWriter(mtime=0)", cpu), 0.75),
        ".beton / ffcv": (ratio("build to .beton, 1 worker", "ffcv.DatasetWriter, 1 worker", cpu), 15.0),
        "2 workers / 1": (
            ratio("build to tar after the start, 2 workers", "build to tar after the start, 1 worker", clock),
            1.8,
        ),
        "store / DALI's reader": (
            ratio("random reads: store, tar, checked", "random reads: fn.readers.webdataset", clock),
            2.0,
        ),
        "xxh3 / sha256": (ratio("xxh3-64 alone", "sha256 alone", cpu), 1.0),
    }
    return {name: {"measured": m, "wanted": w} for name, (m, w) in found.items() if m is not None}


def _report(result: dict[str, Any]) -> str:
    out = io.StringIO()
    print(f"images of {result['image_kb']:.0f} kB", file=out)
    for name, row in result["rows"].items():
        cpu, clock = (
            f"{row[key]:9.0f} {unit}" if key in row else " " * (10 + len(unit))
            for key, unit in (("img_per_cpu_s", "img/CPU-s"), ("img_per_s", "img/s"))
        )
        print(f"{name:44s} {cpu} {clock}".rstrip(), file=out)
    for name, row in result["ratios"].items():
        print(f"{name:44s} {row['measured']:9.2f} (wanted: {row['wanted']:g} or more)", file=out)
    for name, row in result["stall_ms"].items():
        rate = f", {row['img_per_s']:.0f} img/s" if "img_per_s" in row else ""
        print(
            f"another thread is late, cold files, {name:14s} p50 {row['p50']:.2f} ms, p99 {row['p99']:.2f} ms, "
            f"worst {row['p100']:.1f} ms{rate}",
            file=out,
        )
    print(f"manifest of {_IMAGENET} samples opens in {result['manifest_open_s']:.3f} s", file=out)
    return out.getvalue()


def main() -> None:
    """Run the benchmark and print its table."""
    command = tyro.cli(ShardsBenchmark, description=ShardsBenchmark.__doc__)
    rows = _Rows(command.repeats)
    with (
        tempfile.TemporaryDirectory(dir=command.memory) as memory_name,
        tempfile.TemporaryDirectory(dir=command.disk) as disk_name,
    ):
        memory, disk = Path(memory_name), Path(disk_name)
        files = _copies(command.source, memory / "source", command.images)
        _writers(command, rows, files, memory)
        if command.ffcv_python.exists():
            _ffcv(command, rows, files, memory)
        else:
            print(f"{command.ffcv_python}: not there, so ffcv's row is left out; see tests/install_ffcv.sh")
        _scaling(rows, files, memory)
        _readers(command, rows, memory)
        result = {
            **environment(),
            "image_kb": float(np.mean([path.stat().st_size for path in files])) / 1000,
            "images": command.images,
            "rows": rows.rows,
            "ratios": _ratios(rows.rows),
            "stall_ms": _stalls(command, memory, disk),
            "manifest_open_s": _manifest_open_s(disk, command.repeats),
        }
    print(_report(result), end="")
    if command.out:
        command.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
