"""What a user can say about the data side of a run."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.corruptions.kinds import HELD_OUT_KINDS, KINDS, TRAINING_KINDS, suggest


class PipelineConfig(BaseModel):
    """Batches, crops, corruptions and the machinery that makes them."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    image_size: int = Field(224, ge=32)
    """Side of the square images the model sees, in pixels."""

    batch_global: int = Field(256, ge=1)
    """Samples per optimiser step over all processes."""

    batch_per_gpu: int | None = Field(None, ge=1)
    """Samples one process holds at a time; the rest of the global batch is reached by gradient
    accumulation. Unset: the global batch divided by the number of processes."""

    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Area of the training crop as a fraction of the image, lowest and highest."""

    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of the training crop, lowest and highest."""

    flip_probability: float = Field(0.5, ge=0, le=1)
    """Chance of a horizontal flip in training."""

    kinds: tuple[str, ...] = TRAINING_KINDS
    """Corruptions to train on (ImageNet-C names). Empty: clean images only."""

    allow_held_out: bool = False
    """Let training use the four held-out kinds, which are meant for testing only."""

    law: Literal["uniform", "bag"] = "uniform"
    """How kinds and severities are drawn. uniform: independently per sample. bag: every (kind, severity)
    cell once per 5 * (kinds + 1) samples of the stream, as the authors' code does (clean counts as a kind)."""

    clean_fraction: float | None = Field(None, ge=0, le=1)
    """Share of clean images under the uniform law. Unset: clean counts as one more kind."""

    paired: bool = False
    """Give a clean and a corrupted view of the same crop; then no sample is drawn clean."""

    mixup: float = Field(0.0, ge=0, le=4)
    """Mix each image with its neighbour in the stream; the share is drawn from Beta(mixup, mixup). 0: off."""

    cutmix: float = Field(0.0, ge=0, le=4)
    """Fill a box of each image from its neighbour; its area is drawn from Beta(cutmix, cutmix). 0: off. With both,
    each batch uses one of them, at even chances."""

    mix_probability: float = Field(1.0, gt=0, le=1)
    """Share of global batches that mixup or cutmix works on."""

    augmix: Literal[0, 1, 2] = 0
    """AugMix after the corruption. 1: the images are AugMix views. 2: each image comes with two AugMix views
    beside it, for loss.consistency. The authors of AugMix train without corruptions: kinds = []."""

    flavour: Literal["bethge", "hendrycks"] = "bethge"
    """Reference followed where two differ: bethge is what the authors trained with (PyPI
    imagecorruptions), hendrycks what ImageNet-C was made with."""

    constants: Literal["auto", "imagenet", "tiny_imagenet", "cifar10"] = "auto"
    """Severity constants; auto takes ImageNet-C's, except at exactly 64 and 32 px."""

    eval_resize: int | None = Field(None, ge=32)
    """Shorter side before the evaluation's centre crop. Unset: image_size * 256 / 224."""

    eval_interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Filter of the evaluation's resize, antialiased as Pillow's. Training crops are always bilinear."""

    decode: Literal["exact", "fast"] = "exact"
    """GPU decoding. exact: the same pixels for any batch size. fast: also uses the hardware JPEG
    decoder, whose pixels differ slightly from the other decoder's."""

    threads: int = Field(2, ge=1)
    """DALI CPU threads per process."""

    prefetch: int = Field(2, ge=1)
    """Batches DALI works on ahead of the training loop; each takes the memory of one."""

    read_threads: int = Field(4, ge=1)
    """Threads per process that read records ahead."""

    read_ahead: int = Field(4, ge=1)
    """Batches whose records are read before DALI asks for them."""

    on_damaged: Literal["replace", "stop"] = "replace"
    """A damaged record in training: replace it by a grey image (named and counted), or stop the run."""

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Channel means for normalisation, as fractions of 255."""

    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Channel standard deviations for normalisation, as fractions of 255."""

    @property
    def resize_shorter(self) -> int:
        """Shorter side, in pixels, before the evaluation's centre crop."""
        return self.eval_resize or round(self.image_size * 256 / 224)

    @model_validator(mode="after")
    def _consistent(self) -> PipelineConfig:
        for kind in self.kinds:
            if kind not in KINDS:
                raise ValueError(f"pipeline.kinds: unknown corruption {kind!r}{suggest(kind, KINDS)}")
            if kind == "identity":
                raise ValueError("pipeline.kinds lists corruptions only; say clean_fraction for clean images")
            if kind in HELD_OUT_KINDS and not self.allow_held_out:
                raise ValueError(
                    f"pipeline.kinds has {kind!r}, which is held out for testing; training on it makes its test "
                    "result meaningless. Say pipeline.allow_held_out = true if you mean it"
                )
        if len(set(self.kinds)) != len(self.kinds):
            raise ValueError(f"pipeline.kinds names a kind twice: {', '.join(self.kinds)}")
        for name in ("crop_scale", "crop_ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"pipeline.{name} needs 0 < lowest <= highest, got ({low}, {high})")
        if self.crop_scale[1] > 1:
            raise ValueError(f"pipeline.crop_scale ends at {self.crop_scale[1]}, above the whole image (1.0)")
        if self.law == "bag" and self.clean_fraction is not None:
            raise ValueError(
                "pipeline.clean_fraction cannot be set with law = 'bag', which fixes the clean share at "
                "1 / (kinds + 1); use law = 'uniform'"
            )
        if self.paired and self.clean_fraction is not None:
            raise ValueError(
                "pipeline.clean_fraction means nothing with paired = true, where no sample is drawn clean"
            )
        if not self.kinds and self.paired:
            raise ValueError("pipeline.paired needs at least one corruption in pipeline.kinds")
        if self.augmix and self.paired:
            raise ValueError("pipeline.augmix and pipeline.paired both make views of an image; choose one")
        if self.resize_shorter < self.image_size:
            raise ValueError(
                f"pipeline.eval_resize ({self.resize_shorter}) is smaller than image_size ({self.image_size})"
            )
        return self
