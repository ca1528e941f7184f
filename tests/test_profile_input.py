"""What the profiler says where it cannot measure: no GPU, damaged or missing shards, too little memory."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

import shards
from tools import profile_throughput
from tools.profiling import memory, reading
from tools.profiling.memory import Need
from tools.profiling.page_cache import evict, resident_share
from tools.profiling.session import Session
from tools.runtime.config import RunConfig, parse_command, read_recipe, validated

TINY = Path(__file__).resolve().parent / "tiny.toml"


def config(data: Path, **pipeline: object) -> RunConfig:
    recipe = read_recipe(TINY)
    recipe["pipeline"] = {**recipe["pipeline"], **pipeline}
    return validated(RunConfig, {**recipe, "data": data}, "test")


def session(data: Path, **pipeline: object) -> Session:
    return Session(
        config(data, **pipeline), Accelerator(cpu=True), rounds=1, seconds=0.01, progress=lambda name: None
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_missed(picture_shards: Path) -> None:
    command = parse_command(
        profile_throughput.ProfileCommand,
        ["--recipe", str(TINY), "--data", str(picture_shards), "--device", "cuda"],
    )
    with pytest.raises(
        ValueError, match=r"--device cuda was asked for, but torch sees no GPU.*or say --device cpu"
    ):
        profile_throughput.profile(command)


def test_no_shards(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="build"):
        session(tmp_path / "none")


def test_fewer_samples_than_a_batch(picture_shards: Path) -> None:
    with pytest.raises(ValueError, match=r"has 90 samples, fewer than one global batch \(128\)"):
        session(picture_shards, batch_global=128)


def damaged(source: Path, folder: Path, every: int) -> Path:
    """Copy a shard set and spoil every n-th record."""
    shutil.copytree(source, folder)
    store = shards.open(folder)
    for i in range(0, len(store), every):
        with (folder / store.header.shards[int(store.shard[i])].name).open("r+b") as file:
            file.seek(int(store.offset[i]))
            file.write(b"\0" * 64)
    store.close()
    return folder


def test_damaged_shards_are_refused(picture_shards: Path, tmp_path: Path) -> None:
    spoilt = damaged(picture_shards, tmp_path / "spoilt", 3)
    with pytest.raises(
        ValueError, match=r"records looked at are damaged \(first: .*verify_shards.py and rebuild"
    ):
        session(spoilt)


def test_a_few_damaged_records_are_a_warning(picture_shards: Path, tmp_path: Path) -> None:
    spoilt = damaged(picture_shards, tmp_path / "spoilt", 45)
    store = shards.open(spoilt)
    reader = reading.Reader(store, config(spoilt).pipeline, 0, 8)
    (warning,) = reader.check()
    assert "are damaged" in warning
    assert "grey images stand in for them" in warning
    reader.close()
    store.close()


def test_a_batch_that_does_not_fit_names_the_largest_that_does(picture_shards: Path) -> None:
    settings = config(picture_shards, batch_global=96)
    need = memory.estimate(settings, 3)
    limit = need.bytes(17)
    with pytest.raises(
        ValueError,
        match=r"batch of 96 images per process does not fit in memory \(about .* GiB needed, .* GiB there\); the "
        r"largest that does is 17. Say --pipeline.batch-per-gpu 16: 6 of them make up the global batch of 96",
    ):
        memory.check_cpu(settings, 3, ranks=1, batch=96, available=limit)
    memory.check_cpu(settings, 3, ranks=1, batch=17, available=limit)
    with pytest.raises(ValueError, match="does not fit"):
        memory.check_cpu(settings, 3, ranks=2, batch=17, available=limit)  # two processes share the memory
    with pytest.raises(ValueError, match="not even one image does; choose a smaller model"):
        memory.check_cpu(settings, 3, ranks=1, batch=96, available=need.fixed)


def test_memory_need_is_linear() -> None:
    need = Need(fixed=100, per_image=7)
    assert need.bytes(need.largest(1000)) <= 1000 < need.bytes(need.largest(1000) + 1)
    assert need.largest(99) == 0


@pytest.mark.parametrize(("room", "largest"), [(0, 0), (1, 1), (11, 11), (63, 63), (64, 64), (100, 64)])
def test_bisection_finds_the_largest_batch(room: int, largest: int) -> None:
    tried: list[int] = []

    def fits(batch: int) -> bool:
        tried.append(batch)
        return batch <= room

    assert memory.largest_fitting(fits, 64) == largest
    assert len(tried) <= 8


def test_a_gpu_that_runs_out_of_memory_is_bisected(picture_shards: Path) -> None:
    def step(images: int) -> None:
        if images > 5:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(ValueError, match=r"the largest that does is 5. Say --pipeline.batch-per-gpu 4"):
        memory.check_gpu(config(picture_shards), 1, 8, step, agree=int)
    memory.check_gpu(config(picture_shards), 1, 5, step, agree=int)
    # Enough here, but not in another process.
    tried: list[int] = []
    with pytest.raises(ValueError, match="the largest that does is 3"):
        memory.check_gpu(
            config(picture_shards), 1, 5, tried.append, agree=lambda short: max(short, int(tried[-1] > 3))
        )


def test_cold_records_are_not_in_the_page_cache(picture_shards: Path, tmp_path: Path) -> None:
    # On the disk of the checkout, since a memory file system has no cold pages.
    folder = Path(__file__).resolve().parent.parent / "build" / f"cold-{tmp_path.name}"
    shutil.copytree(picture_shards, folder)
    try:
        store = shards.open(folder)
        reader = reading.Reader(store, config(folder).pipeline, 0, 8)
        ids = reader.ids()
        reader.fetch([ids])
        warm = resident_share(store, ids)
        if warm is None:
            pytest.skip("this file system does not tell what is in the page cache")
        assert warm == 1.0
        evict(store, ids)
        evicted = resident_share(store, ids)
        assert evicted is not None
        assert evicted < 0.5
        assert not reader.fetch([ids]) - len(ids)  # and can be read again
        reader.close()
        store.close()
    finally:
        shutil.rmtree(folder)


def test_a_sweep_of_processes_wants_to_start_them_itself(
    picture_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Two:
        num_processes = 2

    monkeypatch.setattr(profile_throughput, "make_accelerator", lambda _: Two())
    command = parse_command(
        profile_throughput.ProfileCommand,
        ["--recipe", str(TINY), "--data", str(picture_shards), "--sweep", "ranks"],
    )
    with pytest.raises(ValueError, match="--sweep ranks starts the processes itself"):
        profile_throughput.profile(command)
