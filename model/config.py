"""What can be chosen about the model. The number of classes is the data's and is passed beside it."""

from __future__ import annotations

import difflib
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

TrunkName = Literal[
    "resnet10",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnext101_32x8d",
    "resnext101_64x4d",
]
Metric = Literal["l2", "cosine"]
Reduction = Literal["mean", "sum"]
Initialisation = Literal["data", "kmeans", "uniform03", "uniform_1n", "normal"]
TIMM = "timm:"
PASSED_IN = "module"


class ModelConfig(BaseModel):
    """Trunk, codebook, fusion, attention and losses of VQSA (arXiv 2023 CVPR paper, sections 3 and 4)."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    trunk: str = "resnet50"
    """Trunk: torchvision's resnet18, resnet34, resnet50, resnet101, resnext101_32x8d or resnext101_64x4d;
    resnet10, which is torchvision's ResNet with one basic block per stage, for small work; "timm:NAME" for
    any model of timm that gives a feature map (needs the extra vqsa[timm]); or "module" for one passed to
    model.build. The feature dimension d is the trunk's."""

    weights: str = ""
    """Trunk weights: empty for random; "torchvision" for its ImageNet V1 weights from torch's cache; "timm" for
    timm's own from the Hugging Face cache; or a file (.pth or .safetensors) with the trunk's names. Nothing is
    downloaded. The classifier is taken over where the classes agree."""

    stem: Literal["imagenet", "small"] = "imagenet"
    """"imagenet": 7×7 stride-2 convolution and max-pool. "small": 3×3 stride-1 convolution, no max-pool, as
    is usual for images of at most 64 px; the trunk then divides the size by 8 instead of 32."""

    freeze_bn: bool = False
    """Keep the running statistics of batch normalisation as they are, in training too; its weights still
    learn."""

    quantise: Literal["map", "pooled", "none"] = "map"
    """"map": every position of the feature map gets a code (paper). "pooled": the averaged feature gets one
    (authors' code). "none": no codebook, the trunk and one linear layer (the fine-tuning baseline)."""

    codes: int = Field(default=10_000, ge=1)
    """Number of codes n in the codebook."""

    metric: Metric = "l2"
    """Nearest by Euclidean distance (paper) or by cosine of the raw vectors (authors' code). The losses use
    the raw vectors either way."""

    init: Initialisation = "data"
    """First codes: "data" takes features of the first training batch, "kmeans" the centres of its features,
    "uniform03" draws from U(0, 3) (authors' code), "uniform_1n" from U(-1/n, 1/n), "normal" from N(0, 1)."""

    init_seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of the codebook's initialisation and revival, which have generators of their own."""

    init_batches: int = Field(default=1, ge=1)
    """Global batches that a start from data looks at. While they have fewer features than codes, the training
    command takes more, up to one epoch or 64."""

    kmeans_iterations: int = Field(default=10, ge=1)
    """Most rounds of k-means under init "kmeans", which begins with features drawn as under "data"."""

    ema: float = Field(default=0.0, ge=0, lt=1)
    """Decay of an exponential moving average that codes follow instead of gradients (0.99 is usual): each code
    is the moving sum of its features over their moving number. 0: codes learn by gradient."""

    ema_epsilon: float = Field(default=1e-5, gt=0)
    """Laplace smoothing of the moving numbers, in features."""

    revive_after: int = Field(default=0, ge=0)
    """Every so many steps, codes that no feature chose in these steps are replaced by features of the batch,
    drawn without replacement. 0: never."""

    centre: bool = False
    """Subtract a running mean of the features from features and codes before they are compared by cosine. Codes,
    losses and gathered vectors stay as they are. Needs metric "cosine": no Euclidean distance would change."""

    top_k: int = Field(default=1, ge=1)
    """Codes per feature: the k nearest, added up with the weights below. More than 1 is refused with ema and
    revive_after, which count one code per feature."""

    top_k_weights: Literal["mean", "softmax"] = "mean"
    """"mean": equal weights. "softmax": of minus each distance over the mean of the k distances."""

    fusion: Literal["replace", "add", "concat"] = "concat"
    """How the feature z and its code e meet: e alone, z + e, or both side by side."""

    attention: bool = True
    """Self-attention over the two tokens (e, z); needs fusion "concat"."""

    attention_scale: Literal["sqrt2", "one", "sqrt_d"] = "sqrt2"
    """Divisor of the attention scores: √2 (paper), 1, or √d."""

    released_eval_scale: bool = False
    """Quirk of the authors' code: the divisor is left out (1) in evaluation. Only for their checkpoint."""

    reduction: Reduction = "mean"
    """Losses of the codebook: "mean" over vectors and dimensions (authors' code), or "sum" over dimensions
    and mean over vectors (the paper's squared norm, d times larger)."""

    beta: float = Field(default=0.25, ge=0)
    """Weight of the commitment loss."""

    lambda_ce: float = Field(default=1.0, ge=0)
    """Weight of the cross entropy."""

    search_memory_mib: int = Field(default=256, ge=1)
    """Largest workspace of the codebook search, in MiB, beside its inputs and outputs."""

    @field_validator("trunk")
    @classmethod
    def _known_trunk(cls, name: str) -> str:
        known = (*get_args(TrunkName), PASSED_IN)
        if name not in known and not name.startswith(TIMM):
            close = difflib.get_close_matches(name, known, n=1)
            raise ValueError(
                f"no trunk {name!r}"
                + (f", did you mean {close[0]!r}?" if close else "")
                + f"; choose {', '.join(get_args(TrunkName))}, 'timm:NAME', or 'module' with one passed to model.build"
            )
        return name

    @model_validator(mode="after")
    def _choices_fit(self) -> ModelConfig:
        if self.attention and self.quantise == "none":
            raise ValueError(
                "attention needs the codebook's token, but quantise is 'none'; "
                "set attention to false, or quantise to 'map' or 'pooled'"
            )
        if self.attention and self.fusion != "concat":
            raise ValueError(
                f"attention works on the two tokens of fusion 'concat', but fusion is {self.fusion!r}; "
                "set attention to false, or fusion to 'concat'"
            )
        of_torchvision = self.trunk in get_args(TrunkName)
        if self.weights == "torchvision" and not of_torchvision:
            raise ValueError(
                f"weights is 'torchvision', but the trunk {self.trunk!r} is not; set weights to '' or a file"
                + (", or 'timm'" if self.trunk.startswith(TIMM) else "")
            )
        if self.weights == "timm" and not self.trunk.startswith(TIMM):
            raise ValueError(
                f"weights is 'timm', but the trunk {self.trunk!r} is not timm's; say trunk 'timm:{self.trunk}', or "
                "weights 'torchvision' or a file"
            )
        if self.stem == "small" and not of_torchvision:
            raise ValueError(
                f"stem 'small' is for torchvision's trunks, and the trunk is {self.trunk!r}; leave stem at 'imagenet'"
            )
        if self.centre and self.metric == "l2":
            raise ValueError(
                "centre changes no Euclidean distance; set metric to 'cosine', or centre to false"
            )
        if self.top_k > self.codes:
            raise ValueError(f"top_k is {self.top_k}, more than the {self.codes} codes; lower it")
        if self.ema and self.top_k > 1:
            raise ValueError(
                "the moving average (ema) is of the features of one code each, but top_k is "
                f"{self.top_k}; set ema to 0, or top_k to 1"
            )
        if self.revive_after and self.top_k > 1:
            raise ValueError(
                "revival (revive_after) counts the nearest code of each feature, so it would replace codes in use "
                f"as second or later ones, but top_k is {self.top_k}; set revive_after to 0, or top_k to 1"
            )
        if self.stem == "small" and self.weights == "torchvision":
            raise ValueError(
                "torchvision's weights are for stem 'imagenet', but stem is 'small'; "
                "set weights to '' or to a file trained with the small stem"
            )
        if self.trunk == "resnet10" and self.weights == "torchvision":
            raise ValueError(
                "torchvision has no weights for resnet10; set weights to '' or a file, or choose resnet18"
            )
        return self
