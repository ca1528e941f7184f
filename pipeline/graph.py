"""The DALI graph: decode the window, resize, crop, flip, corrupt, normalise. One definition for CPU and GPU.

The graph is straight-line and holds no randomness of its own: everything that varies per sample
comes in from the plan. It is given no epochs, no StopIteration and no reset.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from nvidia.dali import Pipeline, types
from nvidia.dali import fn as dali_fn

from pipeline.config import PipelineConfig
from pipeline.corruptions import dali_operator
from pipeline.plan import Plan

# Order of what the source hands to the graph: encoded bytes, then one array per planned quantity.
_GEOMETRY = [(types.UINT8, 1), (types.INT32, 1), (types.INT32, 1), (types.FLOAT, 1)]
_EVALUATION = [*_GEOMETRY, (types.INT32, 1)]
_TRAINING = [*_GEOMETRY, (types.INT32, 0), (types.INT32, 0), (types.INT32, 0), (types.INT64, 0)]

fn: Any = dali_fn  # its functions are made at run time; ours is added when the operator is loaded

PREFETCH = 2  # batches DALI works on ahead of the consumer


def feed(data: list[np.ndarray[Any, np.dtype[np.uint8]]], plan: Plan, *, training: bool) -> tuple[Any, ...]:
    """Return what the graph's source must hand over for one planned batch."""
    geometry = (data, plan.anchor_B2, plan.window_B2, plan.size_B2.astype(np.float32))
    if not training:
        return (*geometry, plan.offset_B2)
    # The operator's key is INT64 (DALI has no unsigned 64-bit argument): the same bits.
    return (*geometry, plan.flip_B, plan.kind_B, plan.severity_B, plan.key_B.view(np.int64))


def _decode(config: PipelineConfig, jpeg: Any, anchor: Any, window: Any, device: str) -> Any:
    options: dict[str, Any] = {}
    if device == "gpu":
        # Two decoders with slightly different output share a batch unless the hardware one is off;
        # libjpeg's chroma interpolation keeps the GPU close to the CPU.
        exact = config.decode == "exact"
        options = {"hw_decoder_load": 0.0 if exact else 0.65, "jpeg_fancy_upsampling": exact}
    return fn.decoders.image_slice(
        jpeg,
        anchor,
        window,
        axes=(0, 1),
        normalized_anchor=False,
        normalized_shape=False,
        # Windows are planned from stored sizes, and torchvision does not turn images either.
        adjust_orientation=False,
        device="mixed" if device == "gpu" else "cpu",
        **options,
    )


def define(
    config: PipelineConfig,
    source: Callable[[], tuple[Any, ...]],
    *,
    batch: int,
    device_id: int | None,
    training: bool,
    device: str | None = None,
) -> Pipeline:
    """Return the unbuilt graph.

    Args:
        config: the run's data settings.
        source: called once per batch; returns what `feed` returns.
        batch: largest number of samples in a batch.
        device_id: CUDA device, or None for the CPU graph.
        training: corrupt and normalise; otherwise the outputs are the uint8 crops.
        device: "cpu" or "gpu"; only for constructing a GPU graph where there is no GPU.

    Outputs:
        training: float32 (B, size, size, 3) normalised [and, in paired mode, the same of the clean crop].
        otherwise: uint8 (B, size, size, 3).
    """
    device = device or ("cpu" if device_id is None else "gpu")
    if training:
        dali_operator.load()
    dtypes, ndims = (list(column) for column in zip(*(_TRAINING if training else _EVALUATION), strict=True))
    graph = Pipeline(
        batch_size=batch, num_threads=config.threads, device_id=device_id, prefetch_queue_depth=PREFETCH
    )
    with graph:
        jpeg, anchor, window, size, *rest = fn.external_source(
            source=source, num_outputs=len(dtypes), batch=True, no_copy=True, dtype=dtypes, ndim=ndims
        )
        image = _decode(config, jpeg, anchor, window, device)
        cubic = not training and config.eval_interpolation == "bicubic"
        interpolation = types.INTERP_CUBIC if cubic else types.INTERP_LINEAR
        image = fn.resize(image, size=size, interp_type=interpolation, antialias=True)
        if not training:
            (offset,) = rest
            side = [config.image_size] * 2
            graph.set_outputs(fn.slice(image, start=offset, shape=side, axes=(0, 1)))
            return graph
        flip, kind, severity, key = rest
        clean = fn.flip(image, horizontal=flip)
        corrupted = fn.vqsa.corrupt(
            clean, kind=kind, severity=severity, key=key, flavour=config.flavour, constants=config.constants
        )
        views = [corrupted, clean] if config.paired else [corrupted]
        graph.set_outputs(*(_normalise(config, view) for view in views))
    return graph


def _normalise(config: PipelineConfig, image: Any) -> Any:
    return fn.crop_mirror_normalize(
        image,
        dtype=types.FLOAT,
        output_layout="HWC",  # channels last in memory, as the model wants it
        mean=[255 * m for m in config.mean],
        std=[255 * s for s in config.std],
    )
