"""Trunks of others: timm's by name, modules passed in, and those that give no map."""

from __future__ import annotations

import builtins
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from pydantic import ValidationError
from torch import Tensor, nn

import model
from model import ModelConfig, build
from model.count import count

# Shapes: B = images, D = feature dimension, h, w = feature map size.


class Small(nn.Module):
    """Four convolutions; with `last`, channels come last."""

    def __init__(self, dim: int = 24, last: bool = False) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, dim, 8, 8), nn.BatchNorm2d(dim), nn.ReLU(), nn.Conv2d(dim, dim, 1)
        )
        if last:
            self.output_fmt = "NHWC"

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(x)
        return x.permute(0, 2, 3, 1) if hasattr(self, "output_fmt") else x


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("no weights loaded")


def _config(trunk: str = "resnet10", **choices: Any) -> ModelConfig:
    return ModelConfig(**({"trunk": trunk, "codes": 6} | choices))


def _batch(size: int = 64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, size, size, generator=g), torch.randint(5, (4,), generator=g)


def _learns(net: model.VQSA, size: int = 64) -> None:
    out = net.train()(*_batch(size))
    assert isinstance(out, model.Losses)
    out.loss.backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
    features = net.eval()(_batch(size)[0], return_features=True)
    assert isinstance(features, model.Features)
    assert features.map.shape[1] == net.trunk.dim == features.z.shape[1]


@pytest.mark.parametrize("last", [False, True])
def test_a_module_passed_in(last: bool, tmp_path: Path) -> None:
    net = build(_config(freeze_bn=True), 5, trunk=Small(last=last))
    assert net.config.trunk == "module"
    assert net.trunk.dim == 24
    _learns(net)
    images = _batch()[0]
    assert net(images, return_features=True).map.shape == (4, 24, 8, 8)
    norm = net.trunk.net.layers[1]  # type: ignore[union-attr, index]
    assert not net.train().trunk.net.layers[1].training  # type: ignore[union-attr, index]
    assert not norm.running_mean.any(), "neither trying it out nor training touched frozen statistics"
    # And it comes back, with a module of the same kind.
    net.eval()
    safetensors.torch.save_file(net.state_dict(), tmp_path / "model.safetensors")
    record = {"model": net.config.model_dump(mode="json"), "classes": list("abcde")}
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert torch.equal(model.load(tmp_path, trunk=Small(last=last))(images), net(images))  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"no module was passed; say model\.build\(config, classes, trunk=module\)"
    ):
        model.load(tmp_path)


def test_its_weights_come_from_a_file(tmp_path: Path) -> None:
    torch.manual_seed(3)
    source = Small()
    torch.save(source.state_dict(), tmp_path / "small.pth")
    net = build(_config(weights=str(tmp_path / "small.pth")), 5, trunk=Small())
    assert torch.equal(net.trunk.net.layers[3].weight, source.layers[3].weight)  # type: ignore[union-attr, index]
    with pytest.raises(
        ValueError, match=r"does not fit trunk module: missing none; unexpected none; other shapes"
    ):
        build(_config(weights=str(tmp_path / "small.pth")), 5, trunk=Small(dim=32))


@pytest.mark.parametrize(
    ("module", "match"),
    [
        (
            nn.Sequential(Small(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            r"gives \(1, 24\) .* wanted a feature map",
        ),
        (nn.Flatten(), r"gives \(1, 150528\)"),
        (nn.Conv2d(4, 8, 1), r"trunk module fails on an image \(1, 3, 224, 224\): .*expected input"),
        (Fails(), "no weights loaded"),
    ],
)
def test_a_trunk_without_a_map_is_refused(module: nn.Module, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        build(_config(), 5, trunk=module)


def test_module_and_name_must_agree() -> None:
    with pytest.raises(ValueError, match="no module was passed"):
        build(_config("module"), 5)
    with pytest.raises(ValueError, match="a module was passed; say trunk='module'"):
        model.VQSA(_config(), 5, Small())


@pytest.mark.parametrize(
    ("choices", "match"),
    [
        ({"trunk": "resnet51"}, "no trunk 'resnet51', did you mean 'resnet50'"),
        ({"trunk": "vgg16"}, "choose resnet10, resnet18, .*'timm:NAME'"),
        ({"trunk": "timm:resnet18", "weights": "torchvision"}, "'timm:resnet18' is not; .* or 'timm'"),
        ({"trunk": "resnet18", "weights": "timm"}, "say trunk 'timm:resnet18'"),
        ({"trunk": "timm:resnet18", "stem": "small"}, "stem 'small' is for torchvision's"),
        ({"centre": True}, "centre changes no Euclidean distance"),
        ({"top_k": 7, "codes": 6}, "top_k is 7, more than the 6 codes"),
        ({"top_k": 2, "ema": 0.9}, "set ema to 0, or top_k to 1"),
        ({"top_k": 2, "revive_after": 3}, "set revive_after to 0, or top_k to 1"),
        ({"ema": 1.0}, "less than 1"),
    ],
)
def test_choices_that_do_not_fit_are_refused(choices: dict[str, Any], match: str) -> None:
    with pytest.raises(ValidationError, match=match):
        ModelConfig(**choices)


def test_timm_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "timm":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.delitem(sys.modules, "timm", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"needs timm: pip install -e '\.\[timm\]' in the checkout"):
        build(_config("timm:resnet18"), 5)


# Convolutions, tokens, and two whose heads have layers that the map does not reach.
@pytest.mark.parametrize(
    ("name", "dim"),
    [("test_resnet", 96), ("test_vit", 64), ("mobilenetv3_small_050", 288), ("test_convnext", 64)],
)
def test_timm_models(name: str, dim: int) -> None:
    pytest.importorskip("timm", reason="timm is not installed: pip install -e '.[timm]'")
    net = build(_config(f"timm:{name}"), 5)
    assert net.trunk.dim == dim
    _learns(net, 160 if name == "test_vit" else 64)
    parts = {part.name: part for part in count(net.config, 5, 160)}
    assert parts["total"].parameters == sum(p.numel() for p in net.parameters())
    assert parts["trunk layers"].macs > 0


def test_timms_channels_last_trunk() -> None:
    pytest.importorskip("timm", reason="timm is not installed: pip install -e '.[timm]'")
    with torch.device("meta"):
        net = build(_config("timm:swin_tiny_patch4_window7_224"), 5)
        assert net.trunk(torch.zeros(2, 3, 224, 224)).shape == (2, 768, 7, 7)
    assert net.trunk.dim == 768


def test_timm_weights_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed: pip install -e '.[timm]'")
    torch.manual_seed(4)
    source = timm.create_model("test_convnext", num_classes=5)
    file = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(source.state_dict(), file)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net = build(_config("timm:test_convnext", weights=str(file)), 5)
    images = _batch(160)[0]
    net.eval()
    source.eval()
    torch.testing.assert_close(net.trunk(images), source.forward_features(images))
    assert torch.equal(net.head.fc.weight, source.head.fc.weight)
    # From the Hugging Face cache, which is empty first.
    found: dict[str, str] = {}
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repo, name: found.get(name))
    with pytest.raises(FileNotFoundError, match=r"timm/test_convnext.* is not in the Hugging Face cache"):
        build(_config("timm:test_convnext", weights="timm"), 5)
    found["model.safetensors"] = str(file)
    again = build(_config("timm:test_convnext", weights="timm"), 5)
    assert torch.equal(again.trunk.net.stem[0].weight, source.stem[0].weight)  # type: ignore[union-attr, index]


def test_timm_names_that_do_not_exist() -> None:
    pytest.importorskip("timm", reason="timm is not installed: pip install -e '.[timm]'")
    with pytest.raises(ValueError, match=r"has no model 'resnot18'; did you mean timm:resnet18"):
        build(_config("timm:resnot18"), 5)
