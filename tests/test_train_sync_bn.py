"""Batch normalisation over all GPUs: torch has none for the CPU, so what is looked at is the model it is made for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

import model
import train
from model.config import ModelConfig
from tools.runtime import launch
from tools.runtime.config import RunConfig, parse_command

TINY = Path(__file__).resolve().parent / "tiny.toml"


def test_normalisations_are_converted_and_keep_their_state() -> None:
    net = model.build(ModelConfig(trunk="resnet10", codes=4, init="normal"), 3)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                assert tensor is not None
                nn.init.uniform_(tensor, 0.5, 2)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    expected = [name for name, module in net.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert expected
    made = launch.as_configured(net, RunConfig(sync_bn=True))
    assert [name for name, module in made.named_modules() if isinstance(module, nn.SyncBatchNorm)] == expected
    assert not any(isinstance(module, nn.BatchNorm2d) for module in made.modules())
    after = made.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), name


def test_the_loop_converts_before_it_wraps_the_model(
    picture_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DDP notes the buffers that it keeps equal, and the optimiser its parameters, when they get the model."""

    class Reached(Exception):
        pass

    def prepare(accelerator: Accelerator, net: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        assert any(isinstance(module, nn.SyncBatchNorm) for module in net.modules())
        assert not any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
        steps = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        assert steps == {id(parameter) for parameter in net.parameters()}
        raise Reached

    def unchecked(config: RunConfig) -> Accelerator:
        return launch.make_accelerator(config.model_copy(update={"sync_bn": False}))

    monkeypatch.setattr(train, "make_accelerator", unchecked)
    monkeypatch.setattr(Accelerator, "prepare", prepare)
    settings = ["--recipe", str(TINY), "--data", str(picture_shards), "--out", str(tmp_path)]
    with pytest.raises(Reached):
        train.train(parse_command(train.TrainCommand, [*settings, "--sync-bn"]))
