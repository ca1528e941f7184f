"""Accuracy per corruption (Fig. 4 of the paper) and over severity, from the cells of one or more models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean

from pipeline.corruptions import HELD_OUT_KINDS, TRAINING_KINDS
from tools.figures.style import COLOURS, INK, figure, png
from tools.runtime.results import CLEAN, FAMILIES, SEVERITIES, Cell, by_kind, summarise

Results = Mapping[str, Sequence[Cell]]


def bars(results: Results) -> bytes:
    """Return a PNG with a group of bars for each corruption, one per model, mean over severities."""
    summaries = {model: summarise(cells) for model, cells in results.items()}
    kinds = list(dict.fromkeys(kind for s in summaries.values() for kind in s.top1))
    thickness = 0.8 / len(results)
    drawn, axis = figure(1 + len(kinds) * max(0.22, 0.12 * len(results)))
    for i, (model, summary) in enumerate(summaries.items()):
        at = [y - 0.4 + (i + 0.5) * thickness for y in range(len(kinds))]
        widths = [100 * summary.top1.get(kind, 0) for kind in kinds]
        drawn_bars = axis.barh(at, widths, thickness * 0.92, color=COLOURS[i % len(COLOURS)], label=model)
        if len(results) < 3:
            axis.bar_label(drawn_bars, fmt="%.1f", fontsize=7, padding=2)
        if summary.clean_top1 is not None:
            axis.axvline(100 * summary.clean_top1, color=COLOURS[i % len(COLOURS)], ls=":", lw=1.2)
    axis.set_yticks(range(len(kinds)), [f"{k} *" if k in HELD_OUT_KINDS else k for k in kinds])
    axis.invert_yaxis()
    axis.set_xlim(0, 104)
    axis.set_xlabel("top-1, mean over severities, % (dotted: clean; *: held out)", fontsize=8)
    if len(results) > 1:
        axis.legend(fontsize=7.5, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncol=2)
    return png(drawn)


def severity_curves(results: Results) -> bytes:
    """Return a PNG of mean top-1 over severity for each family and the held-out kinds; severity 0 is clean."""
    groups = {**FAMILIES, "held out": HELD_OUT_KINDS}
    first = by_kind(next(iter(results.values())))
    groups = {g: kinds for g, kinds in groups.items() if any(k in first for k in kinds)}
    drawn, axes = figure(1.75 * -(-len(groups) // 2), columns=1)
    axes.remove()
    for number, (group, kinds) in enumerate(groups.items()):
        axis = drawn.add_subplot(-(-len(groups) // 2), 2, number + 1)
        axis.spines[["top", "right"]].set_visible(False)
        for i, (model, cells) in enumerate(results.items()):
            found = by_kind(cells)
            x = [0] if CLEAN in found else []
            y = [100 * found[CLEAN][0].top1] if CLEAN in found else []
            for severity in SEVERITIES:
                values = [found[k][severity].top1 for k in kinds if severity in found.get(k, {})]
                if values:
                    x.append(severity)
                    y.append(100 * mean(values))
            axis.plot(x, y, color=COLOURS[i % len(COLOURS)], marker="o", ms=3, lw=1.5, label=model)
        axis.set_title(group, fontsize=9, color=INK, loc="left")
        axis.set_ylim(0, 100)
        axis.set_xticks((0, *SEVERITIES), ("clean", *map(str, SEVERITIES)))
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.2)
        if number == 0 and len(results) > 1:
            axis.legend(fontsize=6.5, frameon=False)
    drawn.supylabel("top-1, %", fontsize=8)
    drawn.tight_layout()
    return png(drawn)


def is_benchmark(cells: Sequence[Cell]) -> bool:
    """Whether there is a corruption with all severities to draw."""
    return any(kind in (*TRAINING_KINDS, *HELD_OUT_KINDS) for kind in summarise(cells).top1)
