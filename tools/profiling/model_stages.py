"""Turns watched training steps into the stages of the model's lane."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tools.profiling.attached import Step
from tools.profiling.clock import Probe
from tools.profiling.table import Spread, Stage

CHECKPOINT = "checkpoint"
_NOTHING = Spread(p20=0.0, p50=0.0, p80=0.0)


def _less(whole: Spread | None, part: Spread | None) -> Spread | None:
    """Return whole - part where both are known, at least zero."""
    if whole is None or part is None:
        return whole
    left = max(0.0, whole.p50 - part.p50)
    # The spread of what is left is the whole's own: the part was measured elsewhere.
    return Spread(
        p20=max(0.0, left - (whole.p50 - whole.p20)), p50=left, p80=max(left, left + whole.p80 - whole.p50)
    )


def stages(
    steps: Sequence[Step],
    images: int,
    *,
    extra: Mapping[str, Probe],
    unsynchronised: Sequence[Step],
    checkpoint_s: Sequence[float],
    checkpoint_every: int,
    gpu: bool,
) -> list[Stage]:
    """Return the stages of one process's training loop on data that is there.

    Args:
        steps: steps of the model alone, watched.
        images: images of such a step.
        extra: what was measured alone, by name: codebook search (taken out of the forward pass), copy to GPU, AugMix,
            all-reduce.
        unsynchronised: steps whose gradients were not averaged; empty for one process.
        checkpoint_s: seconds to write a checkpoint, spread over the images between two of them.
    """

    def piece(name: str, among: Sequence[Step]) -> tuple[Spread, Spread, Spread | None]:
        wall = Spread.of([step.wall_s[name] / images for step in among])
        cpu = Spread.of([step.cpu_s[name] / images for step in among])
        device = Spread.of([step.device_s[name] / images for step in among]) if gpu else None
        # On a GPU the host only queues work: the time that passes is the device's.
        return (device or wall), cpu, device

    search, copy, all_reduce = (extra.get(name) for name in ("codebook search", "copy to GPU", "all-reduce"))
    wall, cpu, device = piece("forward", steps)
    found = []
    if (views := extra.get("AugMix")) is not None:
        found.append(
            Stage(
                name="AugMix",
                lane="model",
                wall_s=views.wall(),
                cpu_s=views.cpu(),
                device_s=views.on_device(),
            )
        )
    if copy is not None:
        found.append(
            Stage(
                name="copy to GPU",
                lane="model",
                wall_s=copy.wall(),
                cpu_s=copy.cpu(),
                device_s=copy.on_device(),
            )
        )
    else:
        found.append(Stage(name="copy to GPU", lane="shown", wall_s=None, note="no GPU: nothing is copied"))
    if search is not None:
        wall, cpu = _less(wall, search.wall()) or wall, _less(cpu, search.cpu()) or cpu
        device = _less(device, search.on_device())
    found.append(Stage(name="forward", lane="model", wall_s=wall, cpu_s=cpu, device_s=device))
    if search is not None:
        found.append(
            Stage(
                name="codebook search",
                lane="model",
                wall_s=search.wall(),
                cpu_s=search.cpu(),
                device_s=search.on_device(),
            )
        )
    wall, cpu, device = piece("backward", steps)
    if unsynchronised and all_reduce is not None:
        alone_wall, alone_cpu, alone_device = piece("backward", unsynchronised)
        found.append(
            Stage(name="backward", lane="model", wall_s=alone_wall, cpu_s=alone_cpu, device_s=alone_device)
        )
        found.append(
            Stage(
                name="all-reduce",
                lane="model",
                wall_s=_less(wall, alone_wall),
                cpu_s=_less(cpu, alone_cpu),
                device_s=_less(device, alone_device),
                note="what it adds to the backward pass, which it overlaps with",
            )
        )
        found.append(
            Stage(
                name="all-reduce, alone",
                lane="shown",
                wall_s=all_reduce.wall(),
                cpu_s=all_reduce.cpu(),
                device_s=all_reduce.on_device(),
                note="a gradient's worth of numbers, nothing beside it",
            )
        )
    else:
        found.append(Stage(name="backward", lane="model", wall_s=wall, cpu_s=cpu, device_s=device))
        found.append(
            Stage(name="all-reduce", lane="shown", wall_s=None, note="one process: nothing to average")
        )
    for name in ("optimiser", "rest"):
        wall, cpu, device = piece(name, steps)
        note = "metrics, zeroing gradients, between steps" if name == "rest" else ""
        shown = "loop" if name == "rest" else name
        found.append(Stage(name=shown, lane="model", wall_s=wall, cpu_s=cpu, device_s=device, note=note))
    if checkpoint_s:
        every = Spread.of(checkpoint_s).times(1 / (checkpoint_every * images))
        note = f"{Spread.of(checkpoint_s).p50:.2f} s every {checkpoint_every} steps"
        found.append(Stage(name=CHECKPOINT, lane="model", wall_s=every, cpu_s=_NOTHING, note=note))
    return found
