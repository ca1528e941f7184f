"""k-means of a global batch: the same centres, to the last bit, on any number of ranks.

Shapes: N = features of this rank, K = codes, D = feature dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.codebook.global_batch import GlobalBatch
from model.codebook.quantize import about
from model.codebook.search import nearest_code
from model.config import Metric


def kmeans(
    batch: GlobalBatch,
    start_KD: Tensor,
    iterations: int,
    metric: Metric = "l2",
    centre_D: Tensor | None = None,
    memory_mib: int = 256,
) -> Tensor:
    """Lloyd's algorithm from the given centres.

    Args:
        batch: finite features.
        start_KD: first centres, float32.
        iterations: most rounds; fewer if a round moves no centre.
        metric: assigns each feature to its nearest centre; a centre is the mean of the raw features assigned
            to it under either.
        centre_D: as in `quantize`.
        memory_mib: workspace of the search.

    Returns:
        centres float32 (K, D). A centre that loses all its features moves to one of the features farthest
        from their centres (of equals, to the first in the global order).
    """
    codes_KD = start_KD
    total = len(codes_KD)
    for _ in range(iterations):
        index_N, sqdist_N = nearest_code(
            *about(batch.z_ND, codes_KD, centre_D), metric, memory_mib=memory_mib
        )
        count_K = batch.counts(index_N, total)
        mean_KD = (batch.sums(index_N, total) / count_K.clamp_min(1)[:, None]).float()
        empty_M = (count_K == 0).nonzero()[:, 0]
        if len(empty_M):
            farthest = batch.ordered(sqdist_N).sort(descending=True, stable=True).indices[: len(empty_M)]
            mean_KD[empty_M[: len(farthest)]] = batch.rows(farthest)
        if torch.equal(mean_KD, codes_KD):
            break
        codes_KD = mean_KD
    return codes_KD
