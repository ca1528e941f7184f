"""Convolutional trunks: image to feature map.

Shapes: B = images, D = feature dimension, H, W = image size, h, w = H, W divided by the stride (rounded up).
"""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any, Literal, Self

import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from model.naming import mismatch, some

_BUILDERS = {
    "resnet18": torchvision.models.resnet18,
    "resnet34": torchvision.models.resnet34,
    "resnet50": torchvision.models.resnet50,
    "resnet101": torchvision.models.resnet101,
    "resnext101_32x8d": torchvision.models.resnext101_32x8d,
    "resnext101_64x4d": torchvision.models.resnext101_64x4d,
}


class Trunk(nn.Module):
    """A torchvision residual network up to its last feature map.

    Args:
        name: see ModelConfig.trunk.
        stem: "imagenet" (7×7 stride 2, max-pool) or "small" (3×3 stride 1, no max-pool).
        freeze_bn: batch normalisation keeps its running statistics in training; its weights still learn.

    Attributes:
        dim: D, channels of the map.
        stride: image size divided by map size: 32, or 8 with the small stem.
    """

    def __init__(
        self, name: str, stem: Literal["imagenet", "small"] = "imagenet", freeze_bn: bool = False
    ) -> None:
        super().__init__()
        net: Any = ResNet(BasicBlock, [1, 1, 1, 1]) if name == "resnet10" else _BUILDERS[name]()
        self.name = name
        self.freeze_bn = freeze_bn
        self.dim: int = net.fc.in_features
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

    def train(self, mode: bool = True) -> Self:
        """Switch between training and evaluation; frozen batch normalisation stays in evaluation."""
        super().train(mode)
        if self.freeze_bn:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self


def load_weights(trunk: Trunk, fc: nn.Linear, weights: str) -> None:
    """Fill the trunk from pretrained weights, and the classifier where its shape agrees.

    Args:
        trunk: what to fill.
        fc: the last linear layer; left as it is, with a warning, when the weights have other classes.
        weights: "torchvision" (ImageNet V1 weights from torch's cache; nothing is downloaded) or a file,
            .safetensors or a torch file that holds tensors only. "model" or "state_dict" around the tensors
            and "module." before the names are taken off.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: the tensors do not fit the trunk; lists missing, unexpected and differently shaped names.
    """
    path = _torchvision_file(trunk.name) if weights == "torchvision" else Path(weights)
    if not path.is_file():
        raise FileNotFoundError(
            f"model.weights: no file {path}; give a .pth or .safetensors file, 'torchvision' or ''"
        )
    state = read_tensors(path)
    classifier = {key: state.pop(f"fc.{key}") for key in ("weight", "bias") if f"fc.{key}" in state}
    problem = mismatch({name: tensor.shape for name, tensor in trunk.state_dict().items()}, state)
    if problem:
        raise ValueError(
            f"{path} does not fit trunk {trunk.name}: {problem}; "
            "choose the trunk and stem that the file was made with"
        )
    trunk.load_state_dict(state)
    wanted = {key: value.shape for key, value in fc.state_dict().items()}
    if {key: value.shape for key, value in classifier.items()} == wanted:
        fc.load_state_dict(classifier)
    elif classifier:
        warnings.warn(
            f"{path}: its classifier is for {classifier['weight'].shape[0]} classes and {fc.out_features} "
            "are wanted, so the last layer starts at random",
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
