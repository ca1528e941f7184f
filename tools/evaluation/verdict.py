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
    parts = [
        f"Known {_pct(known)}{summary.known_over}",
        f"Unknown {_pct(unknown)}{summary.unknown_over}",
        f"mCE {'not complete' if mce is None else f'{mce:.2f} %{summary.known_over}'}",
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
        seen += f": {_known(benchmark, summary)}"
        if leaked:
            seen += f"; LEAK: trained on {', '.join(leaked)}, so Unknown is not unknown"
        else:
            seen += ", Unknown of ones it has not"
    return f"{name}: {', '.join(parts)}; {seen}."


def _known(trained_on: Sequence[str], summary: Summary) -> str:
    """What Known and mCE are of, by the kinds that were evaluated."""
    evaluated = [kind for kind in TRAINING_KINDS if kind in summary.top1]
    seen = sum(kind in trained_on for kind in evaluated)
    if not seen:
        return "Known and mCE are of corruptions it has not seen"
    if seen == len(evaluated):
        return "Known and mCE are of corruptions it has seen"
    return f"Known and mCE mix {seen} seen and {len(evaluated) - seen} unseen kinds"


def _pct(value: float | None) -> str:
    return "not evaluated" if value is None else f"{100 * value:.2f} %"
