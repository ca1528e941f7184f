"""Grad-CAM: which places of an image speak for a class (Selvaraju et al., arXiv:1610.02391).

Shapes: B = images, D = feature dimension, h, w = feature map size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.vqsa import VQSA, Features


def grad_cam(net: VQSA, images: Tensor, class_index: Tensor | None = None) -> Tensor:
    """Return a heat map per image over the trunk's map: relu(Σ_d mean(∂logit/∂map_d) · map_d).

    The gradient goes through the codes straight to the features they stand for, as in training.

    Args:
        net: in evaluation mode; its parameters' gradients are left as they are.
        images: (B, 3, H, W), normalised.
        class_index: int64 (B,), the class asked about; the most likely one by default.

    Returns:
        heat (B, h, w) float32 in 0–1: least 0 and most 1 per image; all 0 where nothing speaks for the class.
    """
    with torch.enable_grad():
        found = net(images, return_features=True)
        assert isinstance(found, Features)
        if class_index is None:
            class_index = found.logits.argmax(1)
        score = found.logits.gather(1, class_index[:, None]).sum()
        (gradient_BDhw,) = torch.autograd.grad(score, found.map)
    weight_BD11 = gradient_BDhw.float().mean((2, 3), keepdim=True)
    heat_Bhw = (weight_BD11 * found.map.detach().float()).sum(1).relu()
    heat_Bhw = heat_Bhw - heat_Bhw.amin((1, 2), keepdim=True)
    return heat_Bhw / heat_Bhw.amax((1, 2), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
