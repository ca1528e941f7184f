"""AlexNet's errors on ImageNet-C: what mCE is normalised by.

Mean top-1 error over the five severities. Source: hendrycks/robustness, README of 2019-10-10 (commit
76d9393); the 15 averages also stand in google-research/augmix. They belong to ImageNet's 1,000 classes
at 224 px: on other data the quotient is a scale, not a comparison.
"""

from __future__ import annotations

ALEXNET_ERROR = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
    "speckle_noise": 0.845388,
    "gaussian_blur": 0.787108,
    "spatter": 0.717512,
    "saturate": 0.658248,
}

ALEXNET_CLEAN_ERROR = 0.43478
"""Top-1 error of torchvision's AlexNet on ImageNet's validation images (accuracy 56.522 %), for relative mCE."""
