"""The launcher that started this process: what it leaves in the environment for Accelerate, and its end.

`accelerate launch`, and the answers once given to `accelerate config`, are read by Accelerate itself. What would
change the training there without a word in the run's configuration is refused.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
from pathlib import Path

from accelerate import DistributedType
from accelerate.utils import get_int_from_env

log = logging.getLogger(__name__)

_FROM = "from `accelerate launch` or its configuration file (`accelerate config`)"
_MODES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
}
_LAUNCHERS = {
    "accelerate",
    "accelerate-launch",
    "accelerate.commands.accelerate_cli",
    "accelerate.commands.launch",
    "torchrun",
    "torch.distributed.launch",
    "torch.distributed.run",
}
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_ON = {"1", "true", "t", "yes", "y", "on"}


def check_settings(precision: str) -> None:
    """Refuse what Accelerate would take from the environment; to be called before an Accelerator is made.

    Args:
        precision: RunConfig.precision, which counts; of another one the log warns.

    Raises:
        ValueError: the environment asks for another way of training.
    """
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no":
        raise ValueError(
            f"dynamo_backend = {backend} {_FROM}: a model compiled so gives its weights other names in checkpoints; "
            "say --dynamo_backend no there, and --compile here"
        )
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps != "1":
        raise ValueError(
            f"gradient_accumulation_steps = {steps} {_FROM} would divide the gradients once more; say 1 there: "
            "here they are accumulated where processes x pipeline.batch_per_gpu is less than pipeline.batch_global"
        )
    for name, mode in _MODES.items():
        if os.environ.get(name, "").lower() in _ON:
            raise _no_mode(mode)
    theirs = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if theirs.lower() not in ("no", precision) and is_first():
        log.warning(
            "mixed_precision = %s %s does not count: this run's is %s (--precision)", theirs, _FROM, precision
        )


def check_mode(mode: DistributedType) -> None:
    """Refuse a way of several processes to work together that this project is not made for.

    Raises:
        ValueError: neither one process nor DDP on GPUs or CPUs.
    """
    if mode not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        raise _no_mode(mode.value)


def _no_mode(mode: str) -> ValueError:
    return ValueError(
        f"{mode} {_FROM}: several processes train here with DDP, on GPUs or CPUs; say `accelerate launch --multi_gpu "
        "--num_processes N`, or use torchrun"
    )


def is_first() -> bool:
    """Whether this is the first process of the run, by the variables that launchers set; known before they join."""
    names = ["RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"]
    return int(get_int_from_env(names, 0)) == 0


def end_with_launcher() -> None:
    """Let SIGTERM come when the launcher that started this process ends, so that no process is left behind.

    For one process `accelerate launch` passes no signal on: it ends by SIGTERM itself and its process would go on
    unseen. Linux alone has this. The kernel goes by the thread that started the process: both launchers do that in
    their first.
    """
    parent = os.getppid()
    if sys.platform != "linux" or not _is_launcher(parent):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended in between
        os.kill(os.getpid(), signal.SIGTERM)


def _is_launcher(pid: int) -> bool:
    """Whether a process is accelerate's or torch's launcher. The environment alone may be an older launcher's."""
    if not {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys():
        return False
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    return any(Path(word).name in _LAUNCHERS for word in words)
