"""What may happen to codes beside gradients: moving average, revival of unused codes, the running centre.

All of it is computed over the global batch and is the same on any number of ranks.

Shapes: N = features of this rank, K = codes, D = feature dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.codebook.global_batch import GlobalBatch
from model.codebook.quantize import usage_of

_CENTRE_RATE = 0.01  # share of the newest batch in the running centre, once 100 batches were seen


class Upkeep(nn.Module):
    """State and rules of a codebook's upkeep; what is off has no state.

    Args:
        codes, dim: K, D.
        ema: decay of the moving average, 0 for none (then the codes learn by gradient).
        ema_epsilon: Laplace smoothing of the moving counts, in features.
        revive_after: every so many steps the codes that no feature chose since are replaced; 0 for never.
        centre: keep a running mean of the features.
        seed: of the features that replace codes.

    State: `steps`; `ema_count_K` and `ema_sum_KD` with `ema`; `recent_K` with `revive_after`; `centre_D` with
        `centre`. All saved.
    """

    steps: Tensor
    ema_count_K: Tensor
    ema_sum_KD: Tensor
    recent_K: Tensor
    centre_D: Tensor

    def __init__(
        self,
        codes: int,
        dim: int,
        *,
        ema: float,
        ema_epsilon: float,
        revive_after: int,
        centre: bool,
        seed: int,
    ) -> None:
        super().__init__()
        self.ema, self.ema_epsilon = ema, ema_epsilon
        self.revive_after = revive_after
        self.centre = centre
        self.seed = seed
        self.step = 0
        """The number of updates done, where reading it costs no wait for the device."""
        self.revived = 0
        """Codes replaced since the count was last set to 0; the same on every rank, not saved."""
        self.register_buffer("steps", torch.tensor(0))
        if ema:
            self.register_buffer("ema_count_K", torch.zeros(codes))
            self.register_buffer("ema_sum_KD", torch.zeros(codes, dim))
        if revive_after:
            self.register_buffer("recent_K", torch.zeros(codes, dtype=torch.int64))
        if centre:
            self.register_buffer("centre_D", torch.zeros(dim))
        self.register_load_state_dict_post_hook(Upkeep._after_load)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def restart(self, codes_KD: Tensor, mean_D: Tensor | None = None) -> None:
        """Begin with new codes: in the moving average each weighs as much as one feature."""
        if self.ema:
            self.ema_count_K.fill_(1)
            self.ema_sum_KD.copy_(codes_KD)
        if self.centre and mean_D is not None:
            self.centre_D.copy_(mean_D)

    @torch.no_grad()
    def update(
        self, codes_KD: Tensor, batch: GlobalBatch, index_N: Tensor, usage_K: Tensor | None = None
    ) -> None:
        """Take in a global batch; changes codes_KD in place.

        Args:
            codes_KD: the codes.
            batch: what was quantised in one optimiser step.
            index_N: int64, the code of each feature of this rank; −1 for none.
            usage_K: int64, how many features of this rank have each code, if it is at hand.
        """
        total = len(codes_KD)
        self.step += 1
        self.steps.fill_(self.step)
        if self.ema or self.revive_after:
            count_K = batch.reduced(usage_of(index_N, total) if usage_K is None else usage_K.clone())
        if self.ema:
            sum_KD = batch.sums(index_N, total)
            self.ema_count_K.mul_(self.ema).add_((1 - self.ema) * count_K)
            self.ema_sum_KD.mul_(self.ema).add_((1 - self.ema) * sum_KD.float())
            codes_KD.copy_(self.ema_sum_KD / self._smoothed()[:, None])
        if self.centre:
            # A plain average of the first batches, then an exponential one.
            rate = max(1 / self.step, _CENTRE_RATE)
            self.centre_D.add_(rate * (batch.mean().float() - self.centre_D))
        if self.revive_after:
            self.recent_K.add_(count_K)
            if self.step % self.revive_after == 0:
                self._revive(codes_KD, batch)
                self.recent_K.zero_()

    def _smoothed(self) -> Tensor:
        """Moving counts with Laplace smoothing, which keeps their sum and lets none of them be zero."""
        total = self.ema_count_K.sum(dtype=torch.float64).float()
        return (
            (self.ema_count_K + self.ema_epsilon) / (total + len(self.ema_count_K) * self.ema_epsilon) * total
        )

    def _revive(self, codes_KD: Tensor, batch: GlobalBatch) -> None:
        """Replace unused codes by features of the batch, drawn without replacement; where there are fewer
        features than such codes, the last codes wait for the next time. Waits for the device."""
        unused_M = (self.recent_K == 0).nonzero()[:, 0]
        generator = torch.Generator().manual_seed((self.seed << 32) + self.step)
        order_G = torch.randperm(batch.total, generator=generator).to(codes_KD.device)
        order_G = order_G[batch.ordered(batch.finite_N)[order_G]][: len(unused_M)]
        if len(order_G) == 0:
            return
        unused_M = unused_M[: len(order_G)]
        feature_MD = batch.rows(order_G)
        codes_KD[unused_M] = feature_MD
        if self.ema:
            self.ema_count_K[unused_M] = 1
            self.ema_sum_KD[unused_M] = feature_MD
        self.revived += len(unused_M)

    @staticmethod
    def _after_load(module: nn.Module, _: object) -> None:
        assert isinstance(module, Upkeep)
        if not module.steps.is_meta:
            module.step = int(module.steps)
