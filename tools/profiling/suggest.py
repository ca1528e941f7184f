"""What would help this run, each with the rate it would give: computed from the stage times of this profile."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pipeline.config import PipelineConfig
from shards import Store
from tools.profiling.graphs import DECODE_SMALL, SMALL_SIDE
from tools.profiling.table import LANE_WORDS, Profile, Spread, Stage, Suggestion
from tools.profiling.verdict import loads, predicted_img_s
from tools.runtime.config import RunConfig

LEAST_GAIN = 0.02
_CHEAP_PRECISION = "bf16"


def worth_resizing(config: PipelineConfig, store: Store) -> bool:
    """Whether the stored images are clearly larger than training at this size needs."""
    shorter = np.minimum(store.width, store.height)
    return bool(np.median(shorter) > 1.25 * max(SMALL_SIDE, config.resize_shorter)) and (
        config.resize_shorter <= SMALL_SIDE
    )


def _scaled(stages: list[Stage], factor: Callable[[Stage], tuple[float, float]]) -> list[Stage]:
    """Return the stages with their (wall and GPU, CPU) times multiplied."""
    changed = []
    for stage in stages:
        wall, cpu = factor(stage)

        def times(spread: Spread | None, by: float) -> Spread | None:
            return None if spread is None else spread.times(by)

        changed.append(
            stage.model_copy(
                update={
                    "wall_s": times(stage.wall_s, wall),
                    "cpu_s": times(stage.cpu_s, cpu),
                    "device_s": times(stage.device_s, wall),
                }
            )
        )
    return changed


def suggestions(profile: Profile, config: RunConfig, store: Store) -> list[Suggestion]:
    """Return what would raise the rate by 2 % at least, best first."""
    stages, cores, ranks = profile.stages, profile.machine.cores, profile.machine.ranks
    named = {stage.name: stage for stage in stages}
    now = predicted_img_s(stages, cores, ranks)
    measured = profile.verdict.with_checkpoints_img_s
    full = loads(stages, cores)
    binding = max(full, key=full.__getitem__)
    pipeline = config.pipeline
    found: list[Suggestion] = []

    def add(words: str, change: str, how: str, factor: Callable[[Stage], tuple[float, float]]) -> None:
        # Relative to the measured rate: what the prediction is off by cancels.
        rate = measured * predicted_img_s(_scaled(stages, factor), cores, ranks) / now
        if rate >= measured * (1 + LEAST_GAIN):
            found.append(
                Suggestion.model_validate({"words": words, "change": change, "rate_img_s": rate, "how": how})
            )

    same = (1.0, 1.0)
    if binding == LANE_WORDS["graph"] and cores > pipeline.threads and profile.machine.device == "cpu":
        threads = int(cores)
        if threads > pipeline.threads:
            share = pipeline.threads / threads
            add(
                f"The data graph limits and {cores:.1f} cores are there: use {threads} DALI threads instead of "
                f"{pipeline.threads}",
                f"--pipeline.threads {threads}",
                "computed",
                lambda stage: (share, 1.0) if stage.lane == "graph" else same,
            )
    if binding == LANE_WORDS["read"]:
        add(
            f"Reading limits: read with {2 * pipeline.read_threads} threads instead of {pipeline.read_threads}, if the "
            "storage serves more requests at a time",
            f"--pipeline.read-threads {2 * pipeline.read_threads}",
            "at most",
            lambda stage: (0.5, 1.0) if stage.name == "read" else same,
        )
    read, warm = named.get("read"), named.get("read, warm")
    if read and warm and read.wall_s and warm.wall_s and read.wall_s.p50 > warm.wall_s.p50 > 0:
        share = warm.wall_s.p50 / read.wall_s.p50
        add(
            "Records come from the disk: a machine whose memory holds the set, or a faster disk, reads them as fast as "
            "the page cache does",
            "",
            "at most",
            lambda stage: (share, 1.0) if stage.name == "read" else same,
        )
    decode, small = named.get("decode"), named.get(DECODE_SMALL)
    if decode and small and decode.wall_s and small.wall_s and decode.cpu_s and small.cpu_s:
        wall, cpu = small.wall_s.p50 / decode.wall_s.p50, small.cpu_s.p50 / max(decode.cpu_s.p50, 1e-12)
        shorter = float(np.median(np.minimum(store.width, store.height)))
        add(
            f"Images are stored at {shorter:.0f} px (shorter side, median): build the shards with images resized to "
            f"{SMALL_SIDE} px; decoding them was measured",
            "",
            "computed",
            lambda stage: (wall, cpu) if stage.name == "decode" else same,
        )
    if profile.machine.device == "cuda" and pipeline.decode == "exact":
        add(
            "Let the GPU's hardware JPEG decoder take its share; its pixels differ slightly from the other decoder's",
            "--pipeline.decode fast",
            "at most",
            lambda stage: (0.0, 0.0) if stage.name == "decode" else same,
        )
    add_corruptions(profile, add)
    peaks = profile.machine.peak_tflops
    if config.precision == "fp32" and peaks.get(_CHEAP_PRECISION, 0) > 1.2 * peaks["fp32"]:
        times = peaks[_CHEAP_PRECISION] / peaks["fp32"]
        add(
            f"Matrix products in {_CHEAP_PRECISION} are {times:.1f} times as fast here as in fp32",
            f"--precision {_CHEAP_PRECISION}",
            "at most",
            lambda stage: (1 / times, 1 / times) if stage.name in ("forward", "backward") else same,
        )
    saving = named.get("checkpoint")
    if saving and saving.counts:
        add(
            f"Write checkpoints every {4 * config.checkpoint_every} steps instead of {config.checkpoint_every}",
            f"--checkpoint-every {4 * config.checkpoint_every}",
            "computed",
            lambda stage: (0.25, 0.25) if stage.name == "checkpoint" else same,
        )
    wait = profile.verdict.data_wait_pct / 100
    alone = profile.rates_img_s.get("loader alone")
    if (
        alone
        and wait > LEAST_GAIN
        and alone.p50 > 1.2 * profile.verdict.measured_img_s
        and binding == LANE_WORDS["model"]
    ):
        found.append(
            Suggestion(
                words=f"The loop waits for data {100 * wait:.0f} % of the time although the loader alone is faster: "
                f"let DALI work on {2 * pipeline.prefetch} batches ahead instead of {pipeline.prefetch}",
                change=f"--pipeline.prefetch {2 * pipeline.prefetch}",
                rate_img_s=measured / (1 - wait),
                how="at most",
            )
        )
    return sorted(found, key=lambda s: -s.rate_img_s)


def add_corruptions(profile: Profile, add: Callable[..., None]) -> None:
    """Suggest to leave out the dearest kind where it takes far more than its part of the corruption time."""
    kinds = {
        stage.name.removeprefix("corrupt: "): stage.cpu_s.p50 if stage.cpu_s else 0.0
        for stage in profile.stages
        if stage.name.startswith("corrupt: ")
    }
    total = sum(kinds.values())
    if len(kinds) < 2 or total <= 0:
        return
    dearest = max(kinds, key=kinds.__getitem__)
    share = kinds[dearest] / total
    if share > 2 / len(kinds):
        left = 1 - share
        add(
            f"{dearest} takes {100 * share:.0f} % of the corruption time; without it the model is trained on "
            f"{len(kinds) - 1} kinds",
            "--pipeline.kinds " + " ".join(kind for kind in kinds if kind != dearest),
            "computed",
            lambda stage: (left, left) if stage.name == "corrupt" else (1.0, 1.0),
        )
