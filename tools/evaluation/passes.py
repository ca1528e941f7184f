"""Scores models on one set of images: each image is decoded once and corrupted on the device for every cell.

Shapes: B = images of a batch, N = images of the set, C = cells, L = classes (logits).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.codebook import unchanged
from pipeline.config import PipelineConfig
from pipeline.corruptions import corrupt, jpeg_pass, kind_id
from pipeline.loader import EvaluationLoader
from pipeline.normalise import normalise
from pipeline.plan import evaluation_keys
from shards import Store
from tools.evaluation.models import Classifier, Preprocessing, Signals
from tools.evaluation.outcomes import VALUES, Outcomes
from tools.runtime.results import CLEAN, CellName


@dataclass(frozen=True)
class Pass:
    """One reading of a set of images, and the cells scored on them.

    name: unique in an evaluation.
    store: the records.
    sample_N: int64, ascending; the samples that take part.
    cells: names of the cells. Corruptions are made here unless `on_disk`.
    on_disk: the images are corrupted already (or another set altogether): they are scored as they are, in one cell.
    resize: False: images have the model's size and are not resized.
    fewer: what to do where the data have fewer classes than the model: "refuse", "mask" their logits, or "keep" all.
    labelled: False where the images have no classes; what compares with a label means nothing then.
    """

    name: str
    store: Store
    sample_N: npt.NDArray[np.int64]
    cells: list[CellName]
    on_disk: bool = False
    resize: bool = True
    fewer: str = "refuse"
    labelled: bool = True


@dataclass(frozen=True)
class Settings:
    """What changes the numbers (seed, flavour, jpeg85, precision) and what does not (the rest)."""

    seed: int
    flavour: str
    jpeg85: bool
    precision: torch.dtype | None
    batch: int
    threads: int
    on_damaged: str
    device: torch.device
    device_id: int | None
    rank: int = 0
    ranks: int = 1


def pipeline_of(shown: Preprocessing, part: Pass, threads: int) -> PipelineConfig:
    """Return the loader's settings for a pass; without resizing, the image is taken as it is."""
    config = shown.pipeline(threads)
    return config if part.resize else config.model_copy(update={"eval_resize": config.image_size})


def geometry(shown: Preprocessing) -> tuple[object, ...]:
    """What two models must share to be shown the same pixels before normalisation."""
    return (shown.size, shown.resize, shown.interpolation, shown.constants)


def cell_pixels(
    images_u8_BHWC: Tensor,
    sample_B: npt.NDArray[np.int64],
    cell: CellName,
    constants: str,
    settings: Settings,
) -> Tensor:
    """Return the images of a cell, uint8 (B, H, W, 3): clean, or corrupted with each sample's own noise."""
    kind, severity = cell
    if kind == CLEAN:
        return images_u8_BHWC
    keys = evaluation_keys(settings.seed, sample_B, kind_id(kind), severity)
    pixels = corrupt(
        images_u8_BHWC,
        kind,
        severity,
        torch.from_numpy(keys.view("int64")),
        flavour=settings.flavour,
        constants=constants,
    )
    return jpeg_pass(pixels, 85) if settings.jpeg85 else pixels


def measure(signals: Signals, clean: Signals | None, label_B: Tensor, absent_L: Tensor | None) -> Tensor:
    """Return float32 (3 + V, B): prediction, top-1 hit, top-5 hit, then VALUES, of one batch in one cell.

    Args:
        signals: of the cell.
        clean: of the same images uncorrupted, or None.
        label_B: int64, outputs that are right.
        absent_L: bool, outputs that do not take part; None for all.
    """
    logits_BL = signals.logits if absent_L is None else signals.logits.masked_fill(absent_L, -torch.inf)
    log_BL = logits_BL.log_softmax(1)
    probability_BL = log_BL.exp()
    best = logits_BL.topk(min(5, logits_BL.shape[1]), dim=1).indices
    right = best == label_B[:, None]
    nll_B = -log_BL.gather(1, label_B[:, None])[:, 0]
    likely_B = probability_BL.gather(1, label_B[:, None])[:, 0]
    # The squared distance to the one-hot label, without making it.
    brier_B = probability_BL.square().sum(1) - 2 * likely_B + 1
    rows = [best[:, 0], right[:, 0], right.any(1), probability_BL.max(1).values, nll_B, brier_B]
    rows += _stability(signals, clean)
    return torch.stack([row.float() for row in rows])


def _stability(signals: Signals, clean: Signals | None) -> list[Tensor]:
    """Agreement of codes and drift of features against the clean image, and distance to the code."""
    nothing_B = torch.full_like(signals.logits[:, 0], torch.nan)

    def drift(a: Tensor | None, b: Tensor | None) -> Tensor:
        return nothing_B if a is None or b is None else 1 - torch.cosine_similarity(a, b, dim=1)

    residual_B = drift(signals.before, signals.quantised)
    if clean is None:
        return [nothing_B, nothing_B, nothing_B, residual_B]
    agreement_B = nothing_B
    if signals.codes is not None and clean.codes is not None:
        agreement_B = (signals.codes == clean.codes).float().mean(1)
    return [agreement_B, drift(signals.before, clean.before), drift(signals.after, clean.after), residual_B]


class Scorer:
    """Scores classifiers that are shown the same pixels on one pass, and keeps what it finds in `found`.

    Args:
        part: images and cells.
        classifiers: all of one `geometry`, on the device.
        outputs: per classifier, the output of each class of the data (`classes.outputs_of`).
        before: per classifier, what is done already; it is not done again.
        settings: see Settings.
        prepare: called before a classifier sees a cell; for adaptation to the cell.
    """

    def __init__(
        self,
        part: Pass,
        classifiers: list[Classifier],
        outputs: list[Tensor],
        before: dict[str, npt.NDArray[np.bool_]],
        settings: Settings,
        prepare: Callable[[Classifier, CellName], None] | None = None,
    ) -> None:
        self._part = part
        self._classifiers = classifiers
        self._settings = settings
        self._prepare = prepare or (lambda classifier, cell: None)
        device = settings.device
        self._outputs = [index.to(device) for index in outputs]
        self._absent: list[Tensor | None] = []
        for classifier, index in zip(classifiers, self._outputs, strict=True):
            absent_L = torch.ones(len(classifier.classes), dtype=torch.bool, device=device)
            absent_L[index] = False
            self._absent.append(absent_L if part.fewer == "mask" and bool(absent_L.any()) else None)
        shape = (len(part.cells), len(part.sample_N))
        self._before = {c.name: before.get(c.name, np.zeros(shape, np.bool_)) for c in classifiers}
        self.found = {c.name: Outcomes.empty(*shape, c.codes) for c in classifiers}
        self._pending: list[tuple[str, int, npt.NDArray[np.int64], npt.NDArray[np.bool_], Tensor]] = []
        self._usage = {
            c.name: torch.zeros((len(part.cells), c.codes), dtype=torch.int64, device=device)
            for c in classifiers
            if c.codes
        }
        self.damaged: dict[int, str] = {}

    @torch.no_grad()
    def run(
        self,
        progress: Callable[[int], None],
        save: Callable[[dict[str, Outcomes]], None],
        save_every_s: float,
    ) -> None:
        """Score this rank's share of what is left.

        Args:
            progress: called with the number of scores made.
            save: called with `found` every `save_every_s` seconds, between two cells, and at the end.
        """
        part, settings = self._part, self._settings
        open_N = ~np.all([done.all(0) for done in self._before.values()], axis=0)
        if not open_N.any():
            return
        config = pipeline_of(self._classifiers[0].preprocessing, part, settings.threads)
        loader = EvaluationLoader(
            part.store,
            config,
            batch=settings.batch,
            rank=settings.rank,
            ranks=settings.ranks,
            device_id=settings.device_id,
            sample_id=part.sample_N[open_N],
            on_damaged=settings.on_damaged,
        )
        saved_s = time.monotonic()
        with unchanged(*(c.net for c in self._classifiers)), closing(loader):
            for batch in loader:
                images_u8 = batch.images_u8.to(settings.device, non_blocking=True)
                label_B = batch.labels.to(settings.device, non_blocking=True)
                sample_B, damaged_B = batch.sample_id.numpy(), batch.damaged.numpy()
                column_B = np.searchsorted(part.sample_N, sample_B)
                for outcomes in self.found.values():
                    outcomes.damaged_N[column_B] = damaged_B
                clean: dict[str, Signals] = {}
                for number, cell in enumerate(part.cells):
                    fresh = {c.name: ~self._before[c.name][number, column_B] for c in self._classifiers}
                    # Later cells are compared with the clean image, so it is shown again after a restart.
                    reference = cell[0] == CLEAN and not part.on_disk and len(part.cells) > 1
                    if not reference and not any(f.any() for f in fresh.values()):
                        continue
                    pixels_u8 = images_u8
                    if not part.on_disk:
                        pixels_u8 = cell_pixels(images_u8, sample_B, cell, config.constants, settings)
                    for i, classifier in enumerate(self._classifiers):
                        if not reference and not fresh[classifier.name].any():
                            continue
                        self._prepare(classifier, cell)
                        signals = self._show(classifier, pixels_u8, config)
                        if reference:
                            clean[classifier.name] = signals
                        labels = self._outputs[i][label_B]
                        rows = measure(signals, clean.get(classifier.name), labels, self._absent[i])
                        self._note(
                            classifier.name,
                            number,
                            column_B,
                            fresh[classifier.name],
                            damaged_B,
                            signals,
                            rows,
                        )
                        progress(int(fresh[classifier.name].sum()))
                    if time.monotonic() - saved_s > save_every_s:
                        self._flush()
                        save(self.found)
                        saved_s = time.monotonic()
                self._flush()
            self.damaged = dict(loader.damaged)
        save(self.found)

    def _show(self, classifier: Classifier, pixels_u8: Tensor, config: PipelineConfig) -> Signals:
        shown = classifier.preprocessing
        images = normalise(pixels_u8, config.model_copy(update={"mean": shown.mean, "std": shown.std}))
        precision = self._settings.precision
        with torch.autocast(self._settings.device.type, precision, enabled=precision is not None):
            return classifier(images)

    def _note(
        self,
        name: str,
        number: int,
        column_B: npt.NDArray[np.int64],
        fresh_B: npt.NDArray[np.bool_],
        damaged_B: npt.NDArray[np.bool_],
        signals: Signals,
        rows: Tensor,
    ) -> None:
        """Remember results on the device; reading them back at once would make it wait after every cell."""
        self._pending.append((name, number, column_B, fresh_B, rows))
        if signals.codes is not None:
            counted_B = torch.from_numpy(fresh_B & ~damaged_B).to(signals.codes.device)
            counted = counted_B[:, None] & (signals.codes >= 0)  # -1 marks a feature that is not finite
            # Not by bincount or a mask: their sizes would have to be read back from the device.
            at = signals.codes.clamp_min(0).flatten()
            self._usage[name][number].scatter_add_(0, at, counted.flatten().long())

    def _flush(self) -> None:
        if not self._pending:
            return
        all_rows = torch.stack([rows for *_, rows in self._pending]).cpu().numpy()  # one transfer
        for (name, number, column_B, fresh_B, _), rows in zip(self._pending, all_rows, strict=True):
            found = self.found[name]
            values = rows[:, fresh_B]
            at = column_B[fresh_B]
            found.prediction_CN[number, at] = values[0].astype(np.int32)
            found.top1_CN[number, at] = values[1] > 0
            found.top5_CN[number, at] = values[2] > 0
            found.values_VCN[:, number, at] = values[3 : 3 + len(VALUES)]
            found.done_CN[number, at] = True
        self._pending.clear()
        for name, usage in self._usage.items():
            self.found[name].usage_CK[:] = usage.cpu().numpy()
