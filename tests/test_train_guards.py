"""What is watched in a run: values that are not finite, stuck data, memory; and CPUs and trackers."""

from __future__ import annotations

import json
import math
import mmap
import re
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

import shards
import train
from pipeline.config import PipelineConfig
from pipeline.loader import TrainingLoader
from tools.runtime import affinity, checkpoint, guard, launch, step, trackers, watchdog
from tools.runtime import meter as meters
from tools.runtime.config import RunConfig, parse_command
from tools.runtime.guard import FiniteGuard, batch_again
from tools.runtime.meter import Meter, host_memory_gib
from tools.runtime.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tests" / "tiny.toml"


def run(shards: Path, out: Path, *more: str) -> int:
    arguments = ["--recipe", str(TINY), "--data", str(shards), "--out", str(out), *more]
    return train.train(parse_command(train.TrainCommand, arguments))


# Values that are not finite


@pytest.fixture
def poisoned(picture_shards: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One image of optimiser step 6 (from 1) has a NaN; returns a list with its sample id, once it was met."""
    met: list[int] = []
    original = step.prepare

    def prepare(batch: Any, *arguments: Any, **named: Any) -> Any:
        made = original(batch, *arguments, **named)
        if batch.position[0] == 5 * 8:
            made.images[2, 1, 4, 4] = torch.nan
            met.append(int(batch.sample_id[2]))
        return made

    monkeypatch.setattr(step, "prepare", prepare)
    return met


def test_a_step_that_is_not_finite_is_named_with_its_samples(
    picture_shards: Path, tmp_path: Path, poisoned: list[int]
) -> None:
    # With batch statistics one image spoils all; frozen ones leave it alone.
    with pytest.raises(FloatingPointError, match="loss or gradients of step 6 are not finite") as error:
        run(picture_shards, tmp_path, "--model.freeze-bn", "--optim.lr", "1e-4")
    assert f"samples [{poisoned[0]}] of this process's 8" in str(error.value)
    assert "--allow-changes with a lower optim.lr" in str(error.value)
    assert [c.step for c in checkpoint.complete(tmp_path / "checkpoints")] == [4]
    (path,) = tmp_path.glob("not_finite_step_000006_rank0.pt")
    (part,) = torch.load(path, weights_only=True)
    assert poisoned[0] in part["sample_id"].tolist()
    loader = TrainingLoader(
        shards.open(picture_shards), PipelineConfig(image_size=32, constants="imagenet", batch_global=8, threads=1,
        kinds=("gaussian_noise", "brightness", "contrast")), seed=0)  # fmt: skip
    loader.seek(5)
    assert torch.equal(part["images"], next(loader).images)  # what the stream gave: the NaN came after it
    loader.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["loss"] is None


def test_a_full_disk_does_not_hide_what_was_not_finite(
    picture_shards: Path, tmp_path: Path, poisoned: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """/dev/full takes nothing, as a full disk; torch says so in a RuntimeError of its own."""
    save = torch.save

    def full(content: Any, path: Path) -> None:
        save(content, "/dev/full" if path.name.startswith("not_finite") else path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(FloatingPointError, match="loss or gradients of step 6 are not finite") as error:
        run(picture_shards, tmp_path, "--model.freeze-bn", "--optim.lr", "1e-4")
    assert f"samples [{poisoned[0]}] of this process's 8; its batch could not be written: " in str(
        error.value
    )
    assert re.search(r"written: \S+rank0\.pt: [^\n]+ Nothing was saved since", str(error.value))


def test_the_batch_of_a_step_that_was_not_finite_has_all_views(picture_shards: Path) -> None:
    store = shards.open(picture_shards)
    config = PipelineConfig(
        image_size=32, constants="imagenet", batch_global=8, batch_per_gpu=4, threads=1, kinds=(), augmix=2
    )
    loader = TrainingLoader(store, config, seed=0)
    parts = batch_again(loader, 2, store)
    loader.seek(1)
    for part in parts:
        batch = next(loader)
        assert [len(view) for view in part["augmented"]] == [4, 4]
        assert all(map(torch.equal, part["augmented"], batch.augmented))
    loader.close()
    assert len(parts) == 2


def test_no_checkpoint_is_made_of_a_step_that_is_not_finite(
    picture_shards: Path, tmp_path: Path, poisoned: list[int]
) -> None:
    with pytest.raises(FloatingPointError, match="step 6"):
        run(picture_shards, tmp_path, "--checkpoint-every", "6", "--model.freeze-bn")
    assert checkpoint.complete(tmp_path / "checkpoints") == []


def test_the_guard_remembers_the_first_bad_step() -> None:
    guard = FiniteGuard()
    for number, flags in enumerate([[True, True], [True, False], [False, True]], start=1):
        guard.images(torch.tensor([10 * number, 10 * number + 1]), torch.tensor(flags))
        guard.step(number, torch.tensor(True))
    assert (guard.bad_step, guard.bad_samples) == (2, [21])


def test_gradients_alone_can_be_bad() -> None:
    guard = FiniteGuard()
    guard.images(torch.tensor([4, 5]), torch.tensor([True, True]))
    guard.step(1, torch.tensor(False))
    assert (guard.bad_step, guard.bad_samples) == (1, [])


@pytest.mark.parametrize("scale", [2.0**127, math.inf])
def test_gradients_that_overflow_at_any_loss_scale_stop_the_run(
    picture_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: float
) -> None:
    """A scale that overflows even float32: halved, it is soon small enough; one that stays so stops the run."""
    make = launch.make_accelerator

    def scaled(config: RunConfig) -> Accelerator:
        accelerator = make(config)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        return accelerator

    monkeypatch.setattr(train, "make_accelerator", scaled)
    monkeypatch.setattr(guard, "MOST_SKIPS", 10)
    if math.isfinite(scale):
        assert run(picture_shards, tmp_path) == 0
        assert 0 < read_metrics(tmp_path / "metrics.jsonl")[-1]["skipped_steps"] < 10
    else:
        with pytest.raises(
            FloatingPointError, match=r"fp16 gradients of step 10 and the 9 before overflow at any"
        ):
            run(picture_shards, tmp_path)
        assert list(tmp_path.glob("not_finite_step_000010_rank0.pt"))


@pytest.mark.parametrize("skipped", [True, False])
def test_the_step_after_the_last_overflow_does_not_change_what_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skipped: bool
) -> None:
    """Several processes agree to stop one step later. What the others say counts too."""
    noted = FiniteGuard()
    for number in range(1, guard.MOST_SKIPS + 2):
        noted.images(torch.tensor([number]), torch.tensor([True]))
        noted.step(number, torch.tensor(True), skipped=skipped or number <= guard.MOST_SKIPS)
    part = {"sample_id": torch.tensor([7])}
    others: list[Any] = []
    monkeypatch.setattr(guard, "batch_again", lambda *arguments: [part])
    monkeypatch.setattr(guard, "gather_object", lambda mine: mine + others)

    def said() -> str:
        place = cast(Accelerator, SimpleNamespace(process_index=1, num_processes=2))
        unused: Any = None
        return str(guard.not_finite(place, noted, tmp_path, unused, unused, nullcontext))

    assert "fp16 gradients of step 40 and the 39 before overflow at any loss scale: samples [7] of" in said()
    assert "Nothing was learnt from them; " in said()
    others.append((39, False, True, "samples [3] of rank 0's 8"))
    assert "loss or gradients of step 39 are not finite: samples [3] of rank 0's 8. Nothing was sa" in said()


# Data that does not come


def test_a_stuck_source_is_reported_with_what_it_reads(
    picture_shards: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = shards.open(picture_shards)
    released = threading.Event()
    fetch = store.fetch

    def stuck(ids: Any, *arguments: Any, **named: Any) -> Any:
        released.wait(30)
        return fetch(ids, *arguments, **named)

    monkeypatch.setattr(store, "fetch", stuck)
    config = PipelineConfig(image_size=32, batch_global=4, kinds=(), threads=1, constants="imagenet")
    loader = TrainingLoader(store, config, seed=0)
    told: list[str] = []

    def describe() -> str:
        told.append(loader.reading())
        if "batch 0" in told[-1]:
            released.set()
        return told[-1]

    with watchdog.Watchdog(warn_s=0.2, stop_s=60, stop=print) as dog:
        with dog.waiting("training", describe):
            batch = next(loader)
        reports = len(told)
        time.sleep(0.5)
        assert len(told) <= reports + 1, "without a wait nothing more is reported"
    first = store.location(int(batch.sample_id[0]))
    stuck_at = next(text for text in told if "batch 0" in text)
    assert "reading batch 0 (4 records from pictures-00000" in stuck_at
    assert f"first {first}) for " in stuck_at
    messages = [record.getMessage() for record in caplog.records]
    assert any("no training data for" in text and stuck_at in text for text in messages)
    loader.close()


def test_a_source_stuck_for_too_long_ends_the_run() -> None:
    script = (
        "import logging, time\n"
        "from tools.runtime.watchdog import Watchdog\n"
        "logging.basicConfig()\n"
        "with Watchdog(warn_s=0.2, stop_s=0.5, stop=lambda m: print('told', m)) as dog:\n"
        "    with dog.waiting('training', lambda: 'reading shard 7'):\n"
        "        time.sleep(30)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == watchdog.EXIT_CODE == 74
    assert "told no training data for" in ended.stdout
    assert "reading shard 7; the run ends (data_stop_s = 0.5)" in ended.stderr


# CPUs


def test_kernel_lists_of_cpus() -> None:
    assert affinity.parse_cpu_list("0-3,8,10-11\n") == [0, 1, 2, 3, 8, 10, 11]
    assert affinity.parse_cpu_list("\n") == []


def test_processes_share_cpus_in_numa_order(tmp_path: Path) -> None:
    for node, cpus in ((0, "0-1,4-5"), (1, "2-3,6-7")):
        folder = tmp_path / "devices/system/node" / f"node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(cpus + "\n")
    nodes = affinity.numa_nodes(tmp_path)
    assert nodes == [[0, 1, 4, 5], [2, 3, 6, 7]]
    parts = [affinity.share(range(8), nodes, i, 2) for i in range(2)]
    assert parts == [{0, 1, 4, 5}, {2, 3, 6, 7}]
    assert affinity.share({1, 2, 3}, nodes, 1, 2) == {2, 3}
    three = [affinity.share(range(8), nodes, i, 3) for i in range(3)]
    assert sorted(cpu for part in three for cpu in part) == list(range(8))
    with pytest.raises(ValueError, match="a CPU for each of 3 processes and there are 2"):
        affinity.share({0, 1}, nodes, 0, 3)


def test_a_gpus_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Gpu:
        pci_domain_id, pci_bus_id, pci_device_id = 0, 0x1B, 0

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Gpu)
    node = tmp_path / "devices/system/node/node0"
    node.mkdir(parents=True)
    (node / "cpulist").write_text("0-3\n")
    device = torch.device("cuda", 0)
    with pytest.raises(ValueError, match=r"no usable CPU near GPU 0000:1b:00\.0 \(NUMA node -1\)"):
        affinity.of_gpu(range(8), device, tmp_path)
    place = tmp_path / "bus/pci/devices/0000:1b:00.0"
    place.mkdir(parents=True)
    (place / "numa_node").write_text("0\n")
    assert affinity.of_gpu({2, 3, 4}, device, tmp_path) == {2, 3}
    with pytest.raises(ValueError, match="goes by the GPU's node and there is no GPU"):
        affinity.of_gpu(range(8), torch.device("cpu"), tmp_path)


# Numbers of an interval


def test_an_interval_of_skipped_steps_has_no_gradient_norm() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    meter = Meter(Accelerator(cpu=True))
    meter.add({"loss": torch.tensor(2.0)}, torch.eye(3), torch.arange(3))
    record = meter.report()
    assert math.isnan(record["gradient_norm"])
    assert record["loss"] == 2.0
    assert record["top1_pct"] == 100.0


def test_the_slowest_and_largest_process_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two: the second waits for data and holds more, as seen by the first. One exchange brings everything."""
    sent: list[torch.Tensor] = []

    def gather(tensor: torch.Tensor) -> torch.Tensor:
        sent.append(tensor)
        return torch.cat(sent[::-1])

    place = SimpleNamespace(device=torch.device("cpu"), num_processes=2, gather=gather)
    second, first = (Meter(cast(Accelerator, place)) for _ in range(2))
    for meter, waited_s, held_gib in ((second, 50.0, 7.0), (first, 1.0, 3.0)):
        meter.add({"loss": torch.tensor(held_gib)}, torch.eye(3), torch.arange(3))
        meter.add_step(torch.tensor(2.0))
        meter.exclude(-100)
        meter.wait(waited_s)
        monkeypatch.setattr(meters, "host_memory_gib", lambda held_gib=held_gib: held_gib)
        monkeypatch.setattr(meters, "device_memory_gib", lambda device, held_gib=held_gib: held_gib + 1)
        record = meter.report(damaged=int(held_gib))
    assert len(sent) == 2
    assert record["data_wait_pct"] == pytest.approx(50, rel=0.05)
    assert (record["host_gib"], record["memory_gib"], record["damaged"]) == (7, 8, 10)
    assert (record["loss"], record["top1_pct"], record["gradient_norm"]) == (5, 100, 2)


def test_pages_of_mapped_files_are_not_held(tmp_path: Path) -> None:
    size_b = 256 << 20
    path = tmp_path / "records"
    path.write_bytes(bytes(size_b))
    before_gib = host_memory_gib()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as pages:
        assert sum(pages[::4096]) == 0  # every page is resident now
        assert host_memory_gib() - before_gib < 0.1
    held = bytearray(b"\1") * size_b
    assert host_memory_gib() - before_gib > 0.2
    del held


def test_a_process_that_cannot_be_set_up_is_not_ended_later(
    picture_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The timer for processes that others do not join goes with the error, or it would end whoever called."""

    def missing(names: object) -> list[str]:
        raise ValueError("planted")

    monkeypatch.setattr(trackers, "checked", missing)
    with pytest.raises(ValueError, match="planted"):
        launch.make_accelerator(RunConfig(data=picture_shards, out=tmp_path, steps=1))
    timers = [t for t in threading.enumerate() if isinstance(t, threading.Timer)]
    assert all(timer.finished.is_set() for timer in timers)
