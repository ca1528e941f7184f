"""Sets a process up: its place among the others, its CPUs, its log, and the model as this run wants it."""

from __future__ import annotations

import logging
import os
import threading
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import nn

from tools.runtime import affinity, launcher, trackers
from tools.runtime.config import RunConfig

log = logging.getLogger(__name__)


def set_up_log() -> None:
    """Log warnings and worse, each line with the rank that says it where there are several."""
    rank = os.environ.get("RANK", "0")
    place = f" rank {rank}" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    logging.basicConfig(level=logging.WARNING, format=f"%(levelname)s{place} %(name)s: %(message)s")


def collective_timeout_s(config: RunConfig) -> float:
    """Return how long processes wait for one another in a collective.

    Heartbeats find a lost process long before; this is for what they cannot see. A process may wait for data for
    data_stop_s, and says itself then what it waited for.
    """
    return 1800 + config.data_stop_s


def make_accelerator(config: RunConfig) -> Accelerator:
    """Return the Accelerator of this process; binds it to its CPUs first.

    Raises:
        ValueError: the machine cannot do what the configuration asks for, or the launcher asks for something else.
    """
    launcher.check_settings(config.precision)
    local, processes = (
        int(os.environ.get(k, d)) for k, d in (("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1"))
    )
    # As Accelerate chooses it. Where each process is shown its own GPU alone, that is number 0 for all.
    gpus = torch.cuda.device_count()
    device = torch.device("cuda", local % gpus) if gpus else torch.device("cpu")
    affinity.bind(config.cpu_affinity, device, local, processes)
    alone = threading.Timer(config.join_within_s, _alone, (config.join_within_s,))
    alone.daemon = True
    alone.start()
    try:
        accelerator = Accelerator(
            mixed_precision={"fp32": "no"}.get(config.precision, config.precision),
            log_with=trackers.checked(config.trackers),
            project_dir=str(config.out),
            step_scheduler_with_optimizer=False,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=collective_timeout_s(config)))],
        )
    finally:
        alone.cancel()
    launcher.check_mode(accelerator.distributed_type)
    if config.precision == "fp16" and accelerator.scaler is None:
        raise ValueError(
            f"precision fp16 needs a GPU: on {accelerator.device.type} nothing scales the losses, and small gradients "
            "become 0; say bf16 or fp32"
        )
    if config.sync_bn and accelerator.device.type != "cuda":
        raise ValueError(
            "sync_bn needs GPUs: torch has no synchronised batch normalisation for the CPU; leave it out, or say "
            "model.freeze_bn = true"
        )
    return accelerator


def _alone(waited_s: float) -> None:
    """End a process that the others did not join."""
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    log.critical(
        "rank %s of %s waited %g s at %s for all processes to join (join_within_s): one did not start, died, or cannot "
        "reach this address or another process; see the others' output, and name the network by GLOO_SOCKET_IFNAME and "
        "NCCL_SOCKET_IFNAME where there are several",
        os.environ.get("RANK", "0"),
        os.environ.get("WORLD_SIZE", "1"),
        waited_s,
        where,
    )
    os._exit(1)


def as_configured(net: nn.Module, config: RunConfig) -> nn.Module:
    """Return a fresh model in the form this run trains it, before it is wrapped for several processes."""
    net = net.to(memory_format=torch.channels_last)
    # Batches have one shape: cuDNN times its algorithms for it once and keeps the fastest, instead of guessing.
    torch.backends.cudnn.benchmark = True
    if config.sync_bn:
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)  # type: ignore[no-untyped-call]
    if config.optim.freeze_trunk:
        net.get_submodule("trunk").requires_grad_(False)
    if config.compile:
        net.compile()  # in place: names of parameters stay
    return net
