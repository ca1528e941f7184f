"""Turns watched training steps into the stages of the model's lane."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from tools.profiling.attached import Step
from tools.profiling.clock import Probe
from tools.profiling.table import Spread, Stage

CHECKPOINT = "checkpoint"
_NOTHING = Spread(p20=0.0, p50=0.0, p80=0.0)


def _less(whole: Spread | None, part: Spread | None) -> Spread | None:
    """Return whole - part where both are known."""
    return whole if whole is None or part is None else whole.less(part)


def _without(stage: Stage, part: Stage) -> Stage:
    """Return a stage without what another one is of it."""
    return stage.model_copy(
        update={
            "wall_s": _less(stage.wall_s, part.wall_s),
            "cpu_s": _less(stage.cpu_s, part.cpu_s),
            "device_s": _less(stage.device_s, part.device_s),
        }
    )


def stages(
    measured: Sequence[Sequence[Step]],
    images: int,
    *,
    extra: Mapping[str, Probe],
    unsynchronised: Sequence[Sequence[Step]],
    checkpoint_s: Sequence[float],
    checkpoint_every: int,
    gpu: bool,
) -> list[Stage]:
    """Return the stages of one process's training loop on data that is there, and the copies beside it.

    Args:
        measured: watched steps of the model alone, by measurement.
        images: images of such a step.
        extra: what was measured alone, by name: codebook search (taken out of the forward pass), copy to GPU, AugMix,
            all-reduce.
        unsynchronised: steps whose gradients were not averaged; empty for one process.
        checkpoint_s: seconds to write a checkpoint, spread over the images between two of them.
    """

    def piece(
        name: str, among: Sequence[Sequence[Step]] = measured, shown: str = "", note: str = ""
    ) -> Stage:
        # Means over a measurement's steps, as of everything else: medians of pieces do not add up to a step's.
        def spread(side: str) -> Spread:
            return Spread.of([fmean(getattr(step, side)[name] / images for step in steps) for steps in among])

        wall, cpu, device = spread("wall_s"), spread("cpu_s"), spread("device_s") if gpu else None
        # On a GPU the host only queues work: the time that passes is the device's.
        return Stage(
            name=shown or name, lane="model", wall_s=device or wall, cpu_s=cpu, device_s=device, note=note
        )

    search, copy, all_reduce, views = (
        extra.get(name) for name in ("codebook search", "copy to GPU", "all-reduce", "AugMix")
    )
    found = []
    if copy is not None:
        # The copy engine works beside the model; DALI's decoder waits for it, and has it in its own time too.
        found.append(copy.stage("copy"))
    else:
        found.append(Stage(name="copy to GPU", lane="shown", wall_s=None, note="no GPU: nothing is copied"))
    if views is not None:
        found.append(views.stage("model"))
    forward = piece("forward")
    if search is not None:
        found += [_without(forward, search.stage("model")), search.stage("model")]
    else:
        found.append(forward)
    backward = piece("backward")
    if unsynchronised and all_reduce is not None:
        alone = piece("backward", unsynchronised)
        added = _without(backward, alone).model_copy(
            update={
                "name": "all-reduce",
                "note": "what it adds to the backward pass, which it overlaps with",
            }
        )
        note = "a gradient's worth of numbers, nothing beside it"
        found += [alone, added, all_reduce.stage("shown", "all-reduce, alone", note)]
    else:
        note = "one process: nothing to average"
        found += [backward, Stage(name="all-reduce", lane="shown", wall_s=None, note=note)]
    found.append(piece("optimiser"))
    found.append(piece("rest", shown="loop", note="metrics, zeroing gradients, between steps"))
    if checkpoint_s:
        every = Spread.of(checkpoint_s).times(1 / (checkpoint_every * images))
        note = f"{Spread.of(checkpoint_s).p50:.2f} s every {checkpoint_every} steps"
        found.append(Stage(name=CHECKPOINT, lane="model", wall_s=every, cpu_s=_NOTHING, note=note))
    return found
