"""The codebook: its codes, how they start, how they are kept in use, and how many of them are.

Shapes: N = features, K = codes, D = feature dimension.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from model.codebook.global_batch import GlobalBatch
from model.codebook.kmeans import kmeans
from model.codebook.prepared import PreparedCodebook, kept
from model.codebook.quantize import Quantised, quantize, usage_of
from model.codebook.top_k import Weights, quantize_top_k
from model.codebook.upkeep import Upkeep
from model.codebook.usage import Usage
from model.config import Metric

Initialisation = Literal["data", "kmeans", "uniform03", "uniform_1n", "normal"]

_JITTER = 0.01  # of each dimension's standard deviation


_unchanged: WeakKeyDictionary[Codebook, PreparedCodebook | None] = WeakKeyDictionary()
"""Codebooks inside `unchanged`. Not an attribute: a copy made there must not take it along."""


@contextmanager
def unchanged(*nets: nn.Module) -> Iterator[None]:
    """Promise that the codes of these models stay the same, so that all forward passes inside prepare them once.

    Args:
        nets: models of any kind, wrapped or not; nothing happens to one without a Codebook.

    Inside, 2·K·D + 24·K bytes are kept per codebook, where the kernels search. Passes that are compiled or captured
    in a CUDA graph, with `centre`, or with top_k above 1 prepare by themselves as ever. A write that torch counts makes
    the next pass raise ValueError; others (see PreparedCodebook) cannot be seen and give answers for the old codes.
    """
    books = [part for net in nets for part in net.modules() if isinstance(part, Codebook)]
    opened = [book for book in dict.fromkeys(books) if book not in _unchanged]
    for book in opened:
        _unchanged[book] = None
    try:
        yield
    finally:
        for book in opened:
            del _unchanged[book]


class Codebook(nn.Module):
    """K codes of dimension D.

    With init "data" the codes are features of the first training batch, with "kmeans" the centres of its
    features. Either depends on init_seed and on the features of the global batch alone, so it is the same on any
    number of ranks. A start from fewer features than codes uses them several times, each repetition with a
    little Gaussian noise (1 % of each dimension's standard deviation), and a warning says so.

    Moving average, revival and the running centre happen in `update`, which the training loop calls once per
    optimiser step.

    Each forward pass prepares the codes for the kernels; those inside `unchanged()` do it once.

    State: `codes` (K, D) float32 and the flag `initialised`, both saved, so that a resumed codebook is not
    drawn again; `upkeep.*` where one of ema, revive_after and centre is on. `usage` is a measurement and is
    not saved.

    Args:
        codes, dim: K, D.
        metric, init, init_seed, kmeans_iterations, reduction, top_k, top_k_weights, ema, ema_epsilon,
        revive_after, centre: see ModelConfig.
        memory_mib: workspace of the search.

    Raises:
        ValueError: choices that do not exist or do not fit.
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
        *,
        kmeans_iterations: int = 10,
        top_k: int = 1,
        top_k_weights: Weights = "mean",
        ema: float = 0.0,
        ema_epsilon: float = 1e-5,
        revive_after: int = 0,
        centre: bool = False,
    ) -> None:
        super().__init__()
        if init not in ("data", "kmeans", "uniform03", "uniform_1n", "normal"):
            raise ValueError(
                f"codebook init is {init!r}; choose 'data', 'kmeans', 'uniform03', 'uniform_1n' or 'normal'"
            )
        if not 1 <= top_k <= codes:
            raise ValueError(f"codebook top_k is {top_k}; choose 1 to the number of codes, {codes}")
        if metric == "l2" and init == "uniform03":
            warnings.warn(
                "Euclidean search over codes from U(0, 3) uses few of them (47 of 1,000 on pooled ReLU "
                "features); choose init 'kmeans' or 'data', or metric 'cosine' as the authors' code does",
                stacklevel=3,
            )
        self.metric: Metric = metric
        self.init = init
        self.init_seed = init_seed
        self.kmeans_iterations = kmeans_iterations
        self.reduction: Literal["mean", "sum"] = reduction
        self.top_k = top_k
        self.top_k_weights: Weights = top_k_weights
        self.memory_mib = memory_mib
        # A codebook that follows a moving average gets no gradient and is no business of the optimiser.
        self.codes = nn.Parameter(torch.zeros(codes, dim), requires_grad=not ema)
        self.register_buffer("initialised", torch.tensor(init not in ("data", "kmeans")))
        # The same flag where reading it costs no wait for the device.
        self.is_initialised = init not in ("data", "kmeans")
        self.upkeep = (
            Upkeep(
                codes, dim, ema=ema, ema_epsilon=ema_epsilon, revive_after=revive_after, centre=centre,
                seed=init_seed,
            )
            if ema or revive_after or centre
            else None
        )  # fmt: skip
        self.usage = Usage(codes)
        """What was chosen in training since `reset_usage()`, and how far it was, on this rank."""
        self.register_load_state_dict_post_hook(Codebook._after_load)  # type: ignore[no-untyped-call]
        generator = None if self.codes.is_meta else torch.Generator(self.codes.device).manual_seed(init_seed)
        with torch.no_grad():
            if init == "uniform03":
                self.codes.uniform_(0, 3, generator=generator)
            elif init == "uniform_1n":
                self.codes.uniform_(-1 / codes, 1 / codes, generator=generator)
            elif init == "normal":
                self.codes.normal_(generator=generator)
            if self.upkeep is not None and self.is_initialised:
                self.upkeep.restart(self.codes)

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
        centre_D = self.upkeep.centre_D if self.upkeep is not None and self.upkeep.centre else None
        if self.top_k == 1:
            prepared = None
            # A traced pass must not remember what is only true now.
            if not torch.compiler.is_compiling() and centre_D is None and self in _unchanged:
                prepared = _unchanged[self] = kept(_unchanged[self], self.codes, self.metric)
            result = quantize(
                z_ND, self.codes, self.metric, self.reduction, self.memory_mib, centre_D, prepared
            )
            usage_K = result.usage_K
        else:
            result, index_Nk = quantize_top_k(
                z_ND, self.codes, self.top_k, self.top_k_weights, self.metric, self.reduction,
                self.memory_mib, centre_D,
            )  # fmt: skip
            usage_K = usage_of(index_Nk, len(self.codes))
        if self.training:
            self.usage.add(usage_K, result.sqdist_N)
        return result

    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
    @torch.no_grad()
    def initialise_from(self, z_ND: Tensor, parts: int = 1) -> None:
        """Start the codes from this rank's features and, where torch.distributed runs, those of the other ranks.

        Every rank must call it with the same number of features.

        Args:
            z_ND: this rank's features, any floating type.
            parts: how many equal micro-batches they are, in order. The global batch is taken to be the first
                micro-batch of each rank, then the second of each, and so on.

        Raises:
            ValueError: no features, features that are not finite (a code that is not could never be compared),
                or a number that does not divide into the parts.
        """
        batch = GlobalBatch(z_ND, parts)
        broken = int(batch.reduced((~batch.z_ND.isfinite()).sum()))
        if broken:
            raise ValueError(
                f"the codebook cannot start from features with {broken} values that are not finite; "
                "check the images, the trunk's weights and the precision"
            )
        codes_KD = self._drawn(batch)
        centre_D = None
        if self.upkeep is not None and self.upkeep.centre:
            centre_D = batch.mean().float()
        if self.init == "kmeans" and batch.total > len(codes_KD):
            codes_KD = kmeans(batch, codes_KD, self.kmeans_iterations, self.metric, centre_D, self.memory_mib)
        self.codes.copy_(codes_KD)
        if self.upkeep is not None:
            self.upkeep.restart(codes_KD, centre_D)
        self.initialised.fill_(True)
        self.is_initialised = True

    def _drawn(self, batch: GlobalBatch) -> Tensor:
        """Features of the batch drawn without replacement, or all of them and noisy repetitions."""
        total, dim = self.codes.shape
        generator = torch.Generator().manual_seed(self.init_seed)
        order_G = torch.randperm(batch.total, generator=generator)
        codes_KD = batch.rows(order_G.repeat(-(-total // batch.total))[:total].to(batch.z_ND.device))
        if total > batch.total:
            warnings.warn(
                f"codebook of {total} codes starts from {batch.total} features: each is used about "
                f"{total / batch.total:.1f} times, repetitions with {_JITTER:.0%} noise; "
                "more or larger first batches or fewer codes avoid this",
                stacklevel=3,
            )
            mean_D = batch.mean()
            offset = GlobalBatch((batch.z_ND.double() - mean_D).square())
            deviation_D = offset.mean().sqrt().float()
            noise_KD = torch.randn(total - batch.total, dim, generator=generator).to(codes_KD.device)
            codes_KD[batch.total :] += _JITTER * deviation_D * noise_KD
        return codes_KD

    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
    @torch.no_grad()
    def update(self, z_ND: Tensor, index_N: Tensor, parts: int = 1, usage_K: Tensor | None = None) -> None:
        """Moving average, revival and centre, after an optimiser step; nothing where none is on.

        Every rank must call it with the same number of features.

        Args:
            z_ND: this rank's features of the step, as they were quantised.
            index_N: int64, their codes; −1 for a feature that is not finite, which is left out.
            parts: as in `initialise_from`.
            usage_K: int64, how many of them have each code, if it is at hand (`Quantised.usage_K`).
        """
        if self.upkeep is not None:
            self.upkeep.update(self.codes, GlobalBatch(z_ND, parts), index_N.flatten(), usage_K)

    @property
    def usage_K(self) -> Tensor:
        """int64, how many features chose each code in training since `reset_usage`, on this rank."""
        return self.usage.usage_K

    def reset_usage(self) -> None:
        """Start counting anew."""
        self.usage.reset()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.usage.moved(fn)
        return self

    @staticmethod
    def _after_load(module: nn.Module, incompatible_keys: Any) -> None:
        assert isinstance(module, Codebook)
        if not module.initialised.is_meta:
            module.is_initialised = bool(module.initialised)
