"""Vector-quantisation codebook: exact search, straight-through quantisation, deterministic gradients."""

from model.codebook.codebook import Codebook, codes_used, perplexity
from model.codebook.quantize import Quantised, quantize
from model.codebook.search import nearest_code
from model.codebook.segment_sum import segment_sum, segment_sum_dense

__all__ = [
    "Codebook",
    "Quantised",
    "codes_used",
    "nearest_code",
    "perplexity",
    "quantize",
    "segment_sum",
    "segment_sum_dense",
]
