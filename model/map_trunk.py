"""Trunks of others: timm's models by name, and any module that gives a feature map.

Shapes: B = images, D = feature dimension, h, w = map size.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.config import TIMM
from model.trunk import Trunk

_PROBE_PX = 224


class MapTrunk(Trunk):
    """A module that turns images into a feature map.

    It is tried once on an image of zeros, in evaluation mode, to learn D and to refuse a module without a map.

    Args:
        net: takes (B, 3, H, W) and gives (B, D, h, w), or (B, h, w, D) if it has an attribute
            `output_fmt = "NHWC"`; of a list or tuple of maps the last is taken.
        name: for error messages.
        freeze_bn: see ModelConfig.
        probe_px: side of the image of zeros.

    Raises:
        ValueError: the module fails on the image, or gives no map.
    """

    def __init__(
        self, net: nn.Module, name: str = "module", freeze_bn: bool = False, probe_px: int = _PROBE_PX
    ) -> None:
        super().__init__(name, freeze_bn)
        self.net = net
        self.dim = self._probed(probe_px).shape[1]
        self.train(self.training)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Return the feature map (B, D, h, w)."""
        found: Any = self._map(image_BCHW)
        if isinstance(found, list | tuple):
            found = found[-1]
        if getattr(self.net, "output_fmt", "NCHW") == "NHWC":
            found = found.permute(0, 3, 1, 2)
        map_BDhw: Tensor = found
        return map_BDhw

    def _map(self, image_BCHW: Tensor) -> Any:
        return self.net(image_BCHW)

    def _probed(self, size: int) -> Tensor:
        parameter = next(self.net.parameters(), torch.empty(0))
        image = torch.zeros(1, 3, size, size, device=parameter.device, dtype=parameter.dtype)
        modes = [(module, module.training) for module in self.net.modules()]
        self.net.eval()
        try:
            found = self._map(image)
            last = found[-1] if isinstance(found, list | tuple) and found else found
            if not isinstance(last, Tensor) or last.ndim != 4:
                shape = tuple(last.shape) if isinstance(last, Tensor) else type(last).__name__
                raise ValueError(
                    f"trunk {self.name} gives {shape} for an image {tuple(image.shape)}, wanted a feature map "
                    "(B, D, h, w); take a trunk without its pooling and classifier"
                )
            return self(image)  # type: ignore[no-any-return]
        except (RuntimeError, TypeError, AssertionError, AttributeError, IndexError) as error:
            raise ValueError(f"trunk {self.name} fails on an image {tuple(image.shape)}: {error}") from error
        finally:
            for module, mode in modes:
                module.training = mode


class TimmTrunk(MapTrunk):
    """A model of timm up to its last feature map: `forward_features`, or for a transformer its last tokens as a map.

    Parts that the map does not depend on (pooling, classifier, what lies between) are taken out, so that every
    parameter gets a gradient.

    Args:
        name: "timm:" and timm's name, such as "timm:convnext_tiny".
        freeze_bn: see ModelConfig.

    Raises:
        ValueError: timm is not installed, has no such model, or the model has no map.
    """

    def __init__(self, name: str, freeze_bn: bool = False) -> None:
        try:
            import timm
        except ImportError:
            raise ValueError(f"trunk {name!r} needs timm: pip install -e '.[timm]' in the checkout") from None
        wanted = name.removeprefix(TIMM)
        if not timm.is_model(wanted):
            close = difflib.get_close_matches(wanted.split(".")[0], timm.list_models(), n=3)
            raise ValueError(
                f"timm {timm.__version__} has no model {wanted!r}"
                + (f"; did you mean {' or '.join(f'{TIMM}{c}' for c in close)}?" if close else "")
            )
        net: Any = timm.create_model(wanted, pretrained=False, num_classes=0, global_pool="")
        super().__init__(net, name, freeze_bn, probe_px=net.pretrained_cfg["input_size"][-1])

    def _map(self, image_BCHW: Tensor) -> Any:
        net: Any = self.net
        if self._tokens:
            return net.forward_intermediates(
                image_BCHW, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
            )
        return net.forward_features(image_BCHW)

    def _probed(self, size: int) -> Tensor:
        net: Any = self.net
        self._tokens = False
        image = torch.zeros(1, 3, size, size, device=next(net.parameters()).device)
        with torch.no_grad():
            self._tokens = net.eval().forward_features(image).ndim == 3 and hasattr(
                net, "forward_intermediates"
            )
        parameters = dict(net.named_parameters())
        with torch.enable_grad():
            map_1Dhw = super()._probed(size)
            grads = torch.autograd.grad(map_1Dhw.sum(), list(parameters.values()), allow_unused=True)
        used = {name.split(".")[0] for name, grad in zip(parameters, grads, strict=True) if grad is not None}
        self.left_out = tuple(sorted({name.split(".")[0] for name in parameters} - used))
        for child in self.left_out:
            setattr(net, child, nn.Identity())
        net.train()
        return map_1Dhw

    def cached_weights(self) -> Path:
        """The file of timm's own weights in the Hugging Face cache.

        Raises:
            ValueError: timm has no weights for the model.
            FileNotFoundError: they are not in the cache.
        """
        from huggingface_hub import try_to_load_from_cache

        net: Any = self.net
        place = net.pretrained_cfg.get("hf_hub_id")
        if not place:
            raise ValueError(f"model.weights is 'timm', but timm has no weights for {self.name}; give a file")
        for file in ("model.safetensors", "pytorch_model.bin"):
            found = try_to_load_from_cache(place, file)
            if isinstance(found, str):
                return Path(found)
        raise FileNotFoundError(
            f"model.weights is 'timm', but {place} is not in the Hugging Face cache and nothing is downloaded in a "
            f"run; fetch it first (hf download {place}), or set HF_HOME to a folder that has it, or give a file"
        )

    def classifier_name(self) -> str:
        """What timm calls the last linear layer, such as "head.fc"."""
        net: Any = self.net
        name = net.pretrained_cfg.get("classifier") or "fc"
        return name if isinstance(name, str) else str(name[0])
