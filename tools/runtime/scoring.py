"""Scores a model on clean and corrupted images: each image is decoded once and corrupted for every cell."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from model.codebook import unchanged
from pipeline.config import PipelineConfig
from pipeline.corruptions import corrupt, kind_id
from pipeline.loader import EvaluationBatch
from pipeline.normalise import normalise
from pipeline.plan import evaluation_keys
from tools.runtime.results import CLEAN, SEVERITIES, Cell

CellName = tuple[str, int]


def cells_of(kinds: Sequence[str]) -> list[CellName]:
    """Return the clean cell and all severities of the kinds, in evaluation order."""
    return [(CLEAN, 0), *((kind, severity) for kind in kinds for severity in SEVERITIES)]


@torch.no_grad()
def score(
    model: nn.Module,
    batches: Iterable[EvaluationBatch],
    config: PipelineConfig,
    cells: Sequence[CellName],
    *,
    seed: int,
    flavour: str,
    device: torch.device,
    precision: torch.dtype | None = None,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Return this rank's counts per cell: int64 (cells, 3) = images, top-1 hits, top-5 hits, on the CPU.

    Args:
        model: gives logits (B, classes) for normalised images (B, 3, S, S); put in eval mode here.
        batches: the rank's share of the samples, an EvaluationLoader for one; damaged ones are left out of the
            counts.
        cells: (corruption, severity) pairs; ("clean", 0) is the clean image.
        seed: of the corruptions' noise; a sample gets the same noise in any batch and on any rank.
        flavour: reference the corruptions follow, "hendrycks" for ImageNet-C's own.
        precision: autocast type, or None for float32.
        progress: called with the number of images scored, cell by cell.
    """
    model.eval()
    counts_N3 = torch.zeros((len(cells), 3), dtype=torch.int64, device=device)
    with unchanged(model):
        for batch in batches:
            images_u8 = batch.images_u8.to(device, non_blocking=True)
            labels_B = batch.labels.to(device, non_blocking=True)
            sound_B = (~batch.damaged).to(device, non_blocking=True)
            for i, (kind, severity) in enumerate(cells):
                pixels_u8 = images_u8
                if kind != CLEAN:
                    keys = evaluation_keys(seed, batch.sample_id.numpy(), kind_id(kind), severity)
                    pixels_u8 = corrupt(
                        images_u8,
                        kind,
                        severity,
                        torch.from_numpy(keys.view("int64")),
                        flavour=flavour,
                        constants=config.constants,
                    )
                with torch.autocast(device.type, precision, enabled=precision is not None):
                    logits = model(normalise(pixels_u8, config))
                counts_N3[i] += _hits(logits.float(), labels_B, sound_B)
                if progress is not None:
                    progress(len(labels_B))
    return counts_N3.cpu()


def _hits(logits_BC: Tensor, labels_B: Tensor, sound_B: Tensor) -> Tensor:
    """Return int64 (3,): sound images, and how many have their label first, and among the first five."""
    best = logits_BC.topk(min(5, logits_BC.shape[1]), dim=1).indices
    right = (best == labels_B[:, None]) & sound_B[:, None]
    return torch.stack([sound_B.sum(), right[:, 0].sum(), right.any(dim=1).sum()])


def cells_from_counts(names: Sequence[CellName], counts_N3: Tensor) -> list[Cell]:
    """Turn counts, summed over ranks, into accuracies.

    Raises:
        ValueError: if no sound image was scored.
    """
    cells = []
    for (kind, severity), (images, top1, top5) in zip(names, counts_N3.tolist(), strict=True):
        if not images:
            raise ValueError(f"no sound image was scored for {kind} severity {severity}; verify the shards")
        cells.append(Cell(kind, severity, top1 / images, top5 / images, images))
    return cells
