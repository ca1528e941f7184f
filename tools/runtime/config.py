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

AnyConfig = TypeVar("AnyConfig", bound=BaseModel)


class OptimConfig(BaseModel):
    """Optimiser and learning-rate schedule."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: Literal["adam", "sgd"] = "adam"
    """Optimiser."""

    lr: float = Field(1e-3, gt=0)
    """Initial learning rate."""

    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of SGD; Adam uses its usual betas (0.9, 0.999)."""

    weight_decay: float = Field(0.0, ge=0)
    """L2 weight decay, on all parameters, as torch's Adam and SGD apply it."""

    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate over the run."""

    min_lr: float = Field(0.0, ge=0)
    """Where the cosine ends."""

    update: Literal["step", "epoch"] = "step"
    """Whether the learning rate changes after every step or after every epoch."""


class RunConfig(BaseModel):
    """Everything that defines a training run."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    data: Path = Path()
    """Shard set to train on (a folder made by tools/build_shards.py)."""

    val: Path | None = None
    """Shard set for clean validation during training; unset: none."""

    out: Path = Path("runs/run")
    """Folder of the run: checkpoints, metrics.jsonl, TensorBoard files."""

    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of everything random: weights, order, crops, corruptions."""

    epochs: float | None = Field(None, gt=0)
    """Length of the run in passes over the data."""

    steps: int | None = Field(None, ge=1)
    """Length of the run in optimiser steps, instead of epochs."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast type of the model; fp32 is none. fp16 is meant for GPUs, where its losses are scaled."""

    log_every: int = Field(20, ge=1)
    """Steps between lines of progress and metrics."""

    checkpoint_every: int = Field(500, ge=1)
    """Steps between checkpoints; one is also written at the end and on Ctrl-C."""

    keep: int = Field(2, ge=1)
    """Checkpoints kept; older ones are deleted once a newer one is complete."""

    val_every: int = Field(500, ge=1)
    """Steps between validations, where `val` is set; one is also made at the end."""

    pipeline: PipelineConfig = PipelineConfig()
    """Data side."""

    model: ModelConfig = ModelConfig()
    """Model."""

    optim: OptimConfig = OptimConfig()
    """Optimiser."""

    @model_validator(mode="after")
    def _one_length(self) -> RunConfig:
        if self.epochs is not None and self.steps is not None:
            raise ValueError(f"say epochs ({self.epochs}) or steps ({self.steps}), not both")
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
FREE_ON_RESUME = frozenset(
    {
        "data",
        "val",
        "out",
        "log_every",
        "checkpoint_every",
        "keep",
        "val_every",
        "pipeline.batch_per_gpu",
        "pipeline.threads",
        "pipeline.read_threads",
        "pipeline.read_ahead",
        "pipeline.on_damaged",
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


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Return a line for each setting that differs and may not: "name: saved -> current"."""
    a, b = flatten(saved), flatten(current)
    return [
        f"{name}: {a.get(name, 'absent')} -> {b.get(name, 'absent')}"
        for name in sorted(a.keys() | b.keys())
        if name not in FREE_ON_RESUME and a.get(name) != b.get(name)
    ]


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
