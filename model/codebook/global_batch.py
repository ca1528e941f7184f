"""The features of a global batch, of which every rank holds a part: exact sums, rows and orders.

Whatever is computed here is the same bits on any number of ranks, given the same features. Sums are exact:
values are rounded to a grid so fine that float64 adds that many of them without rounding, so the order of
adding cannot matter. A grid step is at most 2⁻⁵² of the batch's largest magnitude times its size (rounded up
to powers of two): 1e-10 for 25,000 features of size 10.

Shapes: N = features of this rank, G = features of all ranks, K = codes, D = feature dimension.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from model.codebook.quantize import usage_of
from model.codebook.segment_sum import segment_sum_dense

_COLUMNS = 256  # dimensions summed at a time: bounds the float64 copies


class GlobalBatch:
    """Features of one or more global batches, spread over the ranks of torch.distributed where it runs.

    Every rank must hold the same number of features, and every method must be called on every rank. The
    global order is the first part of each rank, then the second of each, and so on.

    Args:
        z_ND: this rank's features, any floating type; taken as float32.
        parts: how many equal micro-batches they are, in order.

    Raises:
        ValueError: a number of features that does not divide into the parts, or none at all.
    """

    def __init__(self, z_ND: Tensor, parts: int = 1) -> None:
        running = dist.is_available() and dist.is_initialized()
        self.ranks, self.rank = (dist.get_world_size(), dist.get_rank()) if running else (1, 0)
        self.z_ND = z_ND.detach().float()
        count = self.z_ND.shape[0]
        if count % parts:
            raise ValueError(f"{count} features do not divide into {parts} equal parts")
        if count == 0:
            raise ValueError("the codebook can take nothing from a batch without features; give an image")
        self.size = count // parts
        self.total = count * self.ranks
        self.finite_N = self.z_ND.isfinite().all(1)

    def reduced(self, value: Tensor, how: str = "sum") -> Tensor:
        """Sum, or maximum, of a tensor over the ranks, in place."""
        if self.ranks > 1:
            dist.all_reduce(value, dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX)
        return value

    def rows(self, number_M: Tensor) -> Tensor:
        """The features with these numbers in the global order, (M, D) float32, on every rank."""
        part_M, rest_M = number_M // (self.size * self.ranks), number_M % (self.size * self.ranks)
        mine_M = rest_M // self.size == self.rank
        local_M = torch.where(mine_M, part_M * self.size + rest_M % self.size, 0)
        # One rank's value and zeros: exact.
        return self.reduced(torch.where(mine_M[:, None], self.z_ND[local_M], 0.0))

    def ordered(self, value_N: Tensor) -> Tensor:
        """A value of every feature of all ranks, in the global order: (G,)."""
        if self.ranks == 1:
            return value_N
        everyone = [torch.empty_like(value_N) for _ in range(self.ranks)]
        dist.all_gather(everyone, value_N.contiguous())
        return torch.stack([value.view(-1, self.size) for value in everyone], dim=1).flatten()

    def counts(self, index_N: Tensor, codes: int) -> Tensor:
        """How many features of all ranks have each index: int64 (K,); negative ones are left out."""
        return self.reduced(usage_of(index_N, codes))

    def sums(self, index_N: Tensor, codes: int) -> Tensor:
        """Exact sums of the features of each index over all ranks, float64 (K, D).

        Features with a negative index, or that are not finite, are left out.
        """
        index_N = torch.where(self.finite_N, index_N, -1)
        dim = self.z_ND.shape[1]
        blocks = [slice(start, start + _COLUMNS) for start in range(0, dim, _COLUMNS)]
        most = torch.stack([self._finite(columns).abs().amax() for columns in blocks]).amax()
        bits = (self.total - 1).bit_length()
        # |z| < 2^exponent, so a sum of `total` of them is below 2^(exponent + bits) = 2^52 steps.
        exponent = torch.frexp(self.reduced(most, "max"))[1] + bits - 52
        step = torch.ldexp(torch.ones_like(most, dtype=torch.float64), exponent)
        sum_KD = torch.zeros(codes, dim, dtype=torch.float64, device=most.device)
        for columns in blocks:
            in_steps_NC = (self._finite(columns).double() / step).round_()
            sum_KD[:, columns] = segment_sum_dense(in_steps_NC, index_N, codes)
        return self.reduced(sum_KD).mul_(step)

    def _finite(self, columns: slice) -> Tensor:
        """Some dimensions of the features; zero for a feature that is not finite."""
        return torch.where(self.finite_N[:, None], self.z_ND[:, columns], 0.0)

    def mean(self) -> Tensor:
        """Mean of the finite features of all ranks, float64 (D,); zero where there are none."""
        index_N = torch.zeros_like(self.finite_N, dtype=torch.int64)
        count = self.reduced(self.finite_N.sum())
        return self.sums(index_N, 1)[0] / count.clamp_min(1)
