"""What an evaluation found of each model, and what its files say of it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tools.evaluation.cells import cells_from_outcomes, intervals, severity_correlations
from tools.evaluation.command import EvaluateCommand
from tools.evaluation.correlation import Correlation, correlation
from tools.evaluation.models import Classifier
from tools.evaluation.outcomes import Outcomes
from tools.evaluation.passes import Pass
from tools.evaluation.sets import read_opinions
from tools.evaluation.verdict import verdict
from tools.runtime.results import C_BAR_KINDS, CLEAN, Cell, CellName, as_json, summarise, write_csv


@dataclass
class Findings:
    """What is known of one model, set by set.

    parts: per set its cells, the keys of its images, and what was found on them.
    opinion: how well the model's values follow mean opinion scores.
    """

    classifier: Classifier
    cells: list[Cell] = field(default_factory=list)
    parts: list[tuple[list[CellName], list[str], Outcomes]] = field(default_factory=list)
    opinion: dict[str, Correlation] | None = None

    def add(self, part: Pass, keys: list[str], found: Outcomes, command: EvaluateCommand) -> None:
        """Take in one set."""
        if not part.labelled:
            self.opinion = opinion_correlations(command, part, found)
            return
        cells = cells_from_outcomes(part.cells, found)
        if part.on_disk and part.cells[0][1]:
            cells = [replace(cells[0], consistency=self._consistency(keys, found))]
        self.cells += cells
        self.parts.append((part.cells, keys, found))

    def _consistency(self, keys: list[str], found: Outcomes) -> float | None:
        """Share of predictions of a cell on disk that are the clean image's, by file name; None without clean ones."""
        for cells, clean_keys, clean in self.parts:
            if cells[0] == (CLEAN, 0):
                of_name = dict(zip(map(_name, clean_keys), clean.prediction_CN[0].tolist(), strict=True))
                if len(of_name) < len(clean_keys) or not {*map(_name, keys)} <= of_name.keys():
                    return None
                same_N = np.array([of_name[_name(key)] for key in keys]) == found.prediction_CN[0]
                return float(same_N[~found.damaged_N].mean())
        return None


def _name(key: str) -> str:
    return key.rpartition("/")[2]


def describe(findings: Findings, command: EvaluateCommand) -> dict[str, Any]:
    """Return what results.json says of one model."""
    summary = summarise(findings.cells, partial=command.partial_mce, released_bug=command.released_mce_bug)
    classifier = findings.classifier
    return {
        **classifier.source,
        "classes": len(classifier.classes),
        "preprocessing": classifier.preprocessing.model_dump(mode="json"),
        "trained_on": None if classifier.trained_on is None else list(classifier.trained_on),
        "verdict": verdict(classifier.name, classifier.trained_on, summary),
        **as_json(summary),
        "severity_correlation": {
            kind: {value: c._asdict() for value, c in by_value.items()}
            for cells, _, found in findings.parts
            if len(cells) > 1
            for kind, by_value in severity_correlations(cells, found).items()
        },
        "mos_correlation": findings.opinion and {value: c._asdict() for value, c in findings.opinion.items()},
        "intervals_95": joint_intervals(findings, command.seed),
        "released_mce_bug": command.released_mce_bug,
    }


def opinion_correlations(command: EvaluateCommand, part: Pass, found: Outcomes) -> dict[str, Correlation]:
    """Return how well confidence and the distance to the code follow the mean opinion scores."""
    assert command.mos is not None
    assert command.mos_images is not None
    scores = np.array(list(read_opinions(command.mos, command.mos_images).values()))[part.sample_N]
    sound_N = ~found.damaged_N
    return {
        value: correlation(found.value(value)[0, sound_N], scores[sound_N])
        for value in ("confidence", "residual")
        if not np.isnan(found.value(value)).all()
    }


def joint_intervals(findings: Findings, seed: int) -> dict[str, tuple[float, float]]:
    """Return bootstrap intervals over the images that all cells behind the aggregates share; empty where they differ.

    ImageNet-C-bar is in none of these aggregates, and other sets have other images.
    """

    def counts(cell: CellName) -> bool:
        return cell == (CLEAN, 0) or (cell[1] > 0 and cell[0] not in C_BAR_KINDS)

    parts = [part for part in findings.parts if any(map(counts, part[0]))]
    if not parts or any(part[1] != parts[0][1] for part in parts):
        return {}
    names = [cell for cells, _, _ in parts for cell in cells]
    sound_N = ~np.any([found.damaged_N for _, _, found in parts], axis=0)
    return intervals(names, np.concatenate([found.top1_CN for _, _, found in parts])[:, sound_N], seed)


def write(out: Path, report: dict[str, Any], findings: dict[str, Findings]) -> None:
    """Write results.json, cells.csv and, for reports, how often each code was used in each cell."""
    write_csv(out / "cells.csv", {name: f.cells for name, f in findings.items()})
    usage: dict[str, Any] = {}
    for name, f in findings.items():
        for cells, _, found in f.parts:
            for row, (kind, severity) in zip(found.usage_CK, cells, strict=True):
                if row.size:
                    usage[f"{name}/{kind}/{severity}"] = row
    if usage:
        np.savez_compressed(out / "code_usage.npz", **usage)
    temporary = out / "results.json.tmp"
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    temporary.replace(out / "results.json")
