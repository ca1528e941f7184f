"""Grad-CAM against the usual library, and its pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from model import ModelConfig, build
from model.grad_cam import grad_cam
from pipeline.config import PipelineConfig
from pipeline.normalise import normalise
from tools.predict import overlay, pixels


def _net(**choices: Any) -> Any:
    torch.manual_seed(0)
    net = build(ModelConfig(trunk="resnet10", codes=20, **choices), 4)
    images = torch.randn(3, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    net.initialise_codebook(images)
    with torch.no_grad():  # far from its start, so that the classes differ in what speaks for them
        net.head.fc.weight.mul_(30)
    return net.eval(), images


@pytest.mark.filterwarnings("ignore:codebook of")
@pytest.mark.parametrize("choices", [{}, {"quantise": "pooled"}, {"quantise": "none", "attention": False}])
def test_equals_pytorch_grad_cam(choices: dict[str, Any]) -> None:
    library = pytest.importorskip(
        "pytorch_grad_cam", reason="grad-cam is not installed: pip install grad-cam"
    )
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    net, images = _net(**choices)
    heat_Bhw = grad_cam(net, images, torch.tensor([2, 0, 3]))
    assert heat_Bhw.shape == (3, 3, 3)
    assert all(parameter.grad is None for parameter in net.parameters())
    with library.GradCAM(model=net, target_layers=[net.trunk]) as cam:
        activations = cam(images, targets=[ClassifierOutputTarget(i) for i in (2, 0, 3)])
        raw = torch.from_numpy(np.maximum(cam.get_cam_image(
            images, net.trunk, None, cam.activations_and_grads.activations[0].numpy(),
            cam.activations_and_grads.gradients[0].numpy()), 0))  # fmt: skip
    assert activations.shape == (3, 96, 96)
    raw -= raw.amin((1, 2), keepdim=True)
    expected_Bhw = raw / raw.amax((1, 2), keepdim=True).clamp_min(1e-30)
    torch.testing.assert_close(heat_Bhw, expected_Bhw.float(), rtol=1e-4, atol=1e-5)


def test_asks_about_the_most_likely_class_and_is_zero_where_nothing_speaks() -> None:
    net, images = _net()
    likely = net(images).argmax(1)
    with torch.no_grad():
        assert torch.equal(grad_cam(net, images), grad_cam(net, images, likely))
        net.head.fc.weight.zero_()
        assert not grad_cam(net, images).any()


def test_overlay_shows_the_image_and_the_heat() -> None:
    config = PipelineConfig(image_size=64, constants="imagenet")
    image_u8 = torch.randint(0, 256, (1, 64, 64, 3), dtype=torch.uint8)
    back_HWC = pixels(normalise(image_u8, config), config)
    torch.testing.assert_close(back_HWC, image_u8[0] / 255, atol=1e-5, rtol=0)
    cold = np.asarray(overlay(back_HWC, torch.zeros(2, 2)), np.float64)
    warm = np.asarray(overlay(back_HWC, torch.tensor([[1.0, 0], [0, 0]])), np.float64)
    assert np.abs(cold - (image_u8[0].numpy() / 2)).max() <= 3  # inferno starts at (0, 0, 4)
    assert (warm - cold)[:8, :8].mean() > 50
    assert np.abs(warm - cold)[56:, 56:].max() == 0
