"""Optimiser and learning-rate schedule of a run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from accelerate import Accelerator
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer


class OptimConfig(BaseModel):
    """Optimiser and learning-rate schedule."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: Literal["adam", "adamw", "sgd"] = "adam"
    """Optimiser. adam applies weight decay as L2, adamw decoupled."""

    lr: float = Field(1e-3, gt=0)
    """Highest learning rate: where warm-up ends and the schedule starts."""

    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of SGD; Adam uses its usual betas (0.9, 0.999)."""

    weight_decay: float = Field(0.0, ge=0)
    """Weight decay, as torch's optimisers apply it."""

    decay: Literal["all", "weights"] = "all"
    """What decays: all parameters, or only weights of two and more dimensions (no norms, no biases, no codes)."""

    schedule: Literal["cosine", "step", "constant"] = "cosine"
    """Learning rate over the run, after warm-up."""

    warmup_epochs: float = Field(0.0, ge=0)
    """Length of the linear warm-up from lr / steps to lr, in epochs; the schedule runs over what is left."""

    drop_epochs: tuple[float, ...] = ()
    """Epochs at which schedule "step" multiplies the rate by drop_factor."""

    drop_factor: float = Field(0.1, gt=0, le=1)
    """Factor of schedule "step"."""

    min_lr: float = Field(0.0, ge=0)
    """Where the cosine ends."""

    update: Literal["step", "epoch"] = "step"
    """Whether the schedule changes the rate after every step or after every epoch; warm-up is by step."""

    clip_norm: float | None = Field(None, gt=0)
    """Largest 2-norm of all gradients together; larger ones are scaled down to it."""

    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Keep an exponential moving average of the weights; it is what is evaluated and exported."""

    freeze_trunk: bool = False
    """Keep the trunk's weights and statistics as they are; train codebook, attention and head."""

    fused: bool | None = None
    """torch's fused optimiser. Unset: on GPUs, but not with fp16, since it does not tell which steps it skipped."""

    @model_validator(mode="after")
    def _schedule_is_whole(self) -> OptimConfig:
        if (self.schedule == "step") != bool(self.drop_epochs):
            raise ValueError(
                f"optim.drop_epochs {list(self.drop_epochs)} with schedule {self.schedule!r}: schedule 'step' needs "
                "at least one, the others take none"
            )
        if list(self.drop_epochs) != sorted(set(self.drop_epochs)) or min(self.drop_epochs, default=1) <= 0:
            raise ValueError(f"optim.drop_epochs must be positive and rising, got {list(self.drop_epochs)}")
        return self


def parameter_groups(config: OptimConfig, net: nn.Module) -> list[dict[str, Any]]:
    """Return the optimiser's parameter groups: what decays and, where something does not, the rest.

    With decay = "weights" the rest are all vectors (norms, biases) and the codes, which are positions in
    feature space and have no reason to shrink.
    """
    named = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    if config.decay == "all":
        return [{"params": [p for _, p in named], "weight_decay": config.weight_decay}]
    decays = [p.ndim > 1 and not name.startswith("codebook.") for name, p in named]
    groups = [
        {"params": [p for (_, p), d in zip(named, decays, strict=True) if d == which], "weight_decay": decay}
        for which, decay in ((True, config.weight_decay), (False, 0.0))
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(config: OptimConfig, net: nn.Module, *, scaled: bool = False) -> Optimizer:
    """Return the optimiser of the parameters that learn; `set_learning_rate` sets its rate before every step.

    Args:
        net: the model on its device.
        scaled: whether losses are scaled (fp16), so that steps may be skipped.

    Raises:
        ValueError: fused is asked for, which does not tell which steps were skipped, and some may be.
    """
    groups = parameter_groups(config, net)
    fused = config.fused
    if fused and scaled:
        raise ValueError(
            "optim.fused = true with precision fp16: the fused optimiser does not tell which steps the loss scale "
            "skipped, and they would count as taken; leave optim.fused out, or choose bf16"
        )
    if fused is None:
        # On the CPU the plain one; the fused one rounds differently.
        fused = not scaled and all(p.is_cuda for group in groups for p in group["params"])
    # A tensor learning rate would be needed under torch.compile only; a float keeps CPU steps bit-exact.
    if config.name == "sgd":
        return SGD(groups, lr=config.lr, momentum=config.momentum, fused=fused)
    return (Adam if config.name == "adam" else AdamW)(groups, lr=config.lr, fused=fused)


def learning_rate(config: OptimConfig, step: int, total: int, steps_per_epoch: float) -> float:
    """Return the rate for optimiser step `step` (from 0) of `total`: a pure function, so resuming needs no state.

    Warm-up: lr (step + 1) / W over the first W = ceil(warmup_epochs * steps_per_epoch) steps.
    cosine: min_lr + (lr - min_lr) (1 + cos(pi t)) / 2 with t the fraction done of what follows warm-up, counted
    in steps, or in whole epochs with update = "epoch". step: lr times drop_factor for each drop epoch passed.
    """
    warmup = min(math.ceil(config.warmup_epochs * steps_per_epoch), total)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    counted = float(step)
    if config.update == "epoch":
        counted = math.floor(step / steps_per_epoch) * steps_per_epoch
    if config.schedule == "step":
        passed = sum(counted >= epoch * steps_per_epoch for epoch in config.drop_epochs)
        return config.lr * config.drop_factor**passed
    done = min(1.0, max(0.0, counted - warmup) / max(1, total - warmup))
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * done)) / 2


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Give every parameter group the rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def gradient_norm(accelerator: Accelerator, parameters: Iterable[nn.Parameter], clip: float | None) -> Tensor:
    """Return the 2-norm of all gradients together, on their device; scale them down to `clip` where it is more."""
    parameters = list(parameters)
    if clip is not None:
        norm: Tensor = accelerator.clip_grad_norm_(parameters, clip)
        return norm
    accelerator.unscale_gradients()
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def autocast_dtype(precision: str) -> torch.dtype | None:
    """Return torch's type for a precision by name; None means float32 without autocast."""
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
