"""What a profile holds: stages, rates, machine, verdict. Written as JSON, read back by `--compare`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

FORMAT = 2

Lane = Literal["read", "graph", "copy", "model", "shown"]
"""Chains that work side by side: reader threads, DALI's threads, the GPU's copy engine, the training loop. A stage
"shown" is measured, and counts in no sum because it is part of another stage or an alternative to it."""

LANE_WORDS = {
    "read": "reading",
    "graph": "the data graph",
    "copy": "copies to the GPU",
    "model": "the model",
}


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Spread(_Frozen):
    """20th, 50th and 80th percentile of repeated measurements."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise at least one value."""
        ordered = sorted(values)
        last = len(ordered) - 1
        return cls(
            p20=ordered[round(last * 0.2)], p50=ordered[round(last * 0.5)], p80=ordered[round(last * 0.8)]
        )

    def times(self, factor: float) -> Spread:
        """Scale all three."""
        return Spread(p20=self.p20 * factor, p50=self.p50 * factor, p80=self.p80 * factor)

    def less(self, part: Spread) -> Spread:
        """Return this without a part that was measured elsewhere, at least zero; the ends are the worst cases."""
        return Spread(
            p20=max(0.0, self.p20 - part.p80),
            p50=max(0.0, self.p50 - part.p50),
            p80=max(0.0, self.p80 - part.p20),
        )


class Stage(_Frozen):
    """One stage alone. All times are seconds per image of one process."""

    name: str
    lane: Lane
    wall_s: Spread | None
    """Time passed, with as many threads as the run gives the stage; None where it was not measured."""
    cpu_s: Spread | None = None
    """CPU time of the whole process, over all its threads."""
    device_s: Spread | None = None
    """GPU time; of the copy engine for a copy, of the multiprocessors else. None on a CPU."""
    note: str = ""
    """Why a time is missing, or what it is part of."""

    @property
    def counts(self) -> bool:
        """Whether the stage is part of the prediction."""
        return self.lane != "shown" and self.wall_s is not None


class Machine(_Frozen):
    """What the run had to work with."""

    device: Literal["cpu", "cuda"]
    name: str
    ranks: int
    cores: float
    """CPU cores that one process really got, measured: other programs, quotas and the other ranks take theirs."""
    peak_tflops: dict[str, float]
    """Largest rate of a square matrix product in this run, by type: fp32, bf16 …"""


class Trial(_Frozen):
    """One change measured against the run as it is, in turns."""

    change: str
    rate_img_s: Spread | None
    """None where it did not run; `note` says why."""
    baseline_img_s: Spread | None
    note: str = ""


class Suggestion(_Frozen):
    """Something that would help this run."""

    words: str
    change: str
    """The setting, as on the command line; empty where it is no setting."""
    rate_img_s: float
    """Images per second with it."""
    how: Literal["computed", "at most", "measured"]


class Point(_Frozen):
    """One setting of a sweep."""

    value: int
    rate_img_s: Spread | None
    """None where it did not run; `note` says why."""
    efficiency: float | None = None
    """Rate over what perfect scaling from the first point would give, or for batches over the best rate."""
    hours_per_epoch: float | None = None
    note: str = ""


class Sweep(_Frozen):
    """Rate over one setting."""

    setting: Literal["batch", "threads", "ranks"]
    points: list[Point]
    knee: int | None
    """The smallest value that reaches 90 % of the best rate."""


class Span(_Frozen):
    """A piece of the timeline, in seconds since its start."""

    lane: str
    name: str
    start_s: float
    seconds: float


class Limit(_Frozen):
    """What binds the run."""

    stage: str
    lane: Lane
    rate_img_s: float
    """Predicted rate while it binds."""
    rate_if_free_img_s: float
    """Predicted rate if the stage cost nothing."""
    binding: str
    """What is full: a lane, the CPU cores or the GPU."""


class Verdict(_Frozen):
    """The numbers behind the words."""

    predicted_img_s: float
    """From the stages, without checkpoints."""
    measured_img_s: float
    """Of whole training steps; none of them writes a checkpoint."""
    predicted_over_measured: Spread
    """The same two numbers' ratio, round by round: what a machine's drift does to both cancels."""
    with_checkpoints_img_s: float
    """The measured rate with the time of the run's checkpoints added."""
    limits: list[Limit]
    """The limiting stage, then what limits once it is free, and so on."""
    data_wait_pct: float
    cpu_busy_pct: float
    gpu_busy_pct: float | None
    """None without a GPU."""
    mfu_pct: float
    """Model FLOP per second over the measured peak of the run's type, end to end."""
    hours_per_epoch: float


class Profile(_Frozen):
    """One profile of one run on one machine."""

    format: Literal[2] = 2
    environment: dict[str, Any]
    settings: dict[str, Any]
    """Resolved configuration, one level, dotted names."""
    samples: int
    batch_per_rank: int
    machine: Machine
    stages: list[Stage]
    rates_img_s: dict[str, Spread]
    """Images per second of all processes: "loader alone", "model alone", "both"."""
    gflop_per_image: float
    verdict: Verdict
    suggestions: list[Suggestion]
    trials: list[Trial] = []
    sweeps: list[Sweep] = []
    timeline: list[Span] = []
    warnings: list[str] = []


def write(profile: Profile, path: Path) -> None:
    """Write the profile as JSON; an earlier one is replaced only by a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".tmp")
    part.write_text(profile.model_dump_json(indent=1) + "\n")
    part.replace(path)


def read(path: Path) -> Profile:
    """Read a profile.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no profile, or of another version.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a profile.json of tools/profile_throughput.py")
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); give a profile.json") from None
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise ValueError(
            f"{path} is no profile of format {FORMAT} (found {found!r}); measure again with this version"
        )
    try:
        return Profile.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{path} is a damaged profile ({where}: {first['msg']}); measure again") from None
