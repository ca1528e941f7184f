"""Where a run starts: from nothing, or from a checkpoint of the same configuration and data."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object

from tools.runtime import checkpoint
from tools.runtime.config import CHANGEABLE_ON_RESUME, RunConfig, differences, validated


class Progress:
    """How far the run is; saved in every checkpoint."""

    def __init__(self) -> None:
        self.step = 0
        self.skipped = 0
        """Steps without an update because fp16 gradients overflowed."""
        self.unvalidated = False
        """Whether the validation that is due at this step is still to be done."""

    def state_dict(self) -> dict[str, int]:
        """Return the number of optimiser steps done, how many were skipped, and whether a validation is due."""
        return {"step": self.step, "skipped": self.skipped, "unvalidated": self.unvalidated}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after that many steps."""
        self.step, self.skipped = state["step"], state["skipped"]
        self.unvalidated = bool(state.get("unvalidated", False))


def starting_point(
    resume: str, config: RunConfig, classes: list[str], total: int, *, allow_changes: bool = False
) -> checkpoint.Checkpoint | None:
    """Return the checkpoint to go on from, or None to start.

    Args:
        resume: "no", "auto" or a path, see TrainCommand.resume.
        total: length of the run in steps.
        allow_changes: whether the settings of CHANGEABLE_ON_RESUME may differ from the checkpoint's.

    Raises:
        ValueError: the folder holds another run, or the checkpoint is of other settings or classes, or damaged; with
            "auto", if all are damaged.
        FileNotFoundError: no checkpoint at the path.
    """
    folder = config.out / "checkpoints"
    if resume == "no":
        if checkpoint.present(folder):
            raise ValueError(
                f"{config.out} already holds a run; say --resume auto to go on with it, or choose another --out"
            )
        return None
    if resume == "auto":
        start = checkpoint.newest_sound(folder)
        damaged = [path.name for path in checkpoint.present(folder)] if start is None else []
        if damaged:
            raise ValueError(
                f"none of the checkpoints in {folder} is whole ({', '.join(damaged)}; the log says what is damaged); "
                "put a copy of one back, or move them away to start anew"
            )
    else:
        start = checkpoint.newest(Path(resume))
        checkpoint.verify(start)
        later = [
            c.path.name
            for c in checkpoint.complete(folder)
            if c.step > start.step or start.path.resolve().parent != folder.resolve()
        ]
        if later:
            raise ValueError(
                f"{config.out} holds other checkpoints ({', '.join(later)}) than the one to go on from; give another "
                "--out, or move them away"
            )
    if start is not None:
        if start.classes != classes:
            raise ValueError(
                f"{config.data} has other classes than {start.path} was trained on; resume on its data"
            )
        changed = changes(start, config)
        refused = changed.keys() - (CHANGEABLE_ON_RESUME if allow_changes else set())
        if refused:
            advice = "go on with the same settings, or start a new run in another --out"
            if refused <= CHANGEABLE_ON_RESUME:
                advice = "go on with the same settings, or say --allow-changes"
            words = "; ".join(f"{name}: {changed[name]}" for name in sorted(refused))
            raise ValueError(f"{start.path} was made with another configuration ({words}); {advice}")
        if start.step > total:
            raise ValueError(
                f"{start.path} is of step {start.step}, and the run would have {total}; give it more, or an earlier "
                "checkpoint as --resume"
            )
    return start


def changes(start: checkpoint.Checkpoint, config: RunConfig) -> dict[str, str]:
    """Return the settings that differ from the checkpoint's and change what is computed, "saved -> now" by name."""
    # A setting that came after the checkpoint had its default.
    saved = validated(RunConfig, start.config, str(start.path)).model_dump(mode="json")
    return differences(saved, config.model_dump(mode="json"))


def circumstances(start: checkpoint.Checkpoint, processes: int) -> dict[str, str]:
    """Return what else is not as in the checkpoint, as `changes`: the code's version, the number of processes."""
    now = {"code": checkpoint.code_version(), "processes": processes}
    return {
        name: f"{then} -> {now[name]}"
        for name, then in (("code", start.commit), ("processes", start.processes))
        if then is not None and then != now[name]
    }


Found = tuple[int, str, str] | None
"""Step, checksum and path of the checkpoint that a process found, or None."""


def check_agreement(accelerator: Accelerator, start: checkpoint.Checkpoint | None, out: Path) -> None:
    """Make sure that all processes go on from the same checkpoint; called on every process.

    Raises:
        ValueError: they do not; on every process, with what each of them found.
    """
    mine = None if start is None else (start.step, start.checksum, str(start.path))
    words = disagreement(gather_object([mine]), out)
    if words:
        raise ValueError(words)


def disagreement(found: list[Found], out: Path) -> str:
    """Say which processes found which checkpoint, or nothing if all found the same.

    Args:
        found: by rank.
        out: the run's folder.
    """
    ranks: dict[tuple[int, str] | None, list[int]] = {}
    for rank, one in enumerate(found):
        ranks.setdefault(None if one is None else one[:2], []).append(rank)
    if len(ranks) == 1:
        return ""
    lines = []
    for what, who in ranks.items():
        names = f"rank{'s' if len(who) > 1 else ''} {', '.join(map(str, who))}"
        first = found[who[0]]
        lines.append(
            f"{names}: no checkpoint"
            if what is None or first is None
            else f"{names}: step {what[0]} ({first[2]}, checksum {what[1]})"
        )
    return (
        f"the processes found different checkpoints to go on from: {'; '.join(lines)}. --out ({out}) must be one "
        "folder that all machines share; put the checkpoint to go on from there, and start all of them again"
    )
