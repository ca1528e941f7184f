"""That a process is bound to the CPUs it should have, and what happens where it may not use them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tools.runtime import affinity, launch
from tools.runtime.config import RunConfig

ALLOWED = frozenset(os.sched_getaffinity(0))


class Reached(Exception):
    pass


@pytest.fixture(autouse=True)
def _unbound() -> Iterator[None]:
    yield
    os.sched_setaffinity(0, ALLOWED)


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The kernel's files of a GPU at NUMA node 1, whose CPUs are still to be written."""
    found = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x1B, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    place = tmp_path / "bus/pci/devices/0000:1b:00.0"
    place.mkdir(parents=True)
    (place / "numa_node").write_text("1\n")
    (tmp_path / "devices/system/node/node1").mkdir(parents=True)  # without a node 0
    return tmp_path


def near(gpu: Path, cpus: str) -> None:
    (gpu / "devices/system/node/node1/cpulist").write_text(cpus + "\n")


@given(st.sets(st.integers(0, 300)))
@settings(max_examples=30, deadline=None)
def test_lists_of_cpus_are_written_as_they_are_read(cpus: set[int]) -> None:
    assert set(affinity.parse_cpu_list(affinity.cpu_list(cpus))) == cpus


def test_lists_of_cpus_are_short() -> None:
    assert affinity.cpu_list({8, 0, 1, 2, 3, 10, 11}) == "0-3,8,10-11"


def test_a_process_is_bound_to_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """By way of what train.py calls, as the last of as many processes as there are CPUs."""
    monkeypatch.setenv("LOCAL_RANK", str(len(ALLOWED) - 1))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(len(ALLOWED)))
    expected = affinity.share(ALLOWED, affinity.numa_nodes(), len(ALLOWED) - 1, len(ALLOWED))
    assert len(expected) == 1

    def made(**named: object) -> None:
        assert os.sched_getaffinity(0) == expected
        raise Reached

    monkeypatch.setattr(launch, "Accelerator", made)
    with pytest.raises(Reached):
        launch.make_accelerator(RunConfig(cpu_affinity="split"))
    assert affinity.bind("none", torch.device("cpu"), 0, 1) == expected, "left as it is"


def test_a_process_is_bound_near_its_gpu(gpu: Path) -> None:
    one = min(ALLOWED)
    near(gpu, f"{one},{max(ALLOWED) + 1}-{max(ALLOWED) + 9}")
    assert affinity.bind("numa", torch.device("cuda", 0), 0, 1, gpu) == {one}
    assert os.sched_getaffinity(0) == {one}


def test_a_process_that_may_use_no_cpu_near_its_gpu_is_told_of_and_left(
    gpu: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As srun's own binding makes it."""
    monkeypatch.setenv("RANK", "3")
    near(gpu, "4096-4103")
    assert affinity.bind("numa", torch.device("cuda", 0), 0, 1, gpu) == ALLOWED
    assert os.sched_getaffinity(0) == ALLOWED
    (message,) = (record.getMessage() for record in caplog.records)
    mine = affinity.cpu_list(ALLOWED)
    assert (
        f"rank 3: GPU 0000:1b:00.0 is near CPUs 4096-4103, and this process may use CPUs {mine} alone"
        in message
    )
    assert "srun --cpu-bind=none" in message


def test_a_process_that_sees_its_own_gpu_alone_is_bound_by_that_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """--gpus-per-task=1: the fourth process of a node sees one GPU, number 0."""

    def bind(choice: str, device: torch.device, index: int, processes: int) -> None:
        assert device == torch.device("cuda", 0)
        assert (index, processes) == (3, 4)
        raise Reached

    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(affinity, "bind", bind)
    with pytest.raises(Reached):
        launch.make_accelerator(RunConfig(cpu_affinity="numa"))
