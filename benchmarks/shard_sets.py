"""Speed of the shard builder and the store, each beside what people would use instead, in one run.

    python -m benchmarks.shard_sets --source FOLDER [--ffcv-python .venv-ffcv/bin/python] [--out result.json]

FOLDER holds JPEGs (at any depth), best of 110 to 150 kB, copied as often as needed. Rates of writers are images
per second of CPU time, which a busy machine disturbs least; those of scaling over workers and of random reads
are by the clock. Each row is the median of repeats that take turns with the others'.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import tyro
import webdataset
import xxhash
from pydantic import BaseModel, ConfigDict, Field

import shards
from benchmarks.environment import environment, write_result
from benchmarks.shard_reads import ENDS, random_reads, stalls
from benchmarks.shard_scaling import scaling
from benchmarks.turns import Rows
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
    """Folder in memory, for the rows that must not wait for a disk; needs about 16 times the images' bytes."""

    disk: Path = Path(tempfile.gettempdir())
    """Folder on a disk, for reading what is not in memory."""

    ffcv_python: Path = ROOT / ".venv-ffcv" / "bin" / "python"
    """Python that has ffcv (tests/install_ffcv.sh); without it ffcv's row is left out."""

    ffcv_images: int = Field(300, ge=10)
    """Images that ffcv's DatasetWriter writes, which takes about 4 ms each."""

    batch: int = Field(128, ge=1)
    """Samples per batch of the readers."""


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


def _writers(command: ShardsBenchmark, rows: Rows, files: list[Path], memory: Path) -> None:
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


def _ffcv(command: ShardsBenchmark, rows: Rows, files: list[Path], memory: Path) -> None:
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


def _ratios(rows: dict[str, dict[str, float]]) -> dict[str, dict[str, float | None]]:
    """What was measured, and what is wanted at least, where something is."""

    def ratio(a: str, b: str, unit: str) -> float | None:
        return rows[a][unit] / rows[b][unit] if a in rows and b in rows else None

    cpu, clock = "img_per_cpu_s", "img_per_s"
    theirs = "fn.readers.webdataset"
    scaled = {
        "copying": ("build to tar after the start, {} worker{}", 1.8),
        "encoding again": ("build with --shorter-side 256 --quality 90 after the start, {} worker{}", 1.8),
        "read + write alone": ("read + write alone, {} process{}", None),
    }
    found: dict[str, tuple[float | None, float | None]] = {
        "tar / ShardWriter": (ratio("build to tar, 1 worker", "webdataset.ShardWriter(mtime=0)", cpu), 0.75),
        ".beton / ffcv": (ratio("build to .beton, 1 worker", "ffcv.DatasetWriter, 1 worker", cpu), 15.0),
    }
    for name, (row, wanted) in scaled.items():
        more = "es" if row.endswith("process{}") else "s"
        found[f"two / one, {name}"] = ratio(row.format(2, more), row.format(1, ""), clock), wanted
    for end in ENDS:
        for how, wanted in (("not scanned", 2.0 if end == "header" else None), ("scanned", None)):
            name = f"random reads, {end}"
            found[f"{name}: store, {how} / DALI's reader"] = (
                ratio(f"{name}: store, tar, {how}", f"{name}: {theirs}", clock),
                wanted,
            )
    found["xxh3 / sha256"] = ratio("xxh3-64 alone", "sha256 alone", cpu), 1.0
    return {name: {"measured": m, "wanted": w} for name, (m, w) in found.items() if m is not None}


def _report(result: dict[str, Any]) -> str:
    out = io.StringIO()
    print(f"images of {result['image_kb']:.0f} kB", file=out)
    for name, row in result["rows"].items():
        cpu, clock = (
            f"{row[key]:9.0f} {unit}" if key in row else " " * (10 + len(unit))
            for key, unit in (("img_per_cpu_s", "img/CPU-s"), ("img_per_s", "img/s"))
        )
        print(f"{name:68s} {cpu} {clock}".rstrip(), file=out)
    for name, row in result["ratios"].items():
        wanted = f" (wanted: {row['wanted']:g} or more)" if row["wanted"] else ""
        print(f"{name:64s} {row['measured']:9.2f}{wanted}", file=out)
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
    rows = Rows(command.repeats)
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
        rows.rows |= scaling(files, memory / "source", memory, command.repeats)
        random_reads(rows, memory / "out", command.batch, 16 * command.images)
        result = {
            **environment(),
            "image_kb": float(np.mean([path.stat().st_size for path in files])) / 1000,
            "images": command.images,
            "rows": rows.rows,
            "ratios": _ratios(rows.rows),
            "stall_ms": stalls(memory / "out" / "tar1", disk, command.batch, command.images),
            "manifest_open_s": _manifest_open_s(disk, command.repeats),
        }
    print(_report(result), end="")
    if command.out:
        write_result(command.out, result)


if __name__ == "__main__":
    main()
