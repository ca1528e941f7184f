"""Vector-quantisation codebook: exact search, straight-through quantisation, deterministic gradients."""

from model.codebook.codebook import Codebook, unchanged
from model.codebook.prepared import PreparedCodebook
from model.codebook.quantize import Quantised, quantize
from model.codebook.search import nearest_code
from model.codebook.segment_sum import segment_sum, segment_sum_dense
from model.codebook.top_k import nearest_codes, quantize_top_k
from model.codebook.usage import codes_used, distance_statistics, perplexity

__all__ = [
    "Codebook",
    "PreparedCodebook",
    "Quantised",
    "codes_used",
    "distance_statistics",
    "nearest_code",
    "nearest_codes",
    "perplexity",
    "quantize",
    "quantize_top_k",
    "segment_sum",
    "segment_sum_dense",
    "unchanged",
]
