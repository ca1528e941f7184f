"""What the numbers may be called: which of the tested corruptions a model has seen in training."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.corruptions import HELD_OUT_KINDS, TRAINING_KINDS
from tools.runtime.results import Summary


def verdict(name: str, trained_on: Sequence[str] | None, summary: Summary) -> str:
    """Return one line: Known beside Unknown and mCE, and what the model was trained on.

    Accuracy on corruptions of the training set says how well they were learnt; only the others say how the model
    takes to new ones. An mCE without that is not comparable with anything.
    """
    known, unknown, mce = summary.known_top1, summary.unknown_top1, summary.mce_pct
    kinds = len(TRAINING_KINDS)
    over = "" if summary.mce_kinds == kinds else f" (over {summary.mce_kinds} of {kinds} kinds)"
    parts = [
        f"Known {_pct(known)}",
        f"Unknown {_pct(unknown)}",
        f"mCE {'not complete' if mce is None else f'{mce:.2f} %{over}'}",
    ]
    if trained_on is None:
        seen = "training corruptions not known; the numbers may hold corruptions it was trained on"
    elif not trained_on:
        seen = "trained on none of the test corruptions: all of them are new to it"
    else:
        benchmark = [kind for kind in TRAINING_KINDS if kind in trained_on]
        leaked = [kind for kind in HELD_OUT_KINDS if kind in trained_on]
        seen = f"trained on {len(benchmark)} of the {kinds} benchmark corruptions"
        if len(benchmark) < kinds and benchmark:
            seen += f" ({', '.join(benchmark)})"
        seen += ": Known and mCE are of corruptions it has seen" if benchmark else ""
        if leaked:
            seen += f"; LEAK: trained on {', '.join(leaked)}, so Unknown is not unknown"
        else:
            seen += ", Unknown of ones it has not"
    return f"{name}: {', '.join(parts)}; {seen}."


def _pct(value: float | None) -> str:
    return "not evaluated" if value is None else f"{100 * value:.2f} %"
