"""A few images of the data as an evaluation sees them, and their corruptions: the material of the other figures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.corruptions import available_kinds
from pipeline.loader import EvaluationLoader
from pipeline.order import permutation
from shards import Store
from tools.evaluation.models import Preprocessing
from tools.evaluation.passes import Settings, cell_pixels
from tools.figures.style import contact_sheet, jpeg
from tools.runtime.results import CellName

GALLERY_SEVERITIES = (1, 3, 5)


@dataclass(frozen=True)
class Samples:
    """images_u8: uint8 (B, S, S, 3) clean centre crops; label_B: int64; sample_B: int64 ids in the store."""

    images_u8: Tensor
    label_B: Tensor
    sample_B: npt.NDArray[np.int64]
    constants: str
    settings: Settings

    def corrupted(self, cell: CellName) -> Tensor:
        """The images in a cell, with the noise that the evaluation gives them."""
        return cell_pixels(self.images_u8, self.sample_B, cell, self.constants, self.settings)

    def first(self, count: int) -> Samples:
        """The first images only."""
        cut = slice(None, count)
        return Samples(
            self.images_u8[cut], self.label_B[cut], self.sample_B[cut], self.constants, self.settings
        )


def spread(store: Store, classes: int, per_class: int, seed: int) -> npt.NDArray[np.int64]:
    """Return a seeded choice of samples, class after class in turn; fewer where a class has fewer."""
    order = permutation(len(store), seed, 2)
    chosen = np.sort(np.unique(store.label))
    chosen = np.sort(chosen[permutation(len(chosen), seed, 3)[:classes]])
    of_class = [order[store.label[order] == label][:per_class] for label in chosen.tolist()]
    turns = [ids[i] for i in range(per_class) for ids in of_class if i < len(ids)]
    return np.array(turns, np.int64)


def load(store: Store, shown: Preprocessing, sample_B: npt.NDArray[np.int64], settings: Settings) -> Samples:
    """Decode samples as the evaluation does."""
    config = shown.pipeline(settings.threads)
    loader = EvaluationLoader(
        store,
        config,
        batch=len(sample_B),
        sample_id=sample_B,
        device_id=settings.device_id,
        on_damaged="replace",
    )
    try:
        (batch,) = list(loader)
    finally:
        loader.close()
    images = batch.images_u8.to(settings.device)
    return Samples(images, batch.labels, batch.sample_id.numpy(), config.constants, settings)


def gallery(samples: Samples) -> bytes:
    """Return a JPEG of one image under every corruption at severities 1, 3 and 5."""
    one = samples.first(1)
    rows = [("clean", [one.images_u8[0].cpu().numpy()] * len(GALLERY_SEVERITIES))]
    for kind in list(available_kinds())[1:]:
        pictures = [one.corrupted((kind, s))[0].cpu().numpy() for s in GALLERY_SEVERITIES]
        rows.append((kind.replace("_", " "), pictures))
    return jpeg(contact_sheet(rows, [f"severity {s}" for s in GALLERY_SEVERITIES], 118, 146))


def settings_of(seed: int, flavour: str, jpeg85: bool, threads: int) -> Settings:
    """Return the settings of an evaluation that figures go by; on the CPU."""
    device = torch.device("cpu")
    return Settings(seed, flavour, jpeg85, None, 64, threads, "replace", device, None)
