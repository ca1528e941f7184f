"""The exponential moving average of the weights, which is what is evaluated and exported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Averages of all floating-point parameters and buffers of a model.

    After step t (from 1) average += (1 - d) (value - average) with d = min(decay, (1 + t) / (10 + t)), so that the
    random start is forgotten. Codes that start from data join with the first step.

    Args:
        net: the model itself, without a wrapper.
        decay: d once the run is long.
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        self._net = net
        self._decay = decay
        self._average = {name: value.detach().clone() for name, value in self._values().items()}

    def _values(self) -> dict[str, Tensor]:
        # Read afresh every time: loading or moving a model may replace its tensors.
        return {name: value for name, value in self._net.state_dict().items() if value.is_floating_point()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimiser step `step` (from 1); without waiting for the device."""
        values = self._values()
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self._average.values()), [values[n] for n in self._average], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the model have the averages inside the `with`, and its own values again after it."""
        own = {name: value.detach().clone() for name, value in self._values().items()}
        self._copy_in(self._average)
        try:
            yield
        finally:
            self._copy_in(own)

    @torch.no_grad()
    def _copy_in(self, source: Mapping[str, Tensor]) -> None:
        for name, value in self._values().items():
            value.copy_(source[name])

    def model_state(self) -> dict[str, Tensor]:
        """Return the averaged model: the averages, and the model's own values of what is not floating point."""
        return {**self._net.state_dict(), **self._average}

    @torch.no_grad()
    def load_model_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from an averaged model."""
        for name, average in self._average.items():
            average.copy_(state[name])
