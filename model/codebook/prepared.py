"""A codebook as the kernels want it, kept for as long as its codes stay the same.

Shapes: K = codes, D = feature dimension, T = codes that changed.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from model.codebook.kernels import kernels_for, stream_of

Metric = Literal["l2", "cosine"]


class PreparedCodebook:
    """Float16 copy (2·K·D bytes) and constants of a codebook, for several searches with the same codes.

    Without one, each search prepares the codebook first, which reads it twice. Where there are no kernels for
    the codes' device it holds nothing and is ignored.

    A search refuses one whose codes have been written to, or moved, or converted since, as far as that can be seen.
    Torch counts writes, but not those into `codes.data`, of fused optimisers, of torch.distributed, or of a CUDA
    graph: after them `refresh` is yours to call.

    Args:
        codes_KD: the codebook, contiguous; it is remembered, not copied.
        metric: of the searches to come.
    """

    def __init__(self, codes_KD: Tensor, metric: Metric = "l2") -> None:
        self.codes_KD = codes_KD
        self.metric = metric
        self._buffer: Tensor | None = None
        self._prepared_KD: Tensor | None = None
        self._version = -1
        self._stream: int | None = None
        self.refresh()

    @torch.no_grad()
    def refresh(self, changed_T: Tensor | None = None) -> None:
        """Take over changes of the codes.

        Args:
            changed_T: int64, numbers of the codes that changed (such as `segment_sum` returns), on their device;
                only these are read and written. A number that comes again, or is of no code, does nothing. None,
                or codes that lie elsewhere or have another type than before: all, and the centre is found anew.

        Raises:
            ValueError, TypeError: the numbers, or codes that are no longer contiguous, cannot be used.
        """
        codes_KD = self.codes_KD.detach()
        if codes_KD.ndim != 2 or not codes_KD.is_contiguous():
            raise ValueError(
                f"PreparedCodebook needs contiguous codes (K, D), got {tuple(codes_KD.shape)} "
                f"with strides {codes_KD.stride()}; call contiguous() and keep the result"
            )
        if changed_T is not None:
            changed_T = _each_once(changed_T, codes_KD)
        kernels = kernels_for(codes_KD, "auto")
        if kernels is None:
            self._buffer = None
        else:
            stream = stream_of(codes_KD)
            if not self._in_place():
                changed_T = None
            # Searches on another stream may not have read the old one yet.
            if not self._fits(codes_KD) or stream != self._stream:
                self._buffer = None
            if self._buffer is None:
                changed_T = None
            self._stream = stream
            self._buffer = kernels.prepare(codes_KD, self.metric == "cosine", self._buffer, changed_T)
        # Not only its address: memory that is held cannot become another tensor's.
        self._prepared_KD = codes_KD
        self._version = codes_KD._version

    def is_here(self) -> bool:
        """Whether the codes lie where they lay, and the current stream is the one that prepared them."""
        return self._in_place() and self._stream == stream_of(self.codes_KD)

    def was_written_to(self) -> bool:
        """Whether torch has counted a write to the codes since they were prepared."""
        return self.codes_KD._version != self._version

    def _fits(self, codes_KD: Tensor) -> bool:
        """Whether the buffer's device and size are right for these codes."""
        before_KD = self._prepared_KD
        return before_KD is not None and (before_KD.device, before_KD.shape) == (
            codes_KD.device,
            codes_KD.shape,
        )

    def _in_place(self) -> bool:
        """Whether the codes are where they were when they were prepared, and of the same type."""
        now_KD, before_KD = self.codes_KD, self._prepared_KD
        return (
            before_KD is not None
            and (now_KD.device, now_KD.dtype, now_KD.shape, now_KD.stride())
            == (before_KD.device, before_KD.dtype, before_KD.shape, before_KD.stride())
            and now_KD.data_ptr() == before_KD.data_ptr()
        )

    def buffer_for(self, codes_KD: Tensor, metric: str) -> Tensor | None:
        """The buffer, if it is of these codes as they are now.

        Raises:
            ValueError: it is of another codebook or metric, or the codes were written to, moved or converted.
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
        if not self._in_place():
            raise ValueError(
                "the codes were moved or converted since they were prepared (now "
                f"{own_KD.dtype} on {own_KD.device}); call refresh() first"
            )
        if self.was_written_to():
            raise ValueError("the codes were written to since they were prepared; call refresh() first")
        return self._buffer


def kept(before: PreparedCodebook | None, codes: Tensor, metric: Metric) -> PreparedCodebook | None:
    """What to keep from one search to the next while the codes stay the same.

    Returns:
        None where each search has to prepare the codebook itself: without kernels; while a CUDA graph is captured,
        since its replays would never prepare again; and where writes cannot be seen (tensors that stand in for the
        parameter, as those of FSDP, torch.func and DataParallel, and those of inference mode).

    Raises:
        ValueError: the codes did not stay the same.
    """
    if (
        type(codes) is not nn.Parameter
        or codes.is_inference()
        or not codes.is_contiguous()
        or kernels_for(codes, "auto") is None
        or (codes.is_cuda and torch.cuda.is_current_stream_capturing())
    ):
        return None
    if before is None:
        return PreparedCodebook(codes, metric)
    if before.codes_KD is not codes or before.was_written_to():
        raise ValueError(
            "the codes were written to or replaced inside `unchanged()`; leave it before an optimiser step, an update, "
            "a revival or loading"
        )
    if not before.is_here():
        before.refresh()
    return before


def _each_once(changed_T: Tensor, codes_KD: Tensor) -> Tensor:
    """The numbers as the kernels want them, without waiting for the device.

    Two blocks at one code would write the same bytes, but both would count it as broken. What comes again becomes
    −1, which the kernel leaves out as it does every number of no code.
    """
    if changed_T.ndim != 1 or changed_T.dtype != torch.int64:
        raise TypeError(
            f"refresh needs the numbers of the changed codes as int64 (T,), got {changed_T.dtype} "
            f"{tuple(changed_T.shape)}"
        )
    if changed_T.device != codes_KD.device:
        raise ValueError(
            f"refresh needs the numbers of the changed codes on the codes' device, {codes_KD.device}, "
            f"got them on {changed_T.device}; move them"
        )
    sorted_T = changed_T.sort().values
    again_T = sorted_T[1:] == sorted_T[:-1]
    sorted_T[1:].masked_fill_(again_T, -1)
    return sorted_T
