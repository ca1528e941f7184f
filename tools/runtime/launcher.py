"""What a launcher leaves in the environment for Accelerate, where this project has settings of its own.

`accelerate launch`, and the answers once given to `accelerate config`, are read by Accelerate itself. What would
change the training there without a word in the run's configuration is refused.
"""

from __future__ import annotations

import logging
import os

from accelerate import DistributedType

log = logging.getLogger(__name__)

_FROM = "from `accelerate launch` or its configuration file (`accelerate config`)"
_MODES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
}
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
    if theirs.lower() not in ("no", precision) and os.environ.get("RANK", "0") == "0":
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
