"""What can be chosen about the model. The number of classes is the data's and is passed beside it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

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
Initialisation = Literal["data", "uniform03", "uniform_1n", "normal"]


class ModelConfig(BaseModel):
    """Trunk, codebook, fusion, attention and losses of VQSA (arXiv 2023 CVPR paper, sections 3 and 4)."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    trunk: TrunkName = "resnet50"
    """Convolutional trunk. resnet10 is torchvision's ResNet with one basic block per stage, for small
    work."""

    weights: str = ""
    """Trunk weights: empty for random, "torchvision" for its ImageNet V1 weights from torch's cache, or a
    file (.pth or .safetensors) with torchvision's names. The classifier is taken over where the classes
    agree."""

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
    """First codes: "data" takes features of the first training batch, "uniform03" draws from U(0, 3)
    (authors' code), "uniform_1n" from U(-1/n, 1/n), "normal" from N(0, 1)."""

    init_seed: int = Field(default=0, ge=0)
    """Seed of the codebook's initialisation, which has a generator of its own."""

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
