"""Whether a recipe fits in memory, and the largest batch that does.

On a GPU by trying; on a CPU, where a process that asks for too much is killed without a word, by an estimate
made from a pass over two and over four images: what autograd keeps for each image, beside weights, gradients and
the optimiser's state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from nvidia.dali import backend
from torch import Tensor

import model
from tools.runtime.config import RunConfig
from tools.runtime.optim import autocast_dtype

# Allowance for what the backward pass and oneDNN's scratch need on top of what is kept.
_WORKSPACE = 1.3
_GIB = 2**30
# What DALI says when it runs out: a plain RuntimeError, whose words alone tell.
_DALI_SAYS = ("out of memory", "CUDA allocation failed", "cudaErrorMemoryAllocation", "std::bad_alloc")


@dataclass(frozen=True)
class Need:
    """Bytes of one process: `fixed` whatever the batch, `per_image` for each image of it."""

    fixed: int
    per_image: int

    def bytes(self, batch: int) -> int:
        """Return the need at a batch size."""
        return self.fixed + batch * self.per_image

    def largest(self, limit: int) -> int:
        """Return the largest batch that fits in `limit` bytes; 0 if none does."""
        return max(0, (limit - self.fixed) // self.per_image)


def _kept(config: RunConfig, classes: int, images: int) -> tuple[int, int]:
    """Return (bytes kept for the backward pass of `images` images, bytes of the weights)."""
    net = model.build(config.model.model_copy(update={"weights": "", "init": "normal"}), classes)
    net.to(memory_format=torch.channels_last).train()
    weights = {p.data_ptr() for p in net.parameters()}
    seen: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return x

    side = config.pipeline.image_size
    pictures = torch.randn(images, 3, side, side).to(memory_format=torch.channels_last)
    dtype = autocast_dtype(config.precision)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
        torch.autocast("cpu", dtype, enabled=dtype is not None),
    ):
        output = net(pictures, torch.zeros(images, dtype=torch.int64))
    kept = sum(seen.values())
    del output
    return kept, sum(p.numel() * p.element_size() for p in net.parameters())


def estimate(config: RunConfig, classes: int) -> Need:
    """Return what training on a CPU needs."""
    (two, weights), (four, _) = _kept(config, classes, 2), _kept(config, classes, 4)
    activations = max(1, (four - two) // 2)
    side = config.pipeline.image_size
    views = 2 if config.pipeline.paired else 1
    # The loader holds float images of the batch in use and of those DALI works on ahead.
    loaded = 4 * 3 * side * side * views * 4
    states = {"sgd": 1}.get(config.optim.name, 2)
    fixed = weights * (2 + states) + max(0, two - 2 * activations)
    per_image = int(activations * views * _WORKSPACE) + loaded
    if config.model.quantise != "none":
        fixed += config.model.search_memory_mib * 2**20
    return Need(fixed, per_image)


def ran_out(error: BaseException) -> bool:
    """Return whether an error of torch, DALI or Python says that memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _DALI_SAYS)


def release() -> None:
    """Give the GPU memory that torch and DALI keep for later back; nothing without a GPU."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        backend.ReleaseUnusedMemory()  # type: ignore[attr-defined]


def fits(step: Callable[[], object], agree: Callable[[int], int]) -> bool:
    """Try a step; returns whether memory was enough for it on every process. Called on all of them.

    Args:
        step: waits for no other process: one that ran out of memory would be waited for in vain.
        agree: returns the largest number that any process has.
    """
    try:
        step()
        short = False
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        short = True
    # Only now does nothing of the failed step hold memory any more.
    release()
    return not agree(int(short))


def largest_fitting(fits: Callable[[int], bool], wanted: int, known: int = 0) -> int:
    """Return the largest batch up to `wanted` that fits, by bisection; `known`, which does, if no larger one does."""
    if fits(wanted):
        return wanted
    low, high = known, wanted
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def unit(config: RunConfig) -> int:
    """Return what a batch is a multiple of: where neighbours are mixed, an odd number of images is refused."""
    return 2 if config.pipeline.mixup or config.pipeline.cutmix else 1


def refuse(config: RunConfig, ranks: int, batch: int, largest: int, what: str) -> ValueError:
    """Return the error that says the batch does not fit and which does."""
    step = unit(config)
    largest -= largest % step
    said = f"a batch of {batch} images per process does not fit in memory ({what})"
    if largest < 1:
        least = "one image does" if step == 1 else "two images do (mixup and cutmix need an even number)"
        return ValueError(f"{said}, and not even {least}; choose a smaller model or image size")
    said += f"; the largest that does is {largest}"
    whole = config.pipeline.batch_global // ranks
    divides = max((size for size in range(step, largest + 1, step) if whole % size == 0), default=0)
    if not divides:
        return ValueError(
            f"{said}. mixup and cutmix need an even number, and the {whole} images per process of the global batch "
            f"of {config.pipeline.batch_global} are odd: choose another pipeline.batch_global"
        )
    return ValueError(
        f"{said}. Say --pipeline.batch-per-gpu {divides}: {whole // divides} of them make up the global batch of "
        f"{config.pipeline.batch_global} by gradient accumulation"
    )


def check_cpu(config: RunConfig, classes: int, ranks: int, batch: int, available: int) -> None:
    """Raise ValueError if the batch does not fit in `available` bytes of this machine, shared by all ranks."""
    need = estimate(config, classes)
    limit = available // ranks
    if need.bytes(batch) > limit:
        what = f"about {need.bytes(batch) / _GIB:.1f} GiB needed, {limit / _GIB:.1f} GiB there"
        raise refuse(config, ranks, batch, need.largest(limit), what)


def check_gpu(
    config: RunConfig, ranks: int, batch: int, step: Callable[[int], object], agree: Callable[[int], int]
) -> None:
    """Raise ValueError, on all processes, if a training step of the batch runs out of GPU memory on any.

    Args:
        batch: a multiple of the recipe's `unit`, as the loader demands.
        step: makes one training step on synthetic images of the given number; waits for no other process.
        agree: returns the largest number that any process has.
    """
    size = unit(config)
    largest = size * largest_fitting(lambda units: fits(lambda: step(units * size), agree), batch // size)
    if largest < batch:
        raise refuse(config, ranks, batch, largest, "the GPU ran out of it in a training step")
