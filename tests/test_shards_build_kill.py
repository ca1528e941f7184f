"""Builds that are killed at any moment, and disks that are truly full: going on gives the undisturbed bytes."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from building import digests, encoded, run, write_tree

ROOT = Path(__file__).resolve().parent.parent
# Pieces of a .beton are 512 MiB; here they are smaller, so that there are several to join.
BUILDER = """
import sys
from pathlib import Path
from shards import plan
from shards.build import BuildOptions, build
source, out, target = sys.argv[1:]
plan._BYTES_PER_PIECE = 60_000
per_shard = 5 if target == "tar" else None
build(BuildOptions(Path(source), Path(out), "set", target, samples_per_shard=per_shard, workers=2), progress=False)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    files = {f"c{i % 3}/{i}.jpg": encoded(seed=i) + rng.bytes(int(rng.integers(8000))) for i in range(150)}
    return write_tree(tmp_path_factory.mktemp("kill") / "source", files)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """webdataset imports torch, which takes seconds and which its tar writer does not use: here it finds a hull."""
    data = tmp_path_factory.mktemp("hull") / "torch" / "utils" / "data.py"
    data.parent.mkdir(parents=True)
    data.write_text("class Dataset: pass\nclass IterableDataset: pass\nclass DataLoader: pass\n")
    (data.parent / "__init__.py").touch()
    (data.parent.parent / "__init__.py").write_text("Tensor = object\n")
    return {**os.environ, "PYTHONPATH": f"{data.parent.parent.parent}{os.pathsep}{ROOT}"}


def start(source: Path, out: Path, target: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", BUILDER, str(source), str(out), target]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, start_new_session=True)


def final_files(folder: Path) -> dict[str, str]:
    """What is in a folder under a final name."""
    return {n: d for n, d in digests(folder).items() if not n.startswith(".") and Path(n).suffix != ".tmp"}


@pytest.mark.parametrize(
    ("target", "kills"),
    [
        ("tar", 2),
        pytest.param("tar", 20, marks=pytest.mark.slow),
        pytest.param("beton", 20, marks=pytest.mark.slow),
    ],
)
def test_killed_at_random_moments_the_build_goes_on_to_the_same_bytes(
    source: Path, tmp_path: Path, environment: dict[str, str], target: str, kills: int
) -> None:
    straight = start(source, tmp_path / "straight", target, environment)
    while not (tmp_path / "straight" / ".build" / "lock").exists() and straight.poll() is None:
        time.sleep(0.001)
    began_s = time.monotonic()
    assert straight.wait(120) == 0, straight.stderr and straight.stderr.read()
    span_s = time.monotonic() - began_s
    wanted = digests(tmp_path / "straight")

    rng = random.Random(7)
    out = tmp_path / "out"
    while kills:
        process = start(source, out, target, environment)
        while not (out / ".build" / "lock").exists() and process.poll() is None:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, span_s))
        if process.poll() is None:
            # The builder alone, whose workers must end by themselves, or all of them at once.
            os.kill(process.pid, signal.SIGKILL) if rng.random() < 0.5 else os.killpg(
                process.pid, signal.SIGKILL
            )
        process.communicate()  # ends when the orphaned workers have let go of the pipe
        if process.returncode == -signal.SIGKILL:
            kills -= 1
            found = final_files(out)
            assert {n: wanted[n] for n in found} == found, "whatever has a final name is whole"
        else:
            assert process.returncode == 0
            assert digests(out) == wanted
            shutil.rmtree(out)
    last = start(source, out, target, environment)
    assert last.wait(120) == 0
    assert digests(out) == wanted


def test_a_killed_worker_is_said_and_the_build_goes_on(
    source: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    for attempt in range(20):  # the build may be finished before the kill
        out = tmp_path / f"out{attempt}"
        process = start(source, out, "tar", environment)
        builder = psutil.Process(process.pid)
        workers: list[psutil.Process] = []
        while not workers and process.poll() is None:
            for child in builder.children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    workers += child.children()  # of the fork server
        for worker in workers[:1]:
            worker.send_signal(signal.SIGKILL)
        _, error = process.communicate()
        if process.returncode:
            break
    assert (
        b"ChildProcessError: a worker process was killed, most likely for want of memory; finished" in error
    )
    last = start(source, out, "tar", environment)
    assert last.wait(120) == 0
    run(source, tmp_path / "straight", samples_per_shard=5)
    assert digests(out) == digests(tmp_path / "straight")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Any]:
    """A function that makes, or resizes, a small file system of its own, and gives its folder."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def resize(size: int) -> Path:
        how = (
            ["-o", f"remount,size={size}"]
            if os.path.ismount(folder)
            else ["-t", "tmpfs", "-o", f"size={size}"]
        )
        done = subprocess.run(["mount", *how, "none", str(folder)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
        return folder

    yield resize
    if os.path.ismount(folder):
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize(
    ("target", "workers", "share"),
    [
        ("tar", 1, 0.1),
        ("tar", 1, 0.6),
        ("tar", 1, 0.99),
        ("tar", 2, 0.6),
        ("beton", 1, 0.3),
        ("beton", 1, 0.9),
    ],
)
def test_a_full_disk_is_said_and_the_build_goes_on_when_there_is_room(
    source: Path,
    tmp_path: Path,
    small_disk: Any,
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    workers: int,
    share: float,
) -> None:
    how = {"target": target, "samples_per_shard": 5 if target == "tar" else None}
    monkeypatch.setattr("shards.plan._BYTES_PER_PIECE", 200_000)
    run(source, tmp_path / "straight", **how)
    wanted = digests(tmp_path / "straight")
    taken = sum(512 * p.stat().st_blocks for p in (tmp_path / "straight").iterdir())  # a .beton has holes
    out = small_disk(int(share * taken)) / "out"
    with pytest.raises(
        OSError, match=r"no space left in .*/disk/out: .*make room and run the same command"
    ) as caught:
        run(source, out, workers=workers, **how)
    assert caught.value.errno == errno.ENOSPC
    found = final_files(out)
    assert {n: wanted[n] for n in found} == found, "whatever has a final name is whole"
    assert "manifest.json" not in found
    assert not list(out.rglob("*.tmp"))
    finished = len(
        list((out / ".build").glob("*.part"))
    )  # a shard without room for its part is written again
    small_disk(3 * taken)
    assert run(source, out, workers=workers, **how).reused_shards == finished
    assert digests(out) == wanted
