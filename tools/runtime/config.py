"""One typed configuration for a run: a TOML recipe, plus overrides from the command line."""

from __future__ import annotations

import difflib
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from model.config import ModelConfig
from pipeline.config import PipelineConfig
from tools.runtime.monitor import MonitorConfig
from tools.runtime.optim import OptimConfig
from tools.runtime.targets import LossConfig

AnyConfig = TypeVar("AnyConfig", bound=BaseModel)


class RunConfig(BaseModel):
    """Everything that defines a training run."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    data: Path = Path()
    """Shard set to train on (a folder made by tools/build_shards.py)."""

    extra: tuple[Path, ...] = ()
    """Further shard sets of the same classes to train on, such as DeepAugment's; an epoch then has all of them."""

    val: Path | None = None
    """Shard set for validation during training; unset: none."""

    out: Path = Path("runs/run")
    """Folder of the run: checkpoints, metrics.jsonl, TensorBoard files."""

    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of everything random: weights, order, crops, corruptions."""

    epochs: float | None = Field(None, gt=0)
    """Length of the run in passes over the data."""

    steps: int | None = Field(None, ge=1)
    """Length of the run in optimiser steps, instead of epochs."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast type of the model; fp32 is none. fp16 needs a GPU, where its losses are scaled."""

    log_every: int = Field(20, ge=1)
    """Steps between lines of progress and metrics."""

    checkpoint_every: int = Field(500, ge=1)
    """Steps between checkpoints; one is also written at the end and when the run is asked to stop."""

    checkpoint_async: bool = False
    """Write checkpoints in the background from a copy in host memory, while training goes on."""

    keep: int = Field(2, ge=1)
    """Checkpoints kept beside the best one; older ones are deleted once a newer one is complete."""

    val_every: int = Field(500, ge=1)
    """Steps between validations, where `val` is set; one is also made at the end."""

    images_every: int = Field(0, ge=0)
    """Steps between pictures of a training batch and of the codebook's usage in the trackers; 0: never."""

    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    """Where the metrics go beside metrics.jsonl."""

    sync_bn: bool = False
    """Batch normalisation over the batches of all GPUs together. GPUs only: torch has none for the CPU."""

    compile: bool = False
    """Compile the model with torch.compile."""

    cpu_affinity: Literal["none", "split", "numa"] = "none"
    """Which CPUs a process may use. split: an equal share of this machine's, in NUMA order. numa: those of its
    GPU's NUMA node."""

    data_warn_s: float = Field(60, gt=0)
    """A wait for data this long is reported, with what is being read, and again after each further such time."""

    data_stop_s: float = Field(1800, gt=0)
    """A wait for data this long ends the run with exit code 74."""

    join_within_s: float = Field(300, gt=0)
    """Time that all processes have to come together at the start; after it a process that waits ends."""

    lost_after_s: float = Field(45, gt=0)
    """A process of which the others hear nothing for so long is named and the run ends."""

    host_limit_gib: float | None = Field(None, gt=0)
    """Memory a process may hold; above it the run saves and stops with exit code 75. Looked at on log lines."""

    audit: bool = False
    """Write what every step trained on (sample, corruption, checksum of the pixels) to audit_rank*.jsonl."""

    pipeline: PipelineConfig = PipelineConfig()
    """Data side."""

    model: ModelConfig = ModelConfig()
    """Model."""

    optim: OptimConfig = OptimConfig()
    """Optimiser."""

    loss: LossConfig = LossConfig()
    """Loss."""

    monitor: MonitorConfig = MonitorConfig()
    """Validation."""

    @model_validator(mode="after")
    def _one_length(self) -> RunConfig:
        if self.epochs is not None and self.steps is not None:
            raise ValueError(f"say epochs ({self.epochs}) or steps ({self.steps}), not both")
        return self

    @model_validator(mode="after")
    def _parts_fit(self) -> RunConfig:
        if self.loss.consistency and not (self.pipeline.paired or self.pipeline.augmix == 2):
            raise ValueError(
                "loss.consistency compares views of one image; set pipeline.paired = true or pipeline.augmix = 2"
            )
        if self.pipeline.augmix == 2 and not self.loss.consistency:
            raise ValueError(
                "pipeline.augmix = 2 makes views for the consistency loss; set loss.consistency (12)"
            )
        if self.sync_bn and self.model.freeze_bn:
            raise ValueError("sync_bn computes statistics that model.freeze_bn does not use; choose one")
        if self.monitor.patience and self.val is None:
            raise ValueError("monitor.patience stops by validation scores; give --val")
        return self

    def total_steps(self, samples: int) -> int:
        """Return the length of the run in optimiser steps; the last epoch is rounded up to a whole batch."""
        if self.steps is not None:
            return self.steps
        if self.epochs is None:
            raise ValueError(
                "the run has no length: say epochs or steps, in the recipe or as --epochs N (the paper does not "
                "state its number of epochs)"
            )
        return max(1, -int(-self.epochs * samples // self.pipeline.batch_global))


# Settings that may differ between a checkpoint and the run that resumes it: none changes the samples, their pixels or
# the optimiser's steps (batch_per_gpu changes what batch normalisation sees at a time, as the number of ranks does).
# data and extra are only where the records stand: that they are the same ones is for the loader to check.
FREE_ON_RESUME = frozenset(
    {
        "data",
        "extra",
        "val",
        "out",
        "log_every",
        "checkpoint_every",
        "checkpoint_async",
        "keep",
        "val_every",
        "images_every",
        "trackers",
        "cpu_affinity",
        "data_warn_s",
        "data_stop_s",
        "join_within_s",
        "lost_after_s",
        "host_limit_gib",
        "audit",
        "pipeline.batch_per_gpu",
        "pipeline.threads",
        "pipeline.prefetch",
        "pipeline.read_threads",
        "pipeline.read_ahead",
        "pipeline.on_damaged",
    }
)


# What --allow-changes lets differ too: the state of a checkpoint fits whatever these are. (Weight decay and momentum do
# not belong here: they are part of the optimiser's saved state.)
CHANGEABLE_ON_RESUME = frozenset(
    {
        "epochs",
        "steps",
        "precision",
        "compile",
        "optim.lr",
        "optim.schedule",
        "optim.warmup_epochs",
        "optim.drop_epochs",
        "optim.drop_factor",
        "optim.min_lr",
        "optim.update",
        "optim.clip_norm",
        "optim.fused",
        "monitor.patience",
    }
)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one level with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, str]:
    """Return each setting that differs and changes what is computed, with "saved -> current"."""
    a, b = flatten(saved), flatten(current)
    return {
        name: f"{a.get(name, 'absent')} -> {b.get(name, 'absent')}"
        for name in sorted(a.keys() | b.keys())
        if name not in FREE_ON_RESUME and a.get(name) != b.get(name)
    }


def _names(config_type: type[BaseModel], prefix: str = "") -> list[str]:
    names = []
    for name, field in config_type.model_fields.items():
        names.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            names += _names(field.annotation, f"{prefix}{name}.")
    return names


def explain(error: ValidationError, config_type: type[BaseModel], where: str) -> str:
    """Put pydantic's findings in words: the key, what is wrong with it, and the nearest right one."""
    lines = []
    names = _names(config_type)
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            section, _, leaf = key.rpartition(".")
            here = [name.rpartition(".")[2] for name in names if name.rpartition(".")[0] == section]
            close = difflib.get_close_matches(leaf, here, n=1, cutoff=0.5)
            nearest = f"{section}.{close[0]}".removeprefix(".") if close else ""
            hint = f"; did you mean {nearest!r}?" if close else f"; known here: {', '.join(here)}"
            lines.append(f"{where}: unknown key {key!r}{hint}")
        else:
            message = item["msg"].removeprefix("Value error, ")
            got = f", got {item['input']!r}" if not isinstance(item["input"], Mapping | BaseModel) else ""
            lines.append(f"{where}: {key + ': ' if key else ''}{message}{got}")
    return "\n".join(lines)


def validated(config_type: type[AnyConfig], settings: Mapping[str, Any], where: str) -> AnyConfig:
    """Return the configuration made of `settings`; a ValueError says in words what is wrong and where."""
    try:
        return config_type.model_validate(dict(settings))
    except ValidationError as error:
        raise ValueError(explain(error, config_type, where)) from None


def read_recipe(path: Path) -> dict[str, Any]:
    """Return the settings of a TOML recipe.

    Raises:
        FileNotFoundError: naming the recipes there are.
        ValueError: if the file is not TOML.
    """
    if not path.is_file():
        folder = Path(__file__).resolve().parents[2] / "recipes"
        known = ", ".join(f"recipes/{p.name}" for p in sorted(folder.glob("*.toml")))
        raise FileNotFoundError(f"recipe {path} does not exist; the project's own are {known}")
    try:
        return tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not valid TOML: {error}") from None


def parse_command(command: type[AnyConfig], arguments: Sequence[str] | None = None) -> AnyConfig:
    """Build a command's configuration from `--recipe FILE` and typed overrides; exits with usage on bad ones.

    Args:
        command: a RunConfig subclass with a `recipe` field.
        arguments: the command line; sys.argv by default.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    default = command()
    recipe = _recipe_argument(arguments)
    if recipe is not None:
        default = validated(command, {**read_recipe(recipe), "recipe": recipe}, str(recipe))
    try:
        parsed = tyro.cli(command, args=arguments, default=default, description=command.__doc__)
    except ValidationError as error:
        raise ValueError(explain(error, command, "command line")) from None
    # tyro builds nested models one by one; this checks what spans them.
    return validated(command, parsed.model_dump(), "command line")


def _recipe_argument(arguments: Sequence[str]) -> Path | None:
    for i, argument in enumerate(arguments):
        if argument == "--recipe" and i + 1 < len(arguments):
            return Path(arguments[i + 1])
        if argument.startswith("--recipe="):
            return Path(argument.removeprefix("--recipe="))
    return None
