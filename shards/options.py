"""What a build is asked for, and what it reports."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as checked_dataclass

from shards.conversion import Conversion
from shards.manifest import FileName

_SAMPLES_PER_SHARD = 1000


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class BuildOptions:
    """What to build, from what, and how."""

    source: Path
    """What to build from, one of:
    a folder SOURCE/<class>/<image>,
    ILSVRC2012_img_train.tar, or a folder of its class tars,
    ILSVRC2012_img_val.tar, with --labels,
    a .csv or .jsonl list of `path` and `label` or `class`,
    a shard set, WebDataset tars (a folder, one tar, a pattern with braces), or a .beton."""
    out: Path
    """Folder for the shard set; made where it is not there."""
    name: FileName
    """Name of the set; its shards are <name>-000000.tar and so on, or <name>.beton."""
    target: Literal["tar", "beton"] = "tar"
    """Kind of the shards: WebDataset tars, or FFCV .beton (one file unless a bound on the shards is given)."""
    labels: Path | None = None
    """Classes for a tar of images alone, one of:
    ILSVRC2012_devkit_t12.tar.gz, or its folder,
    LOC_val_solution.csv,
    a text file with lines `image class`, or with one class a line in the order of the sorted images."""
    classes: Path | None = None
    """File with the class names, one a line, in the order of their labels; sorted names without it."""
    samples_per_shard: Annotated[int, Field(ge=1)] | None = None
    """Images in a shard; without this and --bytes-per-shard, 1000 in a tar, and all in one .beton."""
    bytes_per_shard: Annotated[int, Field(ge=1)] | None = None
    """Close a shard before its images, as they are in the source, exceed this many bytes."""
    workers: Annotated[int, Field(ge=1)] = os.cpu_count() or 1
    """Processes that read, check and write; the result does not depend on it."""
    on_error: Literal["stop", "skip"] = "stop"
    """At a damaged image: stop and name it, or leave it out and list it in rejected.csv."""
    validate: Literal["scan", "decode"] = "scan"
    """Check of each image: its structure, or a full decode as well (many times slower)."""
    convert: Literal["none", "oddities"] | None = None
    """`oddities`: make RGB JPEGs of CMYK ones and JPEGs of PNGs, also those named .JPEG; `none`: keep them.
    Unset: none for tar, oddities for beton, which holds nothing else. All oddities are listed in oddities.csv."""
    shorter_side: Annotated[int, Field(ge=1, le=65500)] | None = None
    """Make images smaller whose shorter side has more pixels; the others keep their bytes."""
    quality: Annotated[int, Field(ge=1, le=100)] | None = None
    """Encode every image as JPEG of this quality; without it only converted ones are encoded, at 95."""
    apply_exif: bool = False
    """Turn the pixels of images with an EXIF orientation, instead of keeping the images as they are stored."""
    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None
    """Shuffle all images before they are put into shards; in the source's order without it."""
    only: Annotated[int, Field(ge=0)] | None = None
    """Write this one shard (its number) of a finished set again, for example after its file was damaged."""
    dry_run: bool = False
    """Only say what would be built."""

    def __post_init__(self) -> None:
        if self.samples_per_shard is not None and self.bytes_per_shard is not None:
            raise ValueError("both samples_per_shard and bytes_per_shard are given; give one of them")
        out, source = self.out.resolve(), self.source.resolve()
        if out == source or source in out.parents:
            raise ValueError(f"--out {self.out} lies in --source {self.source}, where it would be a class")

    def deciding(self) -> dict[str, Any]:
        """The options that decide the bytes of the result, for the manifest."""
        samples = self.samples_per_shard
        if samples is None and self.bytes_per_shard is None and self.target == "tar":
            samples = _SAMPLES_PER_SHARD
        return {
            "target": self.target,
            "samples_per_shard": samples,
            "bytes_per_shard": self.bytes_per_shard,
            "validate": self.validate,
            **asdict(self.conversion()),
            "seed": self.seed,
        }

    def conversion(self) -> Conversion:
        """What is done to the images."""
        kind = self.convert or ("oddities" if self.target == "beton" else "none")
        return Conversion(kind, self.shorter_side, self.quality, self.apply_exif)


@dataclass(frozen=True)
class BuildReport:
    """What a build did."""

    samples: int
    """In the set; in a dry run, in the source."""
    classes: int
    shards: int
    """Files with records; of a set that is one file, the pieces it is built from."""
    reused_shards: int
    """Of `shards`, those that an earlier run had finished."""
    image_bytes: int
    """In the source."""
    ignored: int
    """Files in the source whose names are not those of images."""
    counts: dict[str, int] = field(default_factory=dict)
    """Oddities as the source has them: `grey`, `cmyk`, `png`, `misnamed` (PNG named .JPEG or the like), `deep`
    (16 bit), `huge` (above 89 megapixels), `rotated` (EXIF); and `encoded` (again), `rejected`."""
    built: bool = True
    """False in a dry run and where the finished set was already there."""
