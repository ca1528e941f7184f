"""Which CPUs a process may use, so that processes of one machine do not fight for them.

To be called before torch, DALI or the readers start threads: they inherit it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)

SYSTEM = Path("/sys")


def parse_cpu_list(text: str) -> list[int]:
    """Return the CPUs of a kernel list such as "0-3,8,10-11"."""
    cpus: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cpus += range(int(first), int(last or first) + 1)
    return cpus


def cpu_list(cpus: Collection[int]) -> str:
    """Write CPUs as the kernel does; the inverse of `parse_cpu_list`."""
    parts: list[list[int]] = []
    for cpu in sorted(cpus):
        if parts and cpu == parts[-1][-1] + 1:
            parts[-1][1:] = [cpu]
        else:
            parts.append([cpu])
    return ",".join("-".join(map(str, part)) for part in parts)


def numa_nodes(system: Path = SYSTEM) -> list[list[int]]:
    """Return the CPUs of every NUMA node, by node number; empty where the kernel has no NUMA."""
    folders = sorted((system / "devices/system/node").glob("node[0-9]*"), key=lambda p: int(p.name[4:]))
    return [parse_cpu_list((folder / "cpulist").read_text()) for folder in folders]


def share(allowed: Collection[int], nodes: list[list[int]], index: int, processes: int) -> set[int]:
    """Return the CPUs of local process `index` of `processes`: equal parts of the allowed ones, in NUMA order.

    Raises:
        ValueError: there are fewer CPUs than processes.
    """
    by_node = [cpu for node in nodes for cpu in node if cpu in allowed]
    order = by_node + sorted(set(allowed) - set(by_node))
    if len(order) < processes:
        raise ValueError(
            f"cpu_affinity = 'split' needs a CPU for each of {processes} processes and there are {len(order)}; "
            "say cpu_affinity = 'none'"
        )
    bounds = [len(order) * i // processes for i in (index, index + 1)]
    return set(order[slice(*bounds)])


def of_gpu(allowed: Collection[int], device: torch.device, system: Path = SYSTEM) -> set[int]:
    """Return the allowed CPUs of the NUMA node that a GPU is attached to; all allowed ones where none is of that node.

    Raises:
        ValueError: not a GPU, or the kernel does not say where it is attached.
    """
    if device.type != "cuda":
        raise ValueError(
            "cpu_affinity = 'numa' goes by the GPU's node and there is no GPU; say 'split' or 'none'"
        )
    found: Any = torch.cuda.get_device_properties(device)
    bus = f"{found.pci_domain_id:04x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"
    file = system / "bus/pci/devices" / bus / "numa_node"
    node = int(file.read_text()) if file.is_file() else -1
    file = system / f"devices/system/node/node{node}/cpulist"
    near = set(parse_cpu_list(file.read_text())) if file.is_file() else set()
    if not near:
        raise ValueError(
            f"the kernel names no usable CPU near GPU {bus} (NUMA node {node}); say cpu_affinity = 'split' or 'none'"
        )
    if not near & set(allowed):
        log.warning(
            "rank %s: GPU %s is near CPUs %s, and this process may use CPUs %s alone: it is not bound to its GPU's. "
            "Let the scheduler bind nothing (srun --cpu-bind=none)",
            os.environ.get("RANK", "0"),
            bus,
            cpu_list(near),
            cpu_list(allowed),
        )
        return set(allowed)
    return near & set(allowed)


def bind(choice: str, device: torch.device, index: int, processes: int, system: Path = SYSTEM) -> set[int]:
    """Bind this process to its CPUs and return them; "none" leaves it as it is.

    Args:
        choice: RunConfig.cpu_affinity.
        index, processes: number of this process on its machine, and how many there are.
    """
    allowed = os.sched_getaffinity(0)
    if choice == "none":
        return allowed
    if choice == "split":
        chosen = share(allowed, numa_nodes(system), index, processes)
    else:
        chosen = of_gpu(allowed, device, system)
    os.sched_setaffinity(0, chosen)
    return chosen
