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
from shards import Records

# Order of what the source hands to the graph: where the encoded bytes lie, then one array per planned quantity.
_GEOMETRY = [(types.INT64, 1), (types.INT32, 1), (types.INT32, 1), (types.FLOAT, 1)]
EVALUATION_INPUTS = [*_GEOMETRY, (types.INT32, 1)]
TRAINING_INPUTS = [*_GEOMETRY, (types.INT32, 0), (types.INT32, 0), (types.INT32, 0), (types.INT64, 0)]

fn: Any = dali_fn  # its functions are made at run time; ours is added when the operator is loaded


def feed(records: Records, plan: Plan, *, training: bool) -> tuple[Any, ...]:
    """Return what the graph's source must hand over for one planned batch."""
    geometry = (records.span, plan.anchor_B2, plan.window_B2, plan.size_B2.astype(np.float32))
    if not training:
        return (*geometry, plan.offset_B2)
    # The operator's key is INT64 (DALI has no unsigned 64-bit argument): the same bits.
    return (*geometry, plan.flip_B, plan.kind_B, plan.severity_B, plan.key_B.view(np.int64))


def decode(config: PipelineConfig, span: Any, anchor: Any, window: Any, device: str) -> Any:
    """Decode a window of each image: uint8 (h, w, 3); `dali_operator.load` must have been called.

    The encoded bytes are read where `span` says that they lie (`Records.span`): a list of arrays would cost Python
    some 5 us for each of them.
    """
    options: dict[str, Any] = {}
    if device == "gpu":
        # Two decoders with slightly different output share a batch unless the hardware one is off;
        # libjpeg's chroma interpolation keeps the GPU close to the CPU.
        exact = config.decode == "exact"
        options = {"hw_decoder_load": 0.0 if exact else 0.65, "jpeg_fancy_upsampling": exact}
    return fn.decoders.image_slice(
        fn.vqsa.records(span),
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


def resize(image: Any, size: Any, *, cubic: bool = False) -> Any:
    """Resize to (height, width), antialiased as Pillow does."""
    interpolation = types.INTERP_CUBIC if cubic else types.INTERP_LINEAR
    return fn.resize(image, size=size, interp_type=interpolation, antialias=True)


def corrupt(config: PipelineConfig, image: Any, kind: Any, severity: Any, key: Any) -> Any:
    """Corrupt each image as planned; `dali_operator.load` must have been called."""
    return fn.vqsa.corrupt(
        image, kind=kind, severity=severity, key=key, flavour=config.flavour, constants=config.constants
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
        training: float32 (B, size, size, 3) normalised [and, in paired mode, the same of the clean crop]; with
            AugMix uint8.
        otherwise: uint8 (B, size, size, 3).
    """
    device = device or ("cpu" if device_id is None else "gpu")
    dali_operator.load()
    dtypes, ndims = (
        list(column) for column in zip(*(TRAINING_INPUTS if training else EVALUATION_INPUTS), strict=True)
    )
    graph = Pipeline(
        batch_size=batch,
        num_threads=config.threads,
        device_id=device_id,
        prefetch_queue_depth=config.prefetch,
    )
    with graph:
        # Copies: of arrays so small they cost DALI a third of what sharing them sample by sample does.
        span, anchor, window, size, *rest = fn.external_source(
            source=source, num_outputs=len(dtypes), batch=True, no_copy=False, dtype=dtypes, ndim=ndims
        )
        image = decode(config, span, anchor, window, device)
        image = resize(image, size, cubic=not training and config.eval_interpolation == "bicubic")
        if not training:
            (offset,) = rest
            side = [config.image_size] * 2
            graph.set_outputs(fn.slice(image, start=offset, shape=side, axes=(0, 1)))
            return graph
        flip, kind, severity, key = rest
        clean = fn.flip(image, horizontal=flip)
        corrupted = corrupt(config, clean, kind, severity, key)
        if config.augmix:  # works on grey levels, after the graph
            graph.set_outputs(corrupted)
            return graph
        views = [corrupted, clean] if config.paired else [corrupted]
        graph.set_outputs(*(normalise(config, view) for view in views))
    return graph


def normalise(config: PipelineConfig, image: Any) -> Any:
    """Return float32 HWC: (x / 255 - mean) / std per channel."""
    return fn.crop_mirror_normalize(
        image,
        dtype=types.FLOAT,
        output_layout="HWC",  # channels last in memory, as the model wants it
        mean=[255 * m for m in config.mean],
        std=[255 * s for s in config.std],
    )
