"""The models to score: our checkpoints, torchvision's and timm's by name, and anyone's Python callable."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torchvision
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor, nn

import model
from pipeline.config import PipelineConfig
from pipeline.corruptions.kinds import suggest
from tools.evaluation.classes import imagenet_classes
from tools.runtime import checkpoint
from tools.runtime.config import RunConfig, validated


class Preprocessing(BaseModel):
    """What a model wants to be shown: resize the shorter side, crop the centre, (x / 255 - mean) / std."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    mean: tuple[float, float, float]
    """Channel means, as fractions of 255."""

    std: tuple[float, float, float]
    """Channel standard deviations, as fractions of 255."""

    size: int = Field(224, ge=32)
    """Side of the centre crop, in pixels."""

    resize: int = Field(256, ge=32)
    """Shorter side before the crop, in pixels."""

    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Filter of the resize, antialiased."""

    constants: Literal["auto", "imagenet", "tiny_imagenet", "cifar10"] = "auto"
    """Severity constants of the corruptions; auto goes by the size."""

    @model_validator(mode="after")
    def _crop_fits(self) -> Preprocessing:
        if self.resize < self.size:
            raise ValueError(f"resize ({self.resize}) is smaller than the crop ({self.size})")
        return self

    def pipeline(self, threads: int) -> PipelineConfig:
        """Return the loader's settings."""
        return PipelineConfig(
            image_size=self.size,
            eval_resize=self.resize,
            eval_interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            constants=self.constants,
            threads=threads,
        )


@dataclass(frozen=True)
class Signals:
    """What a model says about B images: logits (B, C) float32; features before and after quantisation and
    attention (B, D), the same tensor without a codebook, None where there is none; quantised (B, D), the code of the
    feature; codes int64 (B, positions)."""

    logits: Tensor
    before: Tensor | None
    after: Tensor | None
    quantised: Tensor | None = None
    codes: Tensor | None = None


@dataclass
class Classifier:
    """A model in evaluation mode with all that is needed to score it.

    trained_on: the corruptions it was trained on; None where that is not known.
    source: where it comes from, for the results.
    """

    name: str
    net: nn.Module
    preprocessing: Preprocessing
    classes: list[str]
    source: dict[str, Any]
    trained_on: tuple[str, ...] | None = None
    _feature: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.net.eval()
        if isinstance(self.net, model.VQSA):
            return
        linear = [m for m in self.net.modules() if isinstance(m, nn.Linear)]
        # The input of the last linear layer is the feature; a network that ends otherwise has none to compare.
        if linear and linear[-1].out_features == len(self.classes):
            linear[-1].register_forward_pre_hook(self._keep)

    def _keep(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._feature[:] = [inputs[0]]

    def compile(self) -> None:
        """Have the network compiled at the first batch, with batch normalisation folded into frozen weights.

        They are not to change from then on. Images are to come in batches of few sizes: each is compiled for.
        """
        # Of the whole process: as an option of one call it comes too late, weights are arguments of the graph by then.
        # It does not concern graphs that take gradients.
        torch._inductor.config.freezing = True
        # Each set has a last batch of its own size, and beyond the limit all would silently run as they are.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        self.net.compile(dynamic=False)

    @property
    def codes(self) -> int:
        """Size of the codebook; 0 without one."""
        if not isinstance(self.net, model.VQSA) or self.net.codebook is None:
            return 0
        return self.net.config.codes

    def __call__(self, images_BCHW: Tensor) -> Signals:
        if isinstance(self.net, model.VQSA):
            out = self.net(images_BCHW, return_features=True)
            codes = None if out.code_index is None else out.code_index.flatten(1)
            quantised = None if out.quantised is None else out.quantised.float()
            return Signals(out.logits.float(), out.z.float(), out.fused.float(), quantised, codes)
        logits: Tensor = self.net(images_BCHW)
        feature = self._feature.pop().float().flatten(1) if self._feature else None
        return Signals(logits.float(), feature, feature)


def from_checkpoint(path: Path) -> Classifier:
    """Open a run's newest checkpoint, or a checkpoint folder.

    A folder of tools/export.py is for use elsewhere: it does not say which corruptions the model was trained on.

    Raises:
        FileNotFoundError: no checkpoint there, one without its configuration, or an exported folder.
        ValueError: a damaged one.
    """
    if (path / "model.safetensors").is_file() and not (path / checkpoint.RUN_FILE).is_file():
        if (path / "config.json").is_file():
            raise FileNotFoundError(
                f"{path} is an exported model, which does not say what it was trained on or how images were resized; "
                "give the run or the checkpoint it was exported from"
            )
        raise FileNotFoundError(
            f"{path} has weights but no {checkpoint.RUN_FILE}: without its configuration nobody knows what the "
            "model is or how its images were prepared; copy the whole checkpoint folder"
        )
    found = checkpoint.newest(path)
    config = validated(RunConfig, found.config, str(found.path))
    # Every tensor comes from the checkpoint, so the weights training started from are not needed.
    net = model.build(config.model.model_copy(update={"weights": ""}), len(found.classes))
    net.load_state_dict(found.model_state())
    pipeline = config.pipeline
    run = found.path.parent.parent if found.path.parent.name == "checkpoints" else found.path
    return Classifier(
        name=run.resolve().name,
        net=net,
        preprocessing=Preprocessing(
            mean=pipeline.mean,
            std=pipeline.std,
            size=pipeline.image_size,
            resize=pipeline.resize_shorter,
            interpolation=pipeline.eval_interpolation,
            constants=pipeline.constants,
        ),
        classes=found.classes,
        source={"checkpoint": str(found.path), "step": found.step, "commit": found.commit},
        trained_on=pipeline.kinds,
    )


def from_name(spec: str) -> Classifier:
    """Build a model from `torchvision:NAME[@WEIGHTS]`, `timm:NAME` or `package.module:function`.

    A function returns the model and its preprocessing, a `Preprocessing` or a mapping of its fields (mean, std,
    size, resize, interpolation); the mapping may also have `classes` (names of the outputs, ImageNet's otherwise)
    and `trained_on` (corruptions of its training).

    Raises:
        ValueError: not such a spec, no such model, or a function that returns something else.
        ImportError: the package is not installed.
    """
    package, _, name = spec.partition(":")
    if not package or not name:
        raise ValueError(
            f"--models {spec!r}: wanted torchvision:NAME, timm:NAME or package.module:function; a run's "
            "checkpoint goes to --checkpoint"
        )
    build = {"torchvision": _torchvision, "timm": _timm}.get(package)
    if build is None:
        return _callable(spec, package, name)
    net, preprocessing, source = build(name)
    return Classifier(name, net, preprocessing, imagenet_classes(), {"model": spec, **source})


def _torchvision(name: str) -> tuple[nn.Module, Preprocessing, dict[str, Any]]:
    name, _, version = name.partition("@")
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise ValueError(f"torchvision has no model {name!r}{suggest(name, known)}")
    every = torchvision.models.get_model_weights(name)
    version = version or every.DEFAULT.name
    if version not in every.__members__:
        raise ValueError(
            f"torchvision's {name} has no weights {version!r}{suggest(version, every.__members__)}"
        )
    weights = every[version]
    shown = weights.transforms()
    net: nn.Module = torchvision.models.get_model(name, weights=weights)
    preprocessing = Preprocessing(
        mean=tuple(shown.mean),
        std=tuple(shown.std),
        size=shown.crop_size[0],
        resize=shown.resize_size[0],
        interpolation=shown.interpolation.value,
    )
    return net, preprocessing, {"weights": version, "torchvision": torchvision.__version__}


def _timm(name: str) -> tuple[nn.Module, Preprocessing, dict[str, Any]]:
    try:
        import timm
        import timm.data
    except ImportError:
        raise ImportError("timm is not installed; pip install timm") from None
    if not timm.is_model(name.partition(".")[0]):
        raise ValueError(f"timm has no model {name!r}{suggest(name.partition('.')[0], timm.list_models())}")
    net: nn.Module = timm.create_model(name, pretrained=True)
    shown = timm.data.resolve_data_config(model=net)
    side = shown["input_size"][-1]
    if shown.get("crop_mode", "center") != "center":
        raise ValueError(
            f"timm's {name} wants crop mode {shown['crop_mode']!r}; only centre crops are made here"
        )
    preprocessing = Preprocessing(
        mean=shown["mean"],
        std=shown["std"],
        size=side,
        resize=int(side / shown["crop_pct"]),
        interpolation=shown["interpolation"],
    )
    return net, preprocessing, {"timm": timm.__version__}


def _callable(spec: str, package: str, name: str) -> Classifier:
    if "" not in sys.path:
        sys.path.insert(0, "")  # modules beside the user, as with python -m
    try:
        function: Callable[[], Any] = getattr(importlib.import_module(package), name)
    except ModuleNotFoundError as error:
        raise ImportError(f"--models {spec}: {error}; install it, or run where it can be imported") from None
    except AttributeError:
        raise ValueError(f"--models {spec}: module {package} has no {name!r}") from None
    made = function()
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module)):
        raise ValueError(
            f"--models {spec}: wanted a function that returns (torch.nn.Module, preprocessing), got "
            f"{type(made).__name__}"
        )
    net, described = made
    settings = described.model_dump() if isinstance(described, Preprocessing) else dict(described)
    classes = list(settings.pop("classes", imagenet_classes()))
    trained_on = settings.pop("trained_on", None)
    try:
        preprocessing = Preprocessing.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(
            f"--models {spec}: preprocessing {'.'.join(str(p) for p in first['loc'])}: {first['msg']}"
        ) from None
    trained = None if trained_on is None else tuple(trained_on)
    return Classifier(name, net, preprocessing, classes, {"model": spec}, trained)


def unique_names(classifiers: Iterable[Classifier]) -> None:
    """Give models of one name different ones: the step for checkpoints, else a number."""
    seen: dict[str, int] = {}
    for classifier in classifiers:
        name = classifier.name
        seen[name] = seen.get(name, 0) + 1
        if seen[name] > 1:
            step = classifier.source.get("step", seen[name])
            classifier.name = f"{name}@{step}" if f"{name}@{step}" not in seen else f"{name}#{seen[name]}"
            seen[classifier.name] = 1


def check_outputs(classifier: Classifier, device: torch.device) -> None:
    """Refuse a model whose outputs are not as many as its classes, before hours are spent on it."""
    side = classifier.preprocessing.size
    with torch.no_grad():
        signals = classifier(torch.zeros(1, 3, side, side, device=device))
    if signals.logits.shape != (1, len(classifier.classes)):
        raise ValueError(
            f"{classifier.name} gives outputs of shape {tuple(signals.logits.shape)}, wanted (1, "
            f"{len(classifier.classes)}), one per class"
        )
