"""The codebook's part in a run: its start from the first batches, and what is reported about it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from model.codebook import codes_used, distance_statistics, perplexity
from pipeline.loader import TrainingBatch, TrainingLoader

_MOST_BATCHES = 64


def start_codebook(
    accelerator: Accelerator,
    net: nn.Module,
    loader: TrainingLoader,
    images_of: Callable[[TrainingBatch], Tensor],
    *,
    batches: int,
    samples: int,
    waiting: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> int:
    """Start codes that wait for data from the first global batches, then rewind the loader to where it was.

    Takes more than `batches` while there are fewer features than codes, up to 64 or one pass over the data; the
    codebook warns if that is not enough. Called on every process; the codes are the same on any number of them.

    Args:
        net: the model, prepared or not.
        loader: the run's.
        images_of: what the model is given of a micro-batch.
        batches: ModelConfig.init_batches.
        samples: in one pass over the data.
        waiting: entered while the loader is waited for.

    Returns:
        The number of global batches looked at; 0 where no codes wait.

    Raises:
        ValueError: features that are not finite, with the ids of the micro-batch's samples.
    """
    inner: Any = accelerator.unwrap_model(net)
    if inner.codebook is None or inner.codebook.is_initialised:
        return 0
    before = loader.state_dict()
    parts: list[Tensor] = []
    taken = features = 0
    batch_global = loader.micros * loader.batch_per_rank * accelerator.num_processes
    most = max(batches, min(_MOST_BATCHES, samples // batch_global))
    while taken < batches or (taken < most and features < len(inner.codebook.codes)):
        for _ in range(loader.micros):
            with waiting():
                batch = next(loader)
            with accelerator.autocast():
                parts.append(inner.codebook_features(images_of(batch)))
            if not parts[-1].isfinite().all():
                raise ValueError(
                    "features are not finite before the first step, where the codebook starts from them: samples "
                    f"{batch.sample_id.tolist()}; batch normalisation spreads one bad image over its batch. Look at "
                    "the trunk's weights, the images and the precision"
                )
        taken += 1
        features = sum(len(z_ND) for z_ND in parts) * accelerator.num_processes
    inner.codebook.initialise_from(torch.cat(parts), parts=len(parts))
    loader.load_state_dict(before)
    return taken


def codebook_metrics(accelerator: Accelerator, net: nn.Module) -> dict[str, float]:
    """Return what happened to the codebook since the last call, over all processes; nothing without one.

    `codes_used_pct` and `perplexity` of the codes chosen, `codes_dead` that no feature chose, mean, standard
    deviation and maximum of the distance to the nearest code (`sqdist_…`, of normalised vectors under the
    cosine metric), and `codes_revived` where revival is on. Called on every process; waits for the device.
    """
    book = accelerator.unwrap_model(net).codebook
    if book is None:
        return {}
    usage_K = accelerator.reduce(book.usage.usage_K, "sum")
    moments_3 = accelerator.reduce(book.usage.moments_3, "sum")
    farthest = accelerator.gather(book.usage.farthest).max()
    used = int(codes_used(usage_K))
    record: dict[str, float] = {
        "codes_used_pct": 100 * used / len(usage_K),
        "perplexity": perplexity(usage_K).item(),
        "codes_dead": len(usage_K) - used,
        **distance_statistics(moments_3, farthest),
    }
    if book.upkeep is not None and book.upkeep.revive_after:
        record["codes_revived"] = book.upkeep.revived
        book.upkeep.revived = 0
    book.reset_usage()
    return record
