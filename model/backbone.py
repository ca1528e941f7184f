"""Trunks by name, and their pretrained weights.

Shapes: B = images, D = feature dimension, H, W = image size, h, w = H, W divided by the stride (rounded up).
"""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from model.config import PASSED_IN, TIMM, ModelConfig
from model.fitting import fitting
from model.map_trunk import MapTrunk, TimmTrunk
from model.naming import mismatch, some
from model.trunk import Trunk

_BUILDERS = {
    "resnet18": torchvision.models.resnet18,
    "resnet34": torchvision.models.resnet34,
    "resnet50": torchvision.models.resnet50,
    "resnet101": torchvision.models.resnet101,
    "resnext101_32x8d": torchvision.models.resnext101_32x8d,
    "resnext101_64x4d": torchvision.models.resnext101_64x4d,
}


class TorchvisionTrunk(Trunk):
    """A torchvision residual network up to its last feature map.

    Args:
        name: see ModelConfig.trunk.
        stem: "imagenet" (7×7 stride 2, max-pool) or "small" (3×3 stride 1, no max-pool).
        freeze_bn: batch normalisation keeps its running statistics in training; its weights still learn.

    Attributes:
        stride: image size divided by map size: 32, or 8 with the small stem.
    """

    def __init__(
        self, name: str, stem: Literal["imagenet", "small"] = "imagenet", freeze_bn: bool = False
    ) -> None:
        super().__init__(name, freeze_bn)
        net: Any = ResNet(BasicBlock, [1, 1, 1, 1]) if name == "resnet10" else _BUILDERS[name]()
        self.dim = net.fc.in_features
        self.stride = 32 if stem == "imagenet" else 8
        if stem == "small":
            net.conv1 = nn.Conv2d(3, net.conv1.out_channels, kernel_size=3, padding=1, bias=False)
            nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
            net.maxpool = nn.Identity()
        # torchvision's names are kept, so that its weights load as they are.
        for child in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
            self.add_module(child, getattr(net, child))
        self.train(self.training)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Return the feature map (B, D, h, w), in the memory format of the images."""
        x = image_BCHW
        for layer in self.children():
            x = layer(x)
        return x


def make_trunk(config: ModelConfig, passed_in: nn.Module | None = None) -> Trunk:
    """Build the trunk that a configuration names; its weights are `load_weights`'s business.

    Args:
        config: trunk, stem and freeze_bn.
        passed_in: the module, for trunk "module".

    Raises:
        ValueError: a module without trunk "module" or the reverse, timm's model is not there, or no map.
    """
    if (config.trunk == PASSED_IN) != (passed_in is not None):
        raise ValueError(
            f"the trunk is {config.trunk!r}, but "
            + (
                "no module was passed; say model.build(config, classes, trunk=module), model.load(path, trunk=module)"
                if passed_in is None
                else "a module was passed; say trunk='module' in the configuration"
            )
        )
    if passed_in is not None:
        return MapTrunk(passed_in, freeze_bn=config.freeze_bn)
    if config.trunk.startswith(TIMM):
        return TimmTrunk(config.trunk, config.freeze_bn)
    return TorchvisionTrunk(config.trunk, config.stem, config.freeze_bn)


def load_weights(trunk: Trunk, fc: nn.Linear, weights: str) -> None:
    """Fill the trunk from pretrained weights, and the classifier where its shape agrees.

    Args:
        trunk: what to fill.
        fc: the last linear layer; left as it is, with a warning, when the weights have other classes.
        weights: "torchvision" (ImageNet V1 weights from torch's cache), "timm" (from the Hugging Face cache;
            nothing is downloaded in either case) or a file, .safetensors or a torch file that holds tensors
            only. "model" or "state_dict" around the tensors and "module." before the names are taken off.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: the tensors do not fit the trunk; lists missing, unexpected and differently shaped names.
    """
    if weights == "torchvision":
        path = _torchvision_file(trunk.name)
    elif weights == "timm":
        assert isinstance(trunk, TimmTrunk)  # ModelConfig allows no other
        path = trunk.cached_weights()
    else:
        path = Path(weights)
    if not path.is_file():
        raise FileNotFoundError(
            f"model.weights: no file {path}; give a .pth or .safetensors file, 'torchvision', 'timm' or ''"
        )
    state = read_tensors(path)
    last = trunk.classifier_name() if isinstance(trunk, TimmTrunk) else "fc"
    classifier = {key: state.pop(f"{last}.{key}") for key in ("weight", "bias") if f"{last}.{key}" in state}
    target: nn.Module = trunk
    if isinstance(trunk, MapTrunk):
        target = trunk.net
        without = tuple(f"{child}." for child in getattr(trunk, "left_out", ()))
        state = {name: tensor for name, tensor in state.items() if not name.startswith(without)}
    problem = mismatch({name: tensor.shape for name, tensor in target.state_dict().items()}, state)
    if problem:
        raise ValueError(
            f"{path} does not fit trunk {trunk.name}: {problem}; "
            f"choose the trunk and stem that the file was made with{fitting(read_tensors(path))}"
        )
    target.load_state_dict(state)
    wanted = {key: value.shape for key, value in fc.state_dict().items()}
    if {key: value.shape for key, value in classifier.items()} == wanted:
        fc.load_state_dict(classifier)
    elif classifier:
        classes, dim = classifier["weight"].shape
        other_dim = "" if dim == fc.in_features else f" (of {dim} dimensions, not {fc.in_features})"
        warnings.warn(
            f"{path}: its classifier is for {classes} classes{other_dim} and {fc.out_features} are wanted, "
            "so the last layer starts at random",
            stacklevel=2,
        )


def _torchvision_file(name: str) -> Path:
    weights = torchvision.models.get_model_weights(name).IMAGENET1K_V1
    path = Path(torch.hub.get_dir()) / "checkpoints" / str(weights.url).rsplit("/", 1)[1]
    if not path.is_file():
        raise FileNotFoundError(
            f"model.weights is 'torchvision', but {path} is not there and nothing is downloaded in a run; "
            f"fetch {weights.url} to that place, or set TORCH_HOME to a folder that has it"
        )
    return path


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a .safetensors file, or of a torch file without executing anything in it.

    "model" or "state_dict" around the tensors and "module." before the names are taken off.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file does not hold named tensors, or holds something that only executing could load.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; give a .pth or .safetensors file")
    if path.suffix == ".safetensors":
        state: dict[str, Any] = dict(safetensors.torch.load_file(path))
    else:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(
                f"{path} is no torch file of tensors alone ({str(error).splitlines()[0]}); "
                "save it again as a state_dict or as safetensors"
            ) from None
        if not isinstance(state, dict):
            raise ValueError(f"{path} holds a {type(state).__name__}, wanted named tensors (a state_dict)")
    for wrapper in ("model", "state_dict"):
        if isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    others = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(f"{path} holds {some(others)}, which are no tensors; wanted a state_dict")
    return {key.removeprefix("module."): value for key, value in state.items()}
