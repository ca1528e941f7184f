"""The codebook: its codes, how they start, and how many of them are in use.

Shapes: N = features, K = codes, D = feature dimension.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.codebook.quantize import Quantised, quantize
from model.codebook.search import Metric

Initialisation = Literal["data", "uniform03", "uniform_1n", "normal"]

_JITTER = 0.01  # of each dimension's standard deviation


class Codebook(nn.Module):
    """K codes of dimension D.

    With init "data" the codes are features of the first training batch. The draw depends on init_seed and on the
    number of features in the global batch alone, so it is the same on any number of ranks. A batch with fewer
    features than codes is used several times, each repetition with a little Gaussian noise (1 % of each
    dimension's standard deviation), and a warning says so.

    State: `codes` (K, D) float32 and the flag `initialised`, both saved, so that a resumed codebook is not
        drawn
    again. `usage_K` is a measurement, is not saved and is never averaged over ranks by
    DistributedDataParallel.

    Raises:
        ValueError: an init that does not exist.
    """

    initialised: Tensor

    def __init__(
        self,
        codes: int,
        dim: int,
        metric: Metric = "l2",
        init: Initialisation = "data",
        init_seed: int = 0,
        reduction: Literal["mean", "sum"] = "mean",
        memory_mib: int = 256,
    ) -> None:
        super().__init__()
        self.metric: Metric = metric
        self.reduction: Literal["mean", "sum"] = reduction
        self.memory_mib = memory_mib
        self.init_seed = init_seed
        self.codes = nn.Parameter(torch.zeros(codes, dim))
        self.register_buffer("initialised", torch.tensor(init != "data"))
        # The same flag where reading it costs no wait for the device.
        self.is_initialised = init != "data"
        self.usage_K = torch.zeros(codes, dtype=torch.int64)
        """int64, how many features chose each code in training since `reset_usage`; sum over ranks to get the
        global one. A plain tensor: a registered buffer would be overwritten by DistributedDataParallel."""
        self.register_load_state_dict_post_hook(Codebook._after_load)  # type: ignore[no-untyped-call]
        generator = None if self.codes.is_meta else torch.Generator(self.codes.device).manual_seed(init_seed)
        with torch.no_grad():
            if init == "uniform03":
                self.codes.uniform_(0, 3, generator=generator)
            elif init == "uniform_1n":
                self.codes.uniform_(-1 / codes, 1 / codes, generator=generator)
            elif init == "normal":
                self.codes.normal_(generator=generator)
            elif init != "data":
                raise ValueError(
                    f"codebook init is {init!r}; choose 'data', 'uniform03', 'uniform_1n' or 'normal'"
                )

    def forward(self, z_ND: Tensor) -> Quantised:
        """Quantise features; in training count which codes are used, and draw the codes from data if they
        wait for it.

        Raises:
            ValueError: asked for codes in evaluation before there are any.
        """
        if not self.is_initialised:
            if not self.training:
                raise ValueError(
                    "the codebook starts from data and has seen none; load a checkpoint, or run one training "
                    "step or model.initialise_codebook(images) before evaluating"
                )
            self.initialise_from(z_ND)
        result = quantize(z_ND, self.codes, self.metric, self.reduction, self.memory_mib)
        if self.training:
            with torch.no_grad():
                chosen_N = result.index_N >= 0
                self.usage_K.scatter_add_(0, result.index_N.clamp_min(0), chosen_N.long())
        return result

    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
    @torch.no_grad()
    def initialise_from(self, z_ND: Tensor, parts: int = 1) -> None:
        """Draw the codes from this rank's features and, where torch.distributed runs, those of the other ranks.

        Every rank must call it with the same number of features.

        Args:
            z_ND: this rank's features, any floating type.
            parts: how many equal micro-batches they are, in order. The global batch is taken to be the first
                micro-batch of each rank, then the second of each, and so on.

        Raises:
            ValueError: no features, features that are not finite (a code that is not could never be compared),
                or a number that does not divide into the parts.
        """
        ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        z_ND = z_ND.detach().float()
        local = z_ND.shape[0]
        available = local * ranks
        total, dim = self.codes.shape
        if local % parts:
            raise ValueError(f"{local} features do not divide into {parts} equal parts")
        if available == 0:
            raise ValueError("the codebook cannot start from a batch without features; give an image")
        exact_ND = z_ND.double()
        broken_D = (~z_ND.isfinite()).sum(0)
        moments_3D = torch.stack([exact_ND.sum(0), exact_ND.square().sum(0), broken_D])
        if ranks > 1:
            dist.all_reduce(moments_3D)
        broken = int(moments_3D[2].sum())
        if broken:
            raise ValueError(
                f"the codebook cannot start from features with {broken} values that are not finite; "
                "check the images, the trunk's weights and the precision"
            )
        generator = torch.Generator().manual_seed(self.init_seed)
        order_N = torch.randperm(available, generator=generator)
        source_K = order_N.repeat(-(-total // available))[:total].to(z_ND.device)
        size = local // parts
        part_K, owner_K = source_K // size // ranks, source_K // size % ranks
        codes_KD = z_ND[part_K * size + source_K % size] * (owner_K == rank)[:, None]
        if ranks > 1:
            dist.all_reduce(codes_KD)  # one rank's value and zeros: exact
        if total > available:
            warnings.warn(
                f"codebook of {total} codes starts from {available} features: each is used about "
                f"{total / available:.1f} times, repetitions with {_JITTER:.0%} noise; "
                "a larger first batch or fewer codes avoids this",
                stacklevel=2,
            )
            mean_D = moments_3D[0] / available
            deviation_D = (moments_3D[1] / available - mean_D.square()).clamp_min(0).sqrt().float()
            noise_KD = torch.randn(total - available, dim, generator=generator).to(z_ND.device)
            codes_KD[available:] += _JITTER * deviation_D * noise_KD
        self.codes.copy_(codes_KD)
        self.initialised.fill_(True)
        self.is_initialised = True

    def reset_usage(self) -> None:
        """Start counting anew."""
        self.usage_K.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.usage_K = fn(self.usage_K)  # moves with the module, as a buffer would
        return self

    @staticmethod
    def _after_load(module: nn.Module, incompatible_keys: Any) -> None:
        assert isinstance(module, Codebook)
        if not module.initialised.is_meta:
            module.is_initialised = bool(module.initialised)


def codes_used(usage_K: Tensor) -> Tensor:
    """How many codes were chosen at least once: int64 scalar."""
    return (usage_K > 0).sum()


def perplexity(usage_K: Tensor) -> Tensor:
    """exp of the entropy of the codes' shares: float64 scalar in [1, K], K for even use; 1 if nothing was
    counted."""
    share_K = usage_K.double() / usage_K.sum().clamp_min(1)
    entropy: Tensor = torch.special.entr(share_K).sum()
    return entropy.exp()
