"""From stage times to a rate, and to the stage that limits it. Pure arithmetic.

Reader threads, DALI's threads, the GPU's copy engine and the training loop work side by side, each on another
batch: four lanes. Within a lane stages follow one another. So the time of one image is that of the slowest lane,
unless what the lanes share is full before: the CPU cores (all stages' CPU time over the cores), or the GPU (all
stages' GPU time; copies take none of it, the copy engine works beside the multiprocessors).

    seconds per image = max(lane read, lane graph, lane copy, lane model, CPU seconds / cores, GPU seconds)

Before the cores are full, lanes can already be in each other's way: the system deals cores out to all threads alike,
and the threads of a lane that will wait for room in its queue later take them from the slowest lane now. With the
cores p_l = CPU seconds / seconds that a lane keeps busy when alone, slowest lane s and `cores` C, another lane l gets
its work done in T_l (p_s + p_l) / C, in which the slowest lane moves on by T_l only:

    seconds per image >= T_s + sum over l of T_l max(0, (p_s + p_l) / C - 1)

For lanes that fill the cores alone (p = C) this is CPU seconds / cores; for p_s + p_l <= C it is T_s. A lane that
works on a device has p = 0: others do not stretch the device's time. What its host thread needs counts in the CPU
seconds alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from tools.profiling.table import LANE_WORDS, Limit, Stage

CORES, GPU = "the CPU cores", "the GPU"


def loads(stages: Sequence[Stage], cores: float) -> dict[str, float]:
    """Return the seconds per image that each lane and each shared resource needs, by its words."""
    counted = [stage for stage in stages if stage.counts]
    result = {
        words: sum(stage.wall_s.p50 for stage in counted if stage.lane == lane and stage.wall_s is not None)
        for lane, words in LANE_WORDS.items()
    }
    result[CORES] = sum(stage.cpu_s.p50 for stage in counted if stage.cpu_s is not None) / cores
    result[GPU] = sum(share_s(stage, GPU, cores) for stage in counted)
    return result


def crowded_s(stages: Sequence[Stage], cores: float) -> float:
    """Return the seconds per image that the slowest lane needs when it shares the cores with the others."""
    lanes = {
        lane: (
            sum(s.wall_s.p50 for s in among if s.wall_s),
            0.0 if any(s.device_s for s in among) else sum(s.cpu_s.p50 for s in among if s.cpu_s),
        )
        for lane in LANE_WORDS
        if (among := [stage for stage in stages if stage.counts and stage.lane == lane])
    }
    lanes = {lane: (wall_s, cpu_s) for lane, (wall_s, cpu_s) in lanes.items() if wall_s > 0}
    if not lanes:
        return 0.0
    busy = {lane: min(cores, cpu_s / wall_s) for lane, (wall_s, cpu_s) in lanes.items()}
    slowest = max(lanes, key=lambda lane: lanes[lane][0])
    lost_s = sum(
        wall_s * max(0.0, (busy[slowest] + busy[lane]) / cores - 1)
        for lane, (wall_s, _) in lanes.items()
        if lane != slowest
    )
    return lanes[slowest][0] + lost_s


def predicted_img_s(stages: Sequence[Stage], cores: float, ranks: int = 1) -> float:
    """Return images per second of all processes together; infinite for stages that cost nothing."""
    longest_s = max(*loads(stages, cores).values(), crowded_s(stages, cores))
    return ranks / longest_s if longest_s > 0 else float("inf")


def share_s(stage: Stage, binding: str, cores: float) -> float:
    """Return what a stage adds to one of the `loads`, in seconds per image."""
    if not stage.counts or stage.wall_s is None:
        return 0.0
    if binding == CORES:
        return stage.cpu_s.p50 / cores if stage.cpu_s is not None else 0.0
    if binding == GPU:
        computes = stage.device_s is not None and stage.lane != "copy"
        return stage.device_s.p50 if computes and stage.device_s else 0.0
    return stage.wall_s.p50 if LANE_WORDS.get(stage.lane) == binding else 0.0


def limit(stages: Sequence[Stage], cores: float, ranks: int = 1) -> Limit | None:
    """Return the limiting stage: the one without which the run would be fastest; None if nothing costs anything.

    Where two lanes are equally slow no single stage helps; then it is the largest of a slowest lane.
    """
    all_loads = loads(stages, cores)
    binding = max(all_loads, key=all_loads.__getitem__)
    if all_loads[binding] <= 0:
        return None
    now = predicted_img_s(stages, cores, ranks)

    def without(stage: Stage) -> float:
        return predicted_img_s([other for other in stages if other is not stage], cores, ranks)

    chosen = max(
        (stage for stage in stages if stage.counts),
        key=lambda stage: (without(stage), share_s(stage, binding, cores)),
    )
    return Limit(
        stage=chosen.name,
        lane=chosen.lane,
        rate_img_s=now,
        rate_if_free_img_s=without(chosen),
        binding=binding,
    )


def limits(stages: Sequence[Stage], cores: float, ranks: int = 1, count: int = 3) -> list[Limit]:
    """Return the limiting stage, the one that limits once it is free, and so on; `count` at most."""
    left = list(stages)
    found: list[Limit] = []
    while len(found) < count:
        one = limit(left, cores, ranks)
        if one is None or one.rate_if_free_img_s == float("inf"):
            # Nothing would be left: JSON has no infinity, and no one could train so fast.
            if one is not None and not found:
                found.append(one.model_copy(update={"rate_if_free_img_s": one.rate_img_s}))
            break
        found.append(one)
        left = [stage for stage in left if stage.name != one.stage]
    return found
