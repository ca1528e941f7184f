"""What is done to each sample: crop window, flip, corruption kind and severity, noise key.

The host plans, the device executes. Every choice is a pure function of (seed, epoch, sample id); the
bag law also uses the sample's position in the stream, which (seed, epoch, sample id) determine.
Only +, -, *, / and square roots are used on floats: numpy's exp and log differ in the last bit
between SIMD levels, and a last bit can move a crop by a pixel.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from decimal import Decimal

import numpy as np
import numpy.typing as npt

from pipeline.config import PipelineConfig
from pipeline.corruptions import kind_id
from pipeline.philox import I64, U64, Purpose, as_u64, below, draw, unit

F64 = npt.NDArray[np.float64]
I32 = npt.NDArray[np.int32]

SEVERITIES = 5
IDENTITY = 0
_CROP_TRIES = 10  # as torchvision's RandomResizedCrop


@dataclass(frozen=True)
class Plan:
    """The plan of one batch of B samples.

    position_B, epoch_B, sample_B: int64; position is -1 outside the training stream.
    anchor_B2, window_B2: int32 (row, column) of the source window and its (height, width), in pixels
        of the stored image.
    size_B2: int32 (height, width) the window is resized to.
    offset_B2: int32 (row, column) of the final crop inside the resized window.
    flip_B: int32, 1 = mirrored left to right.
    kind_B, severity_B: int32; a clean sample has kind 0 (identity) and severity 0.
    key_B: uint64, the key of all noise of the sample.
    """

    position_B: I64
    epoch_B: I64
    sample_B: I64
    anchor_B2: I32
    window_B2: I32
    size_B2: I32
    offset_B2: I32
    flip_B: I32
    kind_B: I32
    severity_B: I32
    key_B: U64


def _exp(x: F64) -> F64:
    """Exponential from + - * / alone, so the same on every CPU; for |x| <= 3 within 4e-15 relative."""
    # A Taylor series in x / 8 does not cancel; three squarings lead back.
    y = np.ones_like(x)
    for n in range(16, 0, -1):
        y = 1.0 + y * (x / (8 * n))
    for _ in range(3):
        y = y * y
    return y


@functools.cache
def _log(x: float) -> float:
    return float(Decimal(x).ln())


def crop_windows(
    seed: int,
    epoch_B: I64,
    sample_B: I64,
    height_B: I64,
    width_B: I64,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[I32, I32]:
    """Return (anchor_B2, window_B2) of torchvision's RandomResizedCrop, drawn per (seed, epoch, sample).

    Ten tries of a random area and aspect ratio; the first that fits is placed uniformly, and if none
    fits the largest centred window within the ratio limits is taken.
    """
    samples = len(sample_B)
    tries = np.tile(np.arange(_CROP_TRIES), samples)
    words = draw(
        seed, np.repeat(epoch_B, _CROP_TRIES), np.repeat(sample_B, _CROP_TRIES), Purpose.CROP, tries
    ).reshape(samples, _CROP_TRIES, 4)
    u = unit(words[:, :, :2])
    area_B1 = (height_B * width_B).astype(np.float64)[:, None]
    area = area_B1 * (scale[0] + u[:, :, 0] * (scale[1] - scale[0]))
    low, high = _log(ratio[0]), _log(ratio[1])
    aspect = _exp(low + u[:, :, 1] * (high - low))
    w = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    h = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (w > 0) & (w <= width_B[:, None]) & (h > 0) & (h <= height_B[:, None])
    first = fits.argmax(axis=1)
    some = fits.any(axis=1)
    at = np.arange(samples)
    w_B, h_B = w[at, first], h[at, first]

    in_ratio = width_B / height_B
    narrow, wide = in_ratio < ratio[0], in_ratio > ratio[1]
    back_w = np.where(wide, np.rint(height_B * ratio[1]), width_B).astype(np.int64)
    back_h = np.where(narrow, np.rint(width_B / ratio[0]), height_B).astype(np.int64)
    w_B, h_B = np.where(some, w_B, back_w), np.where(some, h_B, back_h)

    place = words[at, first, 2:]
    row_B = np.where(some, below(place[:, 0], height_B - h_B + 1), (height_B - h_B) // 2)
    col_B = np.where(some, below(place[:, 1], width_B - w_B + 1), (width_B - w_B) // 2)
    return (
        np.stack([row_B, col_B], axis=1).astype(np.int32),
        np.stack([h_B, w_B], axis=1).astype(np.int32),
    )


@functools.lru_cache(maxsize=256)
def bag_cells(seed: int, bag: int, kinds: int, with_clean: bool) -> tuple[I32, I32]:
    """Return the cells of one bag in the order they are drawn: (kind index, severity), int32 of (cells,).

    Each of the 5 * (kinds [+ 1 for clean]) cells stands there exactly once. Law of the authors' code
    (get_CrpNameAndSevLevel): the kind is uniform among those with a severity left, then the severity
    is uniform among those left in it. Kind index `kinds` is clean.
    """
    columns = kinds + with_clean
    cells = columns * SEVERITIES
    words = draw(seed, 0, bag, Purpose.BAG, np.arange(cells))
    left = {kind: list(range(1, SEVERITIES + 1)) for kind in range(columns)}
    kind_C, severity_C = np.empty(cells, np.int32), np.empty(cells, np.int32)
    for i, (kind_word, severity_word) in enumerate(words[:, :2].tolist()):
        kind = list(left)[kind_word * len(left) >> 32]
        severities = left[kind]
        kind_C[i], severity_C[i] = kind, severities.pop(severity_word * len(severities) >> 32)
        if not severities:
            del left[kind]
    return kind_C, severity_C


class TrainingPlanner:
    """Plans batches of the training stream.

    Args:
        config: the run's data settings.
        seed: the run's seed.
        height_N, width_N: stored size of every sample, in pixels.
    """

    def __init__(
        self,
        config: PipelineConfig,
        seed: int,
        height_N: npt.NDArray[np.integer],
        width_N: npt.NDArray[np.integer],
    ) -> None:
        self.config = config
        self.seed = seed
        self.height_N = height_N
        self.width_N = width_N
        self._kind_ids = np.array([*(kind_id(kind) for kind in config.kinds), IDENTITY], np.int32)

    def _corruption(self, position_B: I64, epoch_B: I64, sample_B: I64) -> tuple[I32, I32]:
        """Return (kind_B, severity_B) under the configured law."""
        config, kinds = self.config, len(self.config.kinds)
        if not kinds:
            return np.zeros(len(sample_B), np.int32), np.zeros(len(sample_B), np.int32)
        if config.law == "bag":
            with_clean = not config.paired
            bag_B, cell_B = np.divmod(position_B, (kinds + with_clean) * SEVERITIES)
            index_B, severity_B = np.empty(len(sample_B), np.int32), np.empty(len(sample_B), np.int32)
            for bag in np.unique(bag_B):
                here = bag_B == bag
                kind_C, severity_C = bag_cells(self.seed, int(bag), kinds, with_clean)
                index_B[here], severity_B[here] = kind_C[cell_B[here]], severity_C[cell_B[here]]
        else:
            words = draw(self.seed, epoch_B, sample_B, Purpose.CORRUPTION)
            clean_fraction = 1 / (kinds + 1) if config.clean_fraction is None else config.clean_fraction
            clean_B = unit(words[:, 0]) < (0.0 if config.paired else clean_fraction)
            index_B = np.where(clean_B, kinds, below(words[:, 1], kinds)).astype(np.int32)
            severity_B = (1 + below(words[:, 2], SEVERITIES)).astype(np.int32)
        kind_B = self._kind_ids[index_B]
        return kind_B, np.where(kind_B == IDENTITY, 0, severity_B).astype(np.int32)

    def plan(self, position_B: I64, epoch_B: I64, sample_B: I64) -> Plan:
        """Plan the samples that stand at the given positions of the stream."""
        config = self.config
        anchor_B2, window_B2 = crop_windows(
            self.seed,
            epoch_B,
            sample_B,
            np.asarray(self.height_N[sample_B], np.int64),
            np.asarray(self.width_N[sample_B], np.int64),
            config.crop_scale,
            config.crop_ratio,
        )
        kind_B, severity_B = self._corruption(position_B, epoch_B, sample_B)
        flip_B = unit(draw(self.seed, epoch_B, sample_B, Purpose.FLIP)[:, 0]) < config.flip_probability
        return Plan(
            position_B=position_B,
            epoch_B=epoch_B,
            sample_B=sample_B,
            anchor_B2=anchor_B2,
            window_B2=window_B2,
            size_B2=np.full((len(sample_B), 2), config.image_size, np.int32),
            offset_B2=np.zeros((len(sample_B), 2), np.int32),
            flip_B=flip_B.astype(np.int32),
            kind_B=kind_B,
            severity_B=severity_B,
            key_B=as_u64(draw(self.seed, epoch_B, sample_B, Purpose.NOISE_KEY)[:, :2]),
        )


def centre_crop_plan(sample_B: I64, height_B: I64, width_B: I64, *, resize: int, size: int) -> Plan:
    """Plan torchvision's Resize(resize) + CenterCrop(size), clean, on whole images.

    The longer side becomes int(resize * long / short) and the crop starts at int(round((side - size) / 2)),
    as torchvision computes them; resize must be at least size.
    """
    samples = len(sample_B)
    whole_B2 = np.stack([height_B, width_B], axis=1).astype(np.int64)
    short_B = whole_B2.min(axis=1)
    # Integer division is int() of the exact quotient, and torchvision's is of a rounded one that is exact here.
    size_B2 = whole_B2 * resize // short_B[:, None]
    offset_B2 = np.rint((size_B2 - size) / 2).astype(np.int32)
    zeros_B = np.zeros(samples, np.int32)
    return Plan(
        position_B=np.full(samples, -1, np.int64),
        epoch_B=np.zeros(samples, np.int64),
        sample_B=sample_B,
        anchor_B2=np.zeros((samples, 2), np.int32),
        window_B2=whole_B2.astype(np.int32),
        size_B2=size_B2.astype(np.int32),
        offset_B2=offset_B2,
        flip_B=zeros_B,
        kind_B=zeros_B,
        severity_B=zeros_B,
        key_B=np.zeros(samples, np.uint64),
    )


def evaluation_keys(seed: int, sample_B: I64, kind: int, severity: int) -> U64:
    """Return the noise keys of samples in one evaluation cell: uint64 (B,), the same in every batch."""
    return as_u64(draw(seed, 0, sample_B, Purpose.EVALUATION, kind * SEVERITIES + severity)[:, :2])
