"""VQSA: a residual trunk, a vector-quantisation codebook and two-token self-attention."""

from model.config import ModelConfig
from model.load import load
from model.vqsa import VQSA, Features, Losses, build

__all__ = ["VQSA", "Features", "Losses", "ModelConfig", "build", "load"]
