"""The store: reads what was written, from many threads and processes, and says clearly what is wrong."""

from __future__ import annotations

import ctypes
import gc
import io
import multiprocessing
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from copy import copy as shallow_copy
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import xxhash
from PIL import Image

import shards
from shards import FAULTS
from shards.build import BuildOptions, build

CLASSES, PER_CLASS = 3, 13


def write_images(root: Path) -> dict[str, bytes]:
    """JPEGs of different sizes in class folders; returns key -> bytes."""
    rng = np.random.default_rng(1)
    written = {}
    for label in range(CLASSES):
        folder = root / f"c{label}"
        folder.mkdir(parents=True)
        for i in range(PER_CLASS):
            out = io.BytesIO()
            pixels = rng.integers(0, 256, (16 + i, 20 + 3 * label, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(out, "JPEG")
            (folder / f"{i:02d}.jpg").write_bytes(out.getvalue())
            written[f"c{label}_{i:02d}"] = out.getvalue()
    return written


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    root = tmp_path_factory.mktemp("images")
    return root, write_images(root)


@pytest.fixture
def folder(images: tuple[Path, dict[str, bytes]], tmp_path: Path) -> Path:
    out = tmp_path / "set"
    build(BuildOptions(images[0], out, "small", samples_per_shard=4, workers=1), progress=False)
    return out


@pytest.fixture
def store(folder: Path) -> shards.Store:
    return shards.open(folder)


def test_reads_what_was_written(store: shards.Store, images: tuple[Path, dict[str, bytes]]) -> None:
    sources = images[1]
    assert len(store) == len(sources) == CLASSES * PER_CLASS
    assert store.classes == ["c0", "c1", "c2"]
    assert store.name == "small"
    assert [store.key(i) for i in range(len(store))] == sorted(sources)
    for i in range(len(store)):
        data = store.read(i)
        assert data.tobytes() == sources[store.key(i)]
        assert store.length[i] == len(data)
        assert store.checksum[i] == xxhash.xxh3_64_intdigest(data.tobytes())
        with Image.open(io.BytesIO(data.tobytes())) as image:
            assert (store.width[i], store.height[i]) == image.size
        assert store.classes[store.label[i]] == store.key(i)[:2]
    assert store.label.dtype == store.width.dtype == store.height.dtype == np.int32
    assert store.location(5) == "small-000001.tar, sample c0_05"


def test_read_is_a_read_only_view_that_outlives_the_store(folder: Path) -> None:
    store = shards.open(folder)
    view = store.read(9)
    again = store.read(9)
    assert np.shares_memory(view, again)
    before = view.tobytes()
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 0
    store.close()
    del store, again
    gc.collect()
    assert view.tobytes() == before


@pytest.mark.parametrize("copy", [False, True])
def test_fetch_agrees_with_read_in_any_order(store: shards.Store, copy: bool) -> None:
    ids = np.random.default_rng(0).integers(0, len(store), 100)
    records = store.fetch(ids, copy=copy)
    assert records.fault.dtype == np.uint8
    assert records.fault.tolist() == [0] * 100
    assert records.errno.tolist() == [0] * 100
    for i, data in zip(ids, records.data, strict=True):
        assert data.dtype == np.uint8
        assert data.tobytes() == store.read(int(i)).tobytes()
    with pytest.raises(ValueError, match="read-only"):
        records.data[0][0] = 0
    assert store.fetch([], copy=copy).data == []
    assert store.fetch(range(3), copy=copy).data[2].tobytes() == store.read(2).tobytes()


@pytest.mark.parametrize("copy", [False, True])
def test_memory_lives_as_long_as_its_addresses(folder: Path, copy: bool) -> None:
    store = shards.open(folder)
    wanted = store.read(5).tobytes()
    span, view = store.fetch([5], copy=copy).span, store.fetch([5], copy=copy).data[0]
    store.close()
    del store
    gc.collect()
    np.full(10_000_000, 7, np.uint8)  # takes the place of memory that was let go
    assert view.tobytes() == wanted
    assert ctypes.string_at(*span[0].tolist()) == wanted


def test_records_of_other_bytes(store: shards.Store) -> None:
    records = store.fetch([3, 4])
    other = np.frombuffer(b"other", np.uint8)
    replaced = records.replaced({1: other})
    assert [d.tobytes() for d in replaced.data] == [store.read(3).tobytes(), b"other"]
    assert records.data[1].tobytes() == store.read(4).tobytes()
    assert np.shares_memory(replaced.data[1], other)
    assert [d.tobytes() for d in shards.Records.of([other, other[:0]]).data] == [b"other", b""]
    assert shards.Records.of([other]).fault.tolist() == [0]
    for wrong in (other[::2], other.reshape(1, 5), other.astype(np.int8)):
        with pytest.raises(ValueError, match=r"a record is 1-D uint8 and contiguous, got .* for record 1"):
            records.replaced({1: wrong})


def test_fetch_copies_only_what_is_not_in_memory(folder: Path) -> None:
    store = shards.open(folder)
    warm = store.files[1]
    for path in store.files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            if path != warm:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                file.read()
    records = store.fetch(range(len(store)))
    assert not records.fault.any()
    shared = [np.shares_memory(data, store.read(i)) for i, data in enumerate(records.data)]
    assert [i for i, is_shared in enumerate(shared) if is_shared] == [4, 5, 6, 7]
    assert [d.tobytes() for d in records.data] == [store.read(i).tobytes() for i in range(len(store))]
    assert not any(
        np.shares_memory(d, store.read(i)) for i, d in enumerate(store.fetch(range(9), copy=True).data)
    )


def test_files_of_others_are_read_not_guessed_about(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The kernel calls every page of such a file resident.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(os, "geteuid", lambda: 2**31)
    store = shards.open(folder)
    records = store.fetch([3, 30])
    assert not records.fault.any()
    for i, data in zip((3, 30), records.data, strict=True):
        assert not np.shares_memory(data, store.read(i))
        assert data.tobytes() == store.read(i).tobytes()


def test_views_outlive_a_close_while_others_fetch(store: shards.Store) -> None:
    wanted = [store.read(i).tobytes() for i in range(len(store))]
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            assert [d.tobytes() for d in store.fetch(range(len(store))).data] == wanted

    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(work) for _ in range(2)]
        for _ in range(300):
            store.close()
        stop.set()
        for done in running:
            done.result()


def test_fetch_marks_damaged_records_and_only_those(folder: Path) -> None:
    store = shards.open(folder)
    sound = store.fetch(range(len(store)))
    with (folder / "small-000002.tar").open("r+b") as file:
        file.seek(int(store.offset[9]))
        file.write(b"not a picture any more")
    store = shards.open(folder)
    found = store.fetch(range(len(store)))
    assert np.flatnonzero(found.fault).tolist() == [9]
    assert FAULTS[found.fault[9]] == "neither JPEG nor PNG"
    assert all(
        np.array_equal(a, b) for i, (a, b) in enumerate(zip(sound.data, found.data, strict=True)) if i != 9
    )
    assert np.flatnonzero(store.fetch(range(len(store)), copy=True).fault).tolist() == [9]
    for copy in (False, True):
        assert store.fetch(range(len(store)), check=False, copy=copy).fault.tolist() == [0] * len(store)


def test_fetch_compares_the_size_with_the_manifest(folder: Path) -> None:
    store = shards.open(folder)
    # The bytes of a narrower class's image, shorter than the record they replace.
    narrow = store.read(0).tobytes()
    wide = max(range(26, 39), key=lambda i: int(store.length[i]))
    assert len(narrow) <= store.length[wide]
    with (folder / store.location(wide).split(",")[0]).open("r+b") as file:
        file.seek(int(store.offset[wide]))
        file.write(narrow)
    for copy in (False, True):
        found = store.fetch([wide], copy=copy).fault[0]
        assert FAULTS[found] == "width or height differ from the manifest's"


def test_a_file_cut_off_while_in_use_is_a_fault_not_a_crash(folder: Path) -> None:
    store = shards.open(folder)
    for copy in (False, True):
        assert store.fetch([0, 1], copy=copy).fault.tolist() == [0, 0]
    os.truncate(folder / "small-000000.tar", int(store.offset[1]) + 5)
    for copy in (False, True):
        records = store.fetch([0, 1], copy=copy)
        assert records.fault[0] == 0
        # Through the mapping, the rest of a page that was cut reads as zeros.
        assert records.fault[1] != 0
    assert FAULTS[records.fault[1]] == "the file ends before the record does"


def test_a_failing_read_is_a_fault_with_its_errno(store: shards.Store) -> None:
    store.fetch([0], copy=True)
    # A descriptor that cannot be read stands in for a disk that fails.
    pipe_out, pipe_in = os.pipe()
    fd = store._handles._fds[0]
    os.dup2(pipe_in, fd)
    records = store.fetch([0], copy=True)
    assert FAULTS[records.fault[0]] == "the operating system could not read the record"
    assert records.errno[0] != 0
    os.close(pipe_out)
    os.close(pipe_in)


def test_indices_outside_are_refused(store: shards.Store) -> None:
    for bad in (-1, len(store)):
        with pytest.raises(IndexError, match=rf"sample {bad} is outside 0\.\.38 of small"):
            store.read(bad)
        with pytest.raises(IndexError, match=f"sample {bad} is outside"):
            store.fetch([0, bad])
        with pytest.raises(IndexError, match=f"sample {bad} is outside"):
            store.key(bad)
    with pytest.raises(TypeError, match="1-D sequence of integers, got float64"):
        store.fetch([0.5])
    with pytest.raises(TypeError, match=r"\(1, 2\)"):
        store.fetch(np.zeros((1, 2), np.int64))


def test_a_shard_that_goes_away_later_is_named(folder: Path) -> None:
    store = shards.open(folder)
    (folder / "small-000003.tar").unlink()
    for call in (lambda: store.read(13), lambda: store.fetch([13])):
        with pytest.raises(FileNotFoundError, match=r"small-000003\.tar: shard file missing"):
            call()
    (folder / "small-000003.tar").write_bytes(b"short")
    for call in (lambda: store.read(13), lambda: store.fetch([13])):
        with pytest.raises(ValueError, match=r"small-000003\.tar: 5 bytes, the manifest says"):
            call()
    assert store.fetch([0]).fault[0] == 0


def test_few_descriptors_serve_many_shards_and_threads(folder: Path) -> None:
    store = shards.open(folder, max_open_files=2)
    wanted = [store.read(i).tobytes() for i in range(len(store))]
    assert len(store.header.shards) == 10

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(60):
            ids = rng.integers(0, len(store), 6)
            records = store.fetch(ids, copy=bool(rng.integers(2)))
            assert not records.fault.any()
            assert [d.tobytes() for d in records.data] == [wanted[i] for i in ids]
            assert store.read(int(ids[0])).tobytes() == wanted[ids[0]]

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work, seed) for seed in range(4)]:
            done.result()
    for i in range(len(store)):
        store.fetch([i], copy=True)
    assert len(store._handles._fds) == 2
    assert not store._handles._users


def test_reads_hold_no_descriptors(folder: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    store = shards.open(folder)
    opened = len(os.listdir("/proc/self/fd"))
    views = [store.read(i) for i in range(len(store))]
    assert len(os.listdir("/proc/self/fd")) == opened <= before + 1
    assert len(views) == len(store)


def test_fetch_releases_the_interpreter_lock(tmp_path: Path) -> None:
    # A record read from a pipe-like slow file is not portable; a large one, read many times, is: while
    # one thread fetches, another must get to run.
    root = tmp_path / "images" / "a"
    root.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (900, 1200, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / "large.png")
    build(BuildOptions(root.parent, tmp_path / "set", "large", workers=1), progress=False)
    store = shards.open(tmp_path / "set")
    ticks, stop = 0, threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not stop.is_set():
            ticks += 1

    thread = threading.Thread(target=tick)
    ids = [0] * 32
    store.fetch(ids)
    thread.start()
    before = ticks
    store.fetch(ids)  # one native call of about 0.1 s
    during = ticks - before
    stop.set()
    thread.join()
    assert during > 100


def test_pickled_stores_open_again(store: shards.Store, folder: Path, images: tuple[Path, object]) -> None:
    text = pickle.dumps(store)
    assert len(text) < 1000, "only the path travels"
    again = pickle.loads(text)
    assert again.read(7).tobytes() == store.read(7).tobytes()
    again.close()
    for path in folder.iterdir():
        path.unlink()
    build(BuildOptions(images[0], folder, "small", samples_per_shard=5, workers=1), progress=False)
    with pytest.raises(ValueError, match="built again since this store was opened"):
        pickle.loads(text)


def test_pickled_and_copied_records_have_the_bytes(store: shards.Store) -> None:
    """Where they lie means nothing in another process, and nobody keeps it alive for a copy."""
    records = store.fetch([3, 1])
    for other in (pickle.loads(pickle.dumps(records)), shallow_copy(records), deepcopy(records)):
        assert not set(other.span[:, 0].tolist()) & set(records.span[:, 0].tolist())
        assert [d.tobytes() for d in other.data] == [store.read(i).tobytes() for i in (3, 1)]
        assert (other.fault.tolist(), other.errno.tolist()) == ([0, 0], [0, 0])


def _child(store: shards.Store, answers: multiprocessing.SimpleQueue[bytes]) -> None:
    records = store.fetch([4, 30])
    answers.put(b"".join(d.tobytes() for d in records.data) + store.read(11).tobytes())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_the_same(store: shards.Store, method: str) -> None:
    wanted = b"".join(store.read(i).tobytes() for i in (4, 30, 11))
    store.fetch([4], copy=True)
    context = multiprocessing.get_context(method)
    answers = context.SimpleQueue()
    process = context.Process(target=_child, args=(store, answers))
    # As if another thread were inside the store at the moment of the fork.
    with store._handles._lock, store._handles.mappings()._lock:
        process.start()
        found = answers.get()
    process.join()
    assert found == wanted
    assert process.exitcode == 0
    assert not store.fetch([4, 30]).fault.any()


def test_close_and_context(folder: Path) -> None:
    with shards.open(folder) as store:
        store.fetch(range(len(store)), copy=True)
        fds = list(store._handles._fds.values())
        assert fds
    for fd in fds:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
    assert store.fetch([1]).fault[0] == 0, "a closed store opens again when it is used"
    assert "39 samples, 3 classes, 10 shards" in repr(store)
