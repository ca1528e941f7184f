"""What was found on every image in every cell, kept on disk while an evaluation runs.

Shapes: C = cells, N = images, V = values per image, K = codes.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

VALUES = ("confidence", "nll", "brier", "agreement", "drift_before", "drift_after", "residual")
"""Per image and cell, float32. confidence: largest softmax probability. nll: -ln of the label's. brier: squared
distance of the probabilities to the label. agreement: share of positions whose code is the clean image's.
drift_before, drift_after: 1 - cosine to the clean image's feature, before and after quantisation and attention.
residual: 1 - cosine between a feature and its code, which needs no clean image.
NaN where there is no codebook, or no clean partner."""


@dataclass
class Outcomes:
    """One model's results on one set of images."""

    done_CN: npt.NDArray[np.bool_]
    prediction_CN: npt.NDArray[np.int32]
    top1_CN: npt.NDArray[np.bool_]
    top5_CN: npt.NDArray[np.bool_]
    values_VCN: npt.NDArray[np.float32]
    damaged_N: npt.NDArray[np.bool_]
    usage_CK: npt.NDArray[np.int64]

    @classmethod
    def empty(cls, cells: int, images: int, codes: int) -> Outcomes:
        """Nothing found yet."""
        return cls(
            done_CN=np.zeros((cells, images), np.bool_),
            prediction_CN=np.full((cells, images), -1, np.int32),
            top1_CN=np.zeros((cells, images), np.bool_),
            top5_CN=np.zeros((cells, images), np.bool_),
            values_VCN=np.full((len(VALUES), cells, images), np.nan, np.float32),
            damaged_N=np.zeros(images, np.bool_),
            usage_CK=np.zeros((cells, codes), np.int64),
        )

    def add(self, other: Outcomes) -> None:
        """Take over what another part of the same evaluation found.

        Raises:
            ValueError: if both hold the same image in the same cell.
        """
        new_CN = other.done_CN
        if (self.done_CN & new_CN).any():
            raise ValueError(
                "two evaluations wrote to the same --out at the same time; delete its partial/ folder and start again"
            )
        self.done_CN |= new_CN
        for mine, theirs in (
            (self.prediction_CN, other.prediction_CN),
            (self.top1_CN, other.top1_CN),
            (self.top5_CN, other.top5_CN),
        ):
            mine[new_CN] = theirs[new_CN]
        self.values_VCN[:, new_CN] = other.values_VCN[:, new_CN]
        self.damaged_N |= other.damaged_N
        self.usage_CK += other.usage_CK

    def value(self, name: str) -> npt.NDArray[np.float32]:
        """One of VALUES, (C, N)."""
        found: npt.NDArray[np.float32] = self.values_VCN[VALUES.index(name)]
        return found


class Snapshots:
    """The partial results of one pass in a folder; one file per process and start, each with its own work only.

    A file is replaced as a whole, so that a killed process leaves its last snapshot. What earlier processes left,
    however many they were and whatever their batches, is read once at the start.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        # Names of sets are the user's: hashed, none begins like another or holds what a pattern means otherwise.
        self._prefix = hashlib.blake2b(name.encode(), digest_size=8).hexdigest()
        self._own: dict[str, Outcomes] = {}
        self._file = folder / f"{self._prefix}.{secrets.token_hex(6)}.npz"

    def load(self, models: list[str]) -> dict[str, Outcomes]:
        """Return what earlier processes finished, by model; models without any are absent."""
        found: dict[str, Outcomes] = {}
        for path in sorted(self._folder.glob(f"{self._prefix}.*.npz")):
            for model, part in _read(path).items():
                if model not in models:
                    continue
                if model in found:
                    found[model].add(part)
                else:
                    found[model] = part
        return found

    def save(self, outcomes: dict[str, Outcomes]) -> None:
        """Write this process's own work: these models', and those given before."""
        self._own |= outcomes
        self._folder.mkdir(parents=True, exist_ok=True)
        temporary = self._file.with_suffix(".tmp")
        arrays = {
            f"{model}/{field.name}": getattr(part, field.name)
            for model, part in self._own.items()
            for field in fields(Outcomes)
        }
        with temporary.open("wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._file)


def _read(path: Path) -> dict[str, Outcomes]:
    parts: dict[str, dict[str, Any]] = {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for key in arrays.files:
                model, _, attribute = key.rpartition("/")
                parts.setdefault(model, {})[attribute] = arrays[key]
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it: its part is computed again") from None
    return {model: Outcomes(**part) for model, part in parts.items()}
