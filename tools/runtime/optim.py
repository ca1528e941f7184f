"""Optimiser and learning-rate schedule of a run."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer

from tools.runtime.config import OptimConfig


def make_optimizer(config: OptimConfig, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """Return the optimiser; its learning rate is set before every step by `learning_rate`."""
    # A tensor learning rate would be needed under torch.compile only; a float keeps CPU steps bit-exact.
    if config.name == "adam":
        return Adam(parameters, lr=config.lr, weight_decay=config.weight_decay)
    return SGD(parameters, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)


def learning_rate(config: OptimConfig, step: int, total: int, steps_per_epoch: float) -> float:
    """Return the rate for optimiser step `step` (from 0) of `total`: a pure function, so resuming needs no state.

    The cosine falls from lr to min_lr over the run: min_lr + (lr - min_lr) (1 + cos(pi t)) / 2 with t the
    fraction of the run that is done, counted in steps, or in whole epochs with update = "epoch".
    """
    if config.schedule == "constant":
        return config.lr
    done = step / total
    if config.update == "epoch":
        done = min(1.0, math.floor(step / steps_per_epoch) * steps_per_epoch / total)
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * done)) / 2


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Give every parameter group the rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def autocast_dtype(precision: str) -> torch.dtype | None:
    """Return torch's type for a precision by name; None means float32 without autocast."""
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
