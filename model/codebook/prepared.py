"""A codebook as the kernels want it, kept for as long as its codes stay the same.

Shapes: K = codes, D = feature dimension, T = codes that changed.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from model.codebook.kernels import kernels_for

Metric = Literal["l2", "cosine"]


class PreparedCodebook:
    """Float16 copy (2·K·D bytes) and constants of a codebook, for several searches with the same codes.

    Without one, each search prepares the codebook first, which reads it twice. Where there are no kernels for
    the codes' device it holds nothing and is ignored.

    A search refuses one whose codes have been written to since, as far as torch counts writes (not those to
    `codes.data`, nor those of a CUDA graph; then `refresh` is yours to call).

    Args:
        codes_KD: the codebook, contiguous; it is remembered, not copied.
        metric: of the searches to come.
    """

    def __init__(self, codes_KD: Tensor, metric: Metric = "l2") -> None:
        if codes_KD.ndim != 2 or not codes_KD.is_contiguous():
            raise ValueError(
                f"PreparedCodebook needs contiguous codes (K, D), got {tuple(codes_KD.shape)} "
                f"with strides {codes_KD.stride()}; call contiguous() and keep the result"
            )
        self.codes_KD = codes_KD
        self.metric = metric
        self._version = -1
        self._buffer: Tensor | None = None
        self.refresh()

    @torch.no_grad()
    def refresh(self, changed_T: Tensor | None = None) -> None:
        """Take over changes of the codes.

        Args:
            changed_T: int64, distinct numbers of the codes that changed (such as `segment_sum` returns); only
                they are read and written. None: all, and the centre is found anew.
        """
        codes_KD = self.codes_KD.detach()
        kernels = kernels_for(codes_KD, "auto")
        if kernels is not None:
            self._buffer = kernels.prepare(codes_KD, self.metric == "cosine", self._buffer, changed_T)
        self._version = self.codes_KD._version

    def buffer_for(self, codes_KD: Tensor, metric: str) -> Tensor | None:
        """The buffer, if it is of these codes as they are now.

        Raises:
            ValueError: it is of another codebook or metric, or the codes were written to.
        """
        own_KD = self.codes_KD
        if codes_KD is not own_KD and (
            codes_KD.data_ptr() != own_KD.data_ptr()
            or codes_KD.shape != own_KD.shape
            or codes_KD.dtype != own_KD.dtype
            or not codes_KD.is_contiguous()
        ):
            raise ValueError(
                f"the prepared codebook is of other codes ({tuple(own_KD.shape)} {own_KD.dtype}) than the search "
                f"({tuple(codes_KD.shape)} {codes_KD.dtype}); make a PreparedCodebook of these"
            )
        if metric != self.metric:
            raise ValueError(
                f"the codebook was prepared for {self.metric!r}, the search is by {metric!r}; prepare one for each"
            )
        if own_KD._version != self._version:
            raise ValueError("the codes were written to since they were prepared; call refresh() first")
        return self._buffer
