"""A training step on tensors that only say that they are on a GPU: nothing mixes devices, and nothing waits for one.

torch's FakeTensorMode has shapes, types and devices, but no numbers. An operation on a GPU's and a CPU's tensors is an
error in it as on a GPU, and so is asking for a number, which on a GPU would wait for it.
"""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import model
from model.codebook import kernels
from model.codebook.codebook import Codebook
from pipeline.loader import EvaluationBatch, TrainingBatch
from tools.runtime import scoring
from tools.runtime.codes import CodeUsage
from tools.runtime.config import RunConfig, read_recipe, validated
from tools.runtime.ema import Ema
from tools.runtime.launch import as_configured
from tools.runtime.meter import Meter
from tools.runtime.optim import make_optimizer
from tools.runtime.results import CLEAN
from tools.runtime.step import train_step

CUDA = torch.device("cuda", 0)
TINY = Path(__file__).resolve().parent / "tiny.toml"

VARIANTS: dict[str, dict[str, Any]] = {
    "map": {},
    "pooled, top 2": {"model": {"quantise": "pooled", "top_k": 2, "top_k_weights": "softmax"}},
    "cosine, centred": {"model": {"metric": "cosine", "centre": True}},
    "moving average, revival": {"model": {"ema": 0.99, "revive_after": 10}},  # whose tenth step may wait
    "no codebook": {"model": {"quantise": "none", "attention": False, "fusion": "replace"}},
    "mixed, smoothed, clipped": {
        "pipeline": {"mixup": 0.2, "cutmix": 1.0},
        "loss": {"label_smoothing": 0.1},
        "optim": {"clip_norm": 1.0, "weight_decay": 0.1, "decay": "weights"},
    },
    "paired, consistent": {"pipeline": {"paired": True}, "loss": {"consistency": 1.0}},
    "AugMix, consistent": {"pipeline": {"augmix": 2}, "loss": {"consistency": 12.0}},
    "frozen": {"optim": {"name": "adamw", "freeze_trunk": True}, "model": {"freeze_bn": True}},
}


class OnGpu:
    """What a step asks of an Accelerator, for one process with a GPU that is not there."""

    device, scaler, num_processes, is_main_process, optimizer_step_was_skipped = CUDA, None, 1, True, False

    def unwrap_model(self, net: nn.Module) -> nn.Module:
        return net

    def autocast(self) -> Any:
        return nullcontext()  # autocast wants the GPU itself

    def no_sync(self, net: nn.Module) -> Any:
        return nullcontext()

    def __init__(self, net: nn.Module) -> None:
        self._net = net

    def backward(self, loss: Tensor) -> None:
        """Autograd wants the GPU itself: gradients are there without it."""
        assert (loss.device, loss.requires_grad) == (CUDA, True)
        for parameter in self._net.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None

    def clip_grad_norm_(self, parameters: Any, most: float) -> Tensor:
        return nn.utils.clip_grad_norm_(parameters, most)

    def unscale_gradients(self) -> None:
        pass

    def reduce(self, tensor: Tensor, how: str) -> Any:
        """One of the two places that may wait; the numbers are made up."""
        assert (tensor.device, how) == (CUDA, "sum")
        return SimpleNamespace(cpu=lambda: tensor)

    def gather(self, tensor: Tensor) -> Any:
        """As `reduce`."""
        assert tensor.device == CUDA
        return SimpleNamespace(tolist=lambda: [1.0] * len(tensor), cpu=lambda: tensor)


class Guard:
    """FiniteGuard without page-locked memory."""

    def images(self, sample_id: Tensor, finite: Tensor) -> None:
        assert (sample_id.device.type, finite.device, len(finite) % len(sample_id)) == ("cpu", CUDA, 0)

    def step(self, step: int, finite: Tensor, *, skipped: bool) -> None:
        assert (finite.device, finite.dtype, finite.shape) == (CUDA, torch.bool, ())


@dataclasses.dataclass
class Loader:
    """Batches as the GPU's loader hands them out."""

    paired: bool
    augmix: int
    micros: int = 2

    def __next__(self) -> TrainingBatch:
        images = torch.zeros(4, 3, 32, 32, device=CUDA).contiguous(memory_format=torch.channels_last)
        host = torch.zeros(4, dtype=torch.int64)
        return TrainingBatch(
            images=images,
            labels=torch.zeros(4, dtype=torch.int64, device=CUDA),
            kind=host.int(),
            severity=host.int(),
            sample_id=host,
            position=host,
            clean_images=images.clone() if self.paired else None,
            augmented=(images.clone(), images.clone()) if self.augmix == 2 else (),
            damaged=host.bool(),
        )


def move(net: model.VQSA) -> None:
    """Replace parameters and buffers; `Module.to` cannot do it with tensors that are not there."""

    def there(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=CUDA)

    for module in net.modules():
        for name, value in module._parameters.items():
            if value is not None:
                module._parameters[name] = nn.Parameter(there(value), value.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = there(buffer)
        if isinstance(module, Codebook):
            module.usage.moved(there)


def config(changes: dict[str, Any]) -> RunConfig:
    recipe: dict[str, Any] = read_recipe(TINY)
    settings = {**recipe, "data": "unused", "out": "unused", **changes}
    for section in ("model", "pipeline", "optim"):
        settings[section] = {**recipe.get(section, {}), **changes.get(section, {})}
    settings["model"]["init"] = "normal"
    return validated(RunConfig, settings, "test")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_on_a_gpu_mixes_no_devices_and_waits_for_nothing(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "kernels", lambda: None)  # they would ask the driver
    run = config(VARIANTS[variant])
    net = model.build(run.model, 3)
    if run.optim.freeze_trunk:
        net.get_submodule("trunk").requires_grad_(False)
    on_gpu: Any = OnGpu(net)
    with FakeTensorMode():
        move(net)
        optimizer = make_optimizer(run.optim, net)
        assert optimizer.defaults["fused"]
        assert not make_optimizer(run.optim, net, scaled=True).defaults["fused"]
        average, meter, codes = Ema(net, 0.99), Meter(on_gpu), CodeUsage(on_gpu, net)
        for step in range(2):
            loader, guard = Loader(run.pipeline.paired, run.pipeline.augmix), Guard()
            train_step(on_gpu, net, optimizer, loader, meter, run, step=step, guard=guard)  # type: ignore[arg-type]
            average.update(step + 1)
        assert set(meter.state_dict()["ranks"][0]) == {1.0}
        assert {"loss", "top1_pct", "gradient_norm"} <= meter.report().keys()
        codes.total()
        codes.state_dict()


def test_a_validation_on_a_gpu_mixes_no_devices_and_waits_for_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """But for reading the counts at the end. The corruption core, which is not torch's, gives its images back."""
    monkeypatch.setattr(kernels, "kernels", lambda: None)
    asked = []

    def corrupt(images_u8: Tensor, kind: str, severity: int, keys: Tensor, **how: Any) -> Tensor:
        assert (images_u8.device, len(keys)) == (CUDA, len(images_u8))
        asked.append((kind, severity))
        return images_u8.clone()

    monkeypatch.setattr(scoring, "corrupt", corrupt)
    run = config({})
    net = model.build(run.model, 3)
    sample_id = torch.arange(4)
    with FakeTensorMode(allow_non_fake_inputs=True):
        move(net)
        images_u8 = torch.zeros(4, 32, 32, 3, dtype=torch.uint8, device=CUDA)
        host = torch.zeros(4, dtype=torch.int64)
        batch = EvaluationBatch(images_u8, host, sample_id, host.bool())
        cells = [(CLEAN, 0), ("fog", 3)]
        found = scoring.score(net, [batch, batch], run.pipeline, cells, seed=1, flavour="bethge", device=CUDA)
    assert found.shape == (2, 3)
    assert asked == [("fog", 3)] * 2


def test_what_waits_and_what_mixes_is_noticed() -> None:
    with FakeTensorMode():
        there = torch.zeros(3, device=CUDA)
        with pytest.raises(DataDependentOutputException):
            there.sum().item()
        with pytest.raises(Exception, match="device"):
            there += torch.zeros(3)


def test_cudnn_looks_for_the_fastest_algorithm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches have one shape. A CPU has no cuDNN; the switch is there all the same."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    as_configured(nn.Conv2d(3, 4, 3), config({}))
    assert torch.backends.cudnn.benchmark
