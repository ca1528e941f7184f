"""t-SNE of features before and after quantisation and attention (Figs. 5 and 6 of the paper)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from model.codebook import unchanged
from pipeline.corruptions import TRAINING_KINDS
from pipeline.normalise import normalise
from tools.evaluation.models import Classifier
from tools.figures.samples import Samples
from tools.figures.style import figure, png
from tools.runtime.results import CLEAN, CellName

CELLS: tuple[CellName, ...] = ((CLEAN, 0), *((kind, 3) for kind in TRAINING_KINDS))
_PERPLEXITY = 30


class Embedding(NamedTuple):
    """Points in the plane, P of them. before_P2, after_P2: places; cell_P: index into CELLS; label_P: class."""

    before_P2: npt.NDArray[np.float32]
    after_P2: npt.NDArray[np.float32]
    cell_P: npt.NDArray[np.int64]
    label_P: npt.NDArray[np.int64]


@torch.no_grad()
def embed(classifier: Classifier, samples: Samples, seed: int) -> Embedding | None:
    """Place the samples' features, clean and under 15 corruptions, in the plane; None if the model has no feature."""
    config = classifier.preprocessing.pipeline(1)
    before, after, cell_P = [], [], []
    with unchanged(classifier.net):
        for number, cell in enumerate(CELLS):
            signals = classifier(normalise(samples.corrupted(cell), config))
            if signals.before is None or signals.after is None:
                return None
            before.append(signals.before.cpu().numpy())
            after.append(signals.after.cpu().numpy())
            cell_P += [number] * len(samples.label_B)
    label_P = np.tile(samples.label_B.numpy(), len(CELLS))
    return Embedding(
        _plane(np.concatenate(before), seed), _plane(np.concatenate(after), seed), np.array(cell_P), label_P
    )


def _plane(feature_PD: npt.NDArray[np.float32], seed: int) -> npt.NDArray[np.float32]:
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    points, dim = feature_PD.shape
    reduced = PCA(min(50, points, dim), random_state=seed % 2**32).fit_transform(feature_PD)
    perplexity = min(_PERPLEXITY, (points - 1) / 3)
    placed: Any = TSNE(perplexity=perplexity, init="pca", random_state=seed % 2**32).fit_transform(reduced)
    return np.asarray(placed, np.float32)


def corruption_wise(embedding: Embedding) -> bytes:
    """Return a PNG: every point coloured by its corruption, before and after."""
    drawn, axes = figure(2.9, columns=2)
    colours = _rainbow(len(CELLS))
    for axis, places, words in _panels(axes, embedding):
        axis.scatter(*places.T, c=colours[embedding.cell_P], s=5, linewidths=0)
        axis.set_title(words, fontsize=9, loc="left")
    names = [kind.replace("_", " ") for kind, _ in CELLS]
    _legend(drawn, names, colours, columns=4)
    return png(drawn)


def class_wise(embedding: Embedding, names: list[str]) -> bytes:
    """Return a PNG: every point coloured by its class, clean as dots and corrupted as triangles, before and after."""
    drawn, axes = figure(2.9, columns=2)
    present, index_P = np.unique(embedding.label_P, return_inverse=True)
    colours = _rainbow(len(present))
    clean_P = embedding.cell_P == 0
    for axis, places, words in _panels(axes, embedding):
        axis.scatter(
            *places[~clean_P].T, c=colours[index_P[~clean_P]], s=5, marker="^", linewidths=0, alpha=0.5
        )
        axis.scatter(
            *places[clean_P].T, c=colours[index_P[clean_P]], s=16, linewidths=0.3, edgecolors="white"
        )
        axis.set_title(words, fontsize=9, loc="left")
    _legend(drawn, [names[label] for label in present.tolist()], colours, columns=5)
    return png(drawn)


def _panels(axes: Any, embedding: Embedding) -> Any:
    for axis in axes:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.grid(False)
    return zip(
        axes, (embedding.before_P2, embedding.after_P2), ("before VQ + SA", "after VQ + SA"), strict=True
    )


def _rainbow(count: int) -> Any:
    from matplotlib import colormaps

    colours = colormaps["tab20"](np.arange(count) % 20)
    if count == len(CELLS):
        colours[0] = (0, 0, 0, 1)  # clean stands out
    return colours


def _legend(drawn: Any, names: list[str], colours: Any, columns: int) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], ls="", marker="o", ms=4, color=colour, label=name)
        for name, colour in zip(names, colours, strict=True)
    ]
    drawn.tight_layout()
    drawn.legend(
        handles=handles,
        ncol=columns,
        fontsize=6.5,
        frameon=False,
        loc="upper center",
        bbox_to_anchor=(0.5, 0.02),
    )
