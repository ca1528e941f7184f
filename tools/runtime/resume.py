"""Where a run starts: from nothing, or from a checkpoint of the same configuration and data."""

from __future__ import annotations

from pathlib import Path

from tools.runtime import checkpoint
from tools.runtime.config import RunConfig, differences, validated


class Progress:
    """How far the run is; saved in every checkpoint."""

    def __init__(self) -> None:
        self.step = 0
        self.skipped = 0
        """Steps without an update because fp16 gradients overflowed."""

    def state_dict(self) -> dict[str, int]:
        """Return the number of optimiser steps done and how many of them were skipped."""
        return {"step": self.step, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after that many steps."""
        self.step, self.skipped = state["step"], state["skipped"]


def starting_point(resume: str, config: RunConfig, classes: list[str]) -> checkpoint.Checkpoint | None:
    """Return the checkpoint to go on from, or None to start.

    Args:
        resume: "no", "auto" or a path, see TrainCommand.resume.

    Raises:
        ValueError: the folder holds another run, or the checkpoint is of other settings or classes, or damaged.
        FileNotFoundError: no checkpoint at the path.
    """
    folder = config.out / "checkpoints"
    if resume == "no":
        if checkpoint.complete(folder):
            raise ValueError(
                f"{config.out} already holds a run; say --resume auto to go on with it, or choose another --out"
            )
        return None
    if resume == "auto":
        start = checkpoint.newest_sound(folder)
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
        # A setting that came after the checkpoint had its default.
        saved = validated(RunConfig, start.config, str(start.path)).model_dump(mode="json")
        changed = differences(saved, config.model_dump(mode="json"))
        if changed:
            raise ValueError(
                f"{start.path} was made with another configuration ({'; '.join(changed)}); go on with the same "
                "settings, or start a new run in another --out"
            )
    return start
