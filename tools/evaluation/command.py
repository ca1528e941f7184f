"""What can be asked of an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class EvaluateCommand(BaseModel):
    """Score models on clean images, on every corruption x severity, and on other sets; each image is decoded once."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    checkpoint: tuple[Path, ...] = ()
    """Run folders (their newest checkpoints) or checkpoint folders."""

    models: tuple[str, ...] = ()
    """Baselines: torchvision:NAME[@WEIGHTS], timm:NAME, or package.module:function, which returns a model and its
    preprocessing."""

    data: Path | None = None
    """Clean validation images, corrupted here for every cell: a shard set, or a folder of class folders."""

    imagenet_c: Path | None = None
    """ImageNet-C on disk: <corruption>/<severity>/<class>/<image>, scored as they are, without resizing."""

    imagenet_c_bar: Path | None = None
    """ImageNet-C-bar on disk, laid out and scored likewise."""

    sets: tuple[str, ...] = ()
    """Other sets as NAME=PATH (ImageNet-V2, -Sketch, -A, -R): shards or class folders, resized as the model wants.
    Logits of classes that the set does not have are left out."""

    mos: Path | None = None
    """CSV with the columns file and mos: mean opinion scores of images in --mos-images. How well confidence and the
    distance to the codes follow them is reported."""

    mos_images: Path | None = None
    """Folder of the images that --mos names; rows without a file there are passed over."""

    fewer_classes: Literal["refuse", "mask", "keep"] = "refuse"
    """--data or --imagenet-c with fewer classes than the model: refuse them, leave out the logits of the others, or
    keep all logits."""

    out: Path | None = None
    """Folder for results.json and cells.csv. Unset: evaluation/ in the run folder of the first checkpoint."""

    fresh: bool = False
    """Throw away what an interrupted evaluation left in the folder, instead of going on with it."""

    kinds: tuple[str, ...] = ("all",)
    """Corruptions made from --data, by ImageNet-C name; "all" is every one there is; "none" scores clean images."""

    images: int | None = Field(None, ge=1)
    """Score a seeded random subset of this many images of each set."""

    batch: int = Field(64, ge=1)
    """Images per batch and process."""

    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the noise, the subset and the intervals; an image gets the same noise at any batch size."""

    flavour: Literal["hendrycks", "bethge"] = "hendrycks"
    """Reference the corruptions follow: hendrycks is what ImageNet-C was made with."""

    jpeg85: bool = False
    """Pass corrupted images through JPEG at quality 85, as ImageNet-C's files were saved."""

    adapt_bn: int | None = Field(None, ge=2)
    """Also score every model with batch normalisation adapted to each cell, on this many unlabelled images of it;
    a row of its own."""

    adapt_prior: int = Field(0, ge=0)
    """Weight of the training statistics in the adaptation, in images."""

    partial_mce: bool = False
    """Give an mCE over the benchmark kinds there are, where some are missing."""

    released_mce_bug: bool = False
    """Compute the mCE with the mistake of the VQSA authors' published code; only to compare with their numbers."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast type of the models."""

    compile: bool = False
    """Compile the models with torch.compile and frozen weights: a minute at the start, then faster forward passes.
    Numbers differ by rounding."""

    threads: int = Field(2, ge=1)
    """DALI CPU threads per process."""

    on_damaged: Literal["exclude", "stop"] = "exclude"
    """A damaged image: leave it out of the counts (named and counted), or stop."""

    save_every_s: float = Field(30, ge=0)
    """Seconds between snapshots of the partial results; a killed evaluation goes on from its last one."""

    @model_validator(mode="after")
    def _something_to_do(self) -> EvaluateCommand:
        if not self.checkpoint and not self.models:
            raise ValueError("no model: give --checkpoint RUN or --models torchvision:resnet50")
        if not (self.data or self.imagenet_c or self.imagenet_c_bar or self.sets or self.mos):
            raise ValueError(
                "no images: give --data, --imagenet-c, --imagenet-c-bar, --sets NAME=PATH or --mos"
            )
        if (self.mos is None) != (self.mos_images is None):
            raise ValueError(
                "--mos and --mos-images belong together: a table of scores and its folder of images"
            )
        if self.out is None and not self.checkpoint:
            raise ValueError(
                "without a --checkpoint there is no run folder for the results: give --out FOLDER"
            )
        if self.compile and self.adapt_bn is not None:
            raise ValueError(
                "--adapt-bn changes weights from cell to cell, and --compile freezes them: leave one of them out"
            )
        if self.partial_mce and self.released_mce_bug:
            raise ValueError("the released mistake is one of the whole mCE: leave --partial-mce out")
        return self
