"""The figures that need the models and the images: made once, kept as files, used again by later reports."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tools.evaluation import models
from tools.evaluation.classes import outputs_of
from tools.evaluation.models import Classifier
from tools.evaluation.passes import geometry
from tools.evaluation.sets import open_images
from tools.figures import embedding, gradcam, samples

log = logging.getLogger(__name__)

FILES = {
    "grad_cam.jpg": "Grad-CAM: where each model looks for the right class, clean and under defocus_blur 3",
    "tsne_corruptions.png": "t-SNE of features by corruption (severity 3), before and after quantisation and attention",
    "tsne_classes.png": "t-SNE of features by class: dots clean, triangles corrupted",
    "gallery.jpg": "One image of the data under every corruption",
}

_STAMP = "cells.sha256"
"""Beside the figures: of which cells they are."""

_CLASSES, _PER_CLASS, _GRID_ROWS = 10, 5, 4


def kept_or_drawn(
    results: Mapping[str, Any], data: Path | None, evaluation: Path, figures: str
) -> tuple[dict[str, Path], list[str]]:
    """Return the figures there are of an evaluation, by name of the file, and what could not be drawn, in words.

    Args:
        results: what results.json holds.
        data: clean images; None for the evaluation's.
        evaluation: its folder; the figures are in `figures/` there.
        figures: "auto", "saved" or "again", see `tools.report.ReportCommand`.
    """
    folder = evaluation / "figures"
    # Figures stay where a later evaluation of another model writes its results: those of other cells are not shown.
    stamp, cells = folder / _STAMP, hashlib.sha256((evaluation / "cells.csv").read_bytes()).hexdigest()
    own = stamp.is_file() and stamp.read_text() == cells
    there = {file: folder / file for file in FILES if (folder / file).is_file()}
    if figures == "saved" or (figures == "auto" and own and there):
        if there and not own:
            words = (
                "the saved figures of the models are of another evaluation; --figures again draws them anew"
            )
            return {}, [words]
        return there, []
    if not own:
        for path in there.values():
            path.unlink()
        folder.mkdir(exist_ok=True)
        stamp.write_text(cells)
    if data is None and results.get("clean_images"):
        data = Path(results["clean_images"])
    if data is None:
        missed = ["no figures of the models: the evaluation read no clean images; give some with --data"]
    else:
        try:
            missed = draw(results, data, folder)
        except (FileNotFoundError, ValueError) as error:
            missed = [f"no figures of the models: {error}"]
    return {file: folder / file for file in FILES if (folder / file).is_file()}, missed


def draw(results: Mapping[str, Any], data: Path, folder: Path, threads: int = 2) -> list[str]:
    """Draw what can be drawn of the models of an evaluation; returns what could not, in words.

    Args:
        results: what results.json holds.
        data: the clean images.
        folder: where the files go.

    Raises:
        FileNotFoundError, ValueError: no such images.
    """
    settings = samples.settings_of(results["seed"], results["flavour"], results["jpeg85"], threads)
    missed: list[str] = []
    classifiers: list[Classifier] = []
    for name, found in results["models"].items():
        if "adapted" in found:
            continue
        try:
            classifier = (
                models.from_checkpoint(Path(found["checkpoint"]))
                if "checkpoint" in found
                else models.from_name(found["model"])
            )
        except (FileNotFoundError, ImportError, ValueError) as error:
            missed.append(f"{name}: {error}")
            continue
        classifier.name = name
        classifiers.append(classifier)
    if not classifiers:
        return missed
    shown = [c for c in classifiers if geometry(c.preprocessing) == geometry(classifiers[0].preprocessing)]
    folder.mkdir(parents=True, exist_ok=True)
    with open_images(data) as store:
        ids = samples.spread(store, _CLASSES, _PER_CLASS, results["seed"])
        outputs = [outputs_of(store.classes, c.classes, str(data), c.name, fewer=True) for c in shown]
        chosen = samples.load(store, shown[0].preprocessing, ids, settings)
        classes = list(store.classes)
    (folder / "gallery.jpg").write_bytes(samples.gallery(chosen))
    try:
        (folder / "grad_cam.jpg").write_bytes(gradcam.grid(shown[:3], chosen.first(_GRID_ROWS), outputs[:3]))
    except ImportError:
        missed.append("Grad-CAM needs pip install grad-cam")
    except ValueError as error:
        missed.append(str(error))
    try:
        placed = embedding.embed(shown[0], chosen, results["seed"])
    except ImportError:
        return [*missed, "t-SNE needs pip install scikit-learn"]
    if placed is None:
        return [*missed, f"{shown[0].name} has no feature for t-SNE"]
    (folder / "tsne_corruptions.png").write_bytes(embedding.corruption_wise(placed))
    (folder / "tsne_classes.png").write_bytes(embedding.class_wise(placed, classes))
    return missed
