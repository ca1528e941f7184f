"""What is in a shard set, as text for a terminal: totals, options, class and size histograms."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.store import Store

_BAR = 40


def _printable(text: str, width: int) -> str:
    """Names come from the manifest, perhaps a stranger's: nothing in them may steer the terminal."""
    clean = "".join(c if c.isprintable() else "?" for c in text)
    return clean if len(clean) <= width else clean[: width - 1] + "…"


def _bars(labels: Sequence[str], counts: Sequence[int]) -> list[str]:
    wide = max((len(label) for label in labels), default=0)
    most = max(counts, default=0)
    return [
        f"  {label:<{wide}} {count:>9} {'█' * round(_BAR * count / max(most, 1))}".rstrip()
        for label, count in zip(labels, counts, strict=True)
    ]


def histogram(values: npt.NDArray[Any], unit: str, bins: int = 10) -> list[str]:
    """Lines of a histogram whose bins are equally wide in the logarithm, since sizes spread over decades.

    Args:
        values: (N,) integers >= 0.
        unit: written after the bounds of each bin.
        bins: at most so many.
    """
    if not len(values):
        return []
    low, high = int(values.min()), int(values.max())
    edges = np.geomspace(max(low, 1), high + 1, bins + 1).round().astype(np.int64)
    edges[0] = low
    edges = np.unique(edges)
    counts, _ = np.histogram(values, edges)
    labels = [f"{a} to {b - 1} {unit}" for a, b in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)]
    return _bars(labels, counts.tolist())


def summary(store: Store, classes: int = 10) -> str:
    """Describe a set.

    Args:
        store: an open set.
        classes: how many of the largest and of the smallest classes to list.
    """
    header = store.header
    stored = int(store.length.sum(dtype=np.uint64))
    on_disk = sum(shard.size for shard in header.shards)
    options = ", ".join(
        f"{_printable(str(k), 40)}={_printable(str(v), 40)}"
        for k, v in header.options.items()
        if v is not None
    )
    lines = [
        f"{_printable(store.name, 80)}: {len(store)} samples, {len(store.classes)} classes, "
        f"{len(header.shards)} shards ({header.storage})",
        f"  images {stored / 1e6:.1f} MB, shards {on_disk / 1e6:.1f} MB",
        *textwrap.wrap(f"  options: {options}", 110, subsequent_indent="    "),
    ]
    lines.extend(f"  {_printable(kind, 40)}: {count}" for kind, count in header.counts.items() if count)

    if not len(store):
        return "\n".join(lines)

    per_class = np.bincount(store.label, minlength=len(store.classes))
    lines.append(
        f"samples per class: {per_class.min()} to {per_class.max()}, median {np.median(per_class):g}, "
        f"{int((per_class == 0).sum())} without any"
    )
    order = np.argsort(-per_class, kind="stable").tolist()
    shown = order if len(order) <= 2 * classes else [*order[:classes], *order[-classes:]]
    rows = _bars([_printable(store.classes[c], 30) for c in shown], per_class[shown].tolist())
    if len(shown) < len(order):
        rows.insert(classes, f"  … {len(order) - len(shown)} more")
    lines.extend(rows)
    lines += ["shorter side as stored:", *histogram(np.minimum(store.width, store.height), "px")]
    lines += ["bytes of an image:", *histogram(store.length, "B")]
    return "\n".join(lines)
