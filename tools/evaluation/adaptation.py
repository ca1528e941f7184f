"""Test-time adaptation: batch normalisation with the statistics of the images it is tested on.

For every cell the running statistics are taken anew from unlabelled images of that cell (arXiv:2006.16971). They
depend on the seed alone: not on the batch size of the evaluation or the number of processes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.loader import EvaluationBatch, EvaluationLoader
from pipeline.normalise import normalise
from pipeline.order import permutation
from tools.evaluation.models import Classifier
from tools.evaluation.passes import Pass, Settings, cell_pixels, pipeline_of
from tools.runtime.results import CellName

BATCH = 64
SUFFIX = "+bn"


def adapted(classifiers: Sequence[Classifier], images: int, prior: int) -> list[Classifier]:
    """Return a copy of each classifier that has batch normalisation, as a row of its own in the results.

    Raises:
        ValueError: if none has any.
    """
    copies = [
        Classifier(
            classifier.name + SUFFIX,
            copy.deepcopy(classifier.net),
            classifier.preprocessing,
            classifier.classes,
            {**classifier.source, "adapted": "batch-norm statistics", "images": images, "prior": prior},
            classifier.trained_on,
        )
        for classifier in classifiers
        if _layers(classifier.net)
    ]
    if not copies:
        names = ", ".join(classifier.name for classifier in classifiers)
        raise ValueError(f"--adapt-bn: no batch normalisation to adapt in {names}")
    return copies


def _layers(net: nn.Module) -> list[_BatchNorm]:
    return [m for m in net.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


def sound_batches(
    batches: Iterable[EvaluationBatch], device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images, uint8 (B, H, W, 3) on the device, and their ids, without the damaged ones.

    A batch of less than half of BATCH joins the one before: statistics of one image may have no variance at all.
    """
    held: tuple[Tensor, Tensor] | None = None
    for batch in batches:
        sound_B = ~batch.damaged
        images_u8 = batch.images_u8.to(device)
        new = images_u8[sound_B.to(images_u8.device)], batch.sample_id[sound_B]
        if held is None:
            held = new
        elif min(len(held[0]), len(new[0])) < BATCH // 2:
            held = torch.cat([held[0], new[0]]), torch.cat([held[1], new[1]])
        else:
            yield held
            held = new
    if held is not None and len(held[0]):
        yield held


class CellStatistics:
    """The statistics of every cell of a pass, put into a classifier before it sees the cell.

    Args:
        classifier: one of `adapted`; its own statistics are the training's.
        part: images and cells.
        images: how many images of each cell to adapt on, a seeded choice; all where there are fewer. Damaged ones
            among them are left out.
        prior: weight of the training statistics, in images.
        settings: see Settings.

    Raises:
        ValueError: all images that were chosen are damaged.
    """

    def __init__(
        self, classifier: Classifier, part: Pass, images: int, prior: int, settings: Settings
    ) -> None:
        self._layers = _layers(classifier.net)
        self._trained = [_statistics(layer) for layer in self._layers]
        self._of: dict[CellName, list[tuple[Tensor, Tensor]]] = {}
        self._current: CellName | None = None
        count = min(images, len(part.sample_N))
        chosen_N = np.sort(part.sample_N[permutation(len(part.sample_N), settings.seed, 1)[:count]])
        self._take(classifier, part, chosen_N, prior, settings)

    @torch.no_grad()
    def _take(
        self, classifier: Classifier, part: Pass, chosen_N: np.ndarray, prior: int, settings: Settings
    ) -> None:
        config = pipeline_of(classifier.preprocessing, part, settings.threads)
        loader = EvaluationLoader(
            part.store,
            config,
            batch=BATCH,
            device_id=settings.device_id,
            sample_id=chosen_N,
            on_damaged=settings.on_damaged,
        )
        sums: dict[CellName, list[tuple[Tensor, Tensor]]] = {}
        seen = 0
        try:
            for images_u8, sample_B in sound_batches(loader, settings.device):
                seen += len(images_u8)
                for cell in part.cells:
                    pixels = images_u8
                    if not part.on_disk:
                        pixels = cell_pixels(images_u8, sample_B.numpy(), cell, config.constants, settings)
                    weight = len(images_u8)
                    found = [
                        (weight * m, weight * v)
                        for m, v in self._batch(classifier, normalise(pixels, config))
                    ]
                    if cell in sums:
                        found = [(a + c, b + d) for (a, b), (c, d) in zip(sums[cell], found, strict=True)]
                    sums[cell] = found
        finally:
            loader.close()
        if not seen:
            raise ValueError(
                f"--adapt-bn: all {len(chosen_N)} images chosen from {part.store.path} are damaged; mend them, or ask "
                "for more images"
            )
        share = seen / (seen + prior)
        for cell, totals in sums.items():
            self._of[cell] = [
                (
                    share * mean / seen + (1 - share) * trained_mean,
                    share * var / seen + (1 - share) * trained_var,
                )
                for (mean, var), (trained_mean, trained_var) in zip(totals, self._trained, strict=True)
            ]

    def _batch(self, classifier: Classifier, images_BCHW: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return each layer's statistics of one batch, as batch normalisation computes them in training."""
        for layer in self._layers:
            layer.train()
            layer.reset_running_stats()
            momentum, layer.momentum = layer.momentum, 1.0
        try:
            classifier(images_BCHW)
        finally:
            for layer in self._layers:
                layer.momentum = momentum
                layer.eval()
        return [_statistics(layer) for layer in self._layers]

    def put(self, cell: CellName) -> None:
        """Give the classifier the statistics of a cell."""
        if cell == self._current:
            return
        for layer, (mean, var) in zip(self._layers, self._of[cell], strict=True):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.running_mean.copy_(mean)
            layer.running_var.copy_(var)
        self._current = cell


def _statistics(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return layer.running_mean.clone(), layer.running_var.clone()
