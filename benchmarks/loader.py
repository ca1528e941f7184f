"""Images per second of the loader: with and without corruptions, beside what the authors' code does.

    python benchmarks/loader.py --source FOLDER_OF_CLASS_FOLDERS [--out result.json]

Two peers run over the same photographs in the same run: a PyTorch DataLoader with torchvision's RandomResizedCrop and
PyPI `imagecorruptions`, on as many workers as the loader has threads; and a DALI pipeline of DALI's own operators
(readers.webdataset, random crop, resize, flip, normalise) without corruptions. Ratios to both are printed and stored.
On the CPU rates are also given per second of process CPU time, which a busy machine disturbs less.
"""

from __future__ import annotations

import json
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from nvidia.dali import Pipeline, fn, types
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from torchvision import transforms

import shards
from benchmarks.environment import environment, percentiles
from benchmarks.reference import reference
from pipeline.config import PipelineConfig
from pipeline.corruptions import TRAINING_KINDS, available_kinds
from pipeline.loader import TrainingLoader
from shards.build import BuildOptions, build

_NATIVE, _AUTHORS = "DALI's own reader, clean", "DataLoader + torchvision + imagecorruptions"


class LoaderBenchmark(BaseModel):
    """Measure the loader."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    source: Path
    """Folder of class folders with JPEGs."""

    out: Path | None = None
    """JSON file for the result."""

    batch: int = Field(64, ge=1)
    """Images per batch."""

    batches: int = Field(10, ge=2)
    """Batches per measurement."""

    repeats: int = Field(3, ge=1)
    """Measurements of each row."""

    threads: int = Field(2, ge=1)
    """DALI threads, and workers of the peer."""

    peer_batches: int = Field(2, ge=0)
    """Batches of the peer, which takes about 50 ms per image; 0 leaves it out."""


def _cpu_s() -> float:
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)


def _measure(step: Callable[[], int], batches: int, repeats: int) -> dict[str, Any]:
    walls, cpus = [], []
    for _ in range(repeats):
        began_s, cpu_s, images = time.perf_counter(), _cpu_s(), 0
        for _ in range(batches):
            images += step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        walls.append(images / (time.perf_counter() - began_s))
        cpus.append(images / (_cpu_s() - cpu_s))
    return {"img_per_s": percentiles(walls), "img_per_cpu_s": percentiles(cpus)}


def _loader_row(
    store: shards.Store, command: LoaderBenchmark, kinds: tuple[str, ...], device_id: int | None
) -> dict[str, Any]:
    config = PipelineConfig(
        batch_global=command.batch, kinds=kinds, clean_fraction=None, threads=command.threads
    )
    loader = TrainingLoader(store, config, seed=0, device_id=device_id)
    try:
        for _ in range(4):
            next(loader)
        return _measure(lambda: len(next(loader).labels), command.batches, command.repeats)
    finally:
        loader.close()


def _native_row(shard_set: Path, command: LoaderBenchmark, device_id: int | None) -> dict[str, Any]:
    """DALI alone: its reader, its random numbers, no corruptions and nothing of ours."""
    tars = sorted(shard_set.glob("*.tar"))
    place = "cpu" if device_id is None else "gpu"
    pipe = Pipeline(batch_size=command.batch, num_threads=command.threads, device_id=device_id, seed=0)
    with pipe:
        jpeg, label = fn.readers.webdataset(
            paths=[str(tar) for tar in tars],
            index_paths=[str(tar.with_suffix(".idx")) for tar in tars],
            ext=["jpg;jpeg;JPEG;JPG", "cls"],
            random_shuffle=True,
            initial_fill=command.batch,
        )
        image = fn.decoders.image_random_crop(
            jpeg,
            device="cpu" if device_id is None else "mixed",
            random_area=(0.08, 1.0),
            random_aspect_ratio=(3 / 4, 4 / 3),
        )
        image = fn.resize(image, size=(224, 224), interp_type=types.INTERP_LINEAR, antialias=True)
        image = fn.crop_mirror_normalize(
            image,
            dtype=types.FLOAT,
            output_layout="HWC",
            mean=[255 * m for m in PipelineConfig().mean],
            std=[255 * s for s in PipelineConfig().std],
            mirror=fn.random.coin_flip(),
            device=place,
        )
        pipe.set_outputs(image, label)
    pipe.build()

    def step() -> int:
        images, _ = pipe.run()
        return len(images)

    for _ in range(4):
        step()
    return _measure(step, command.batches, command.repeats)


class _AuthorsDataset(torch.utils.data.Dataset[Any]):
    """Decode, crop, flip, one of 16 x 5 corruptions, normalise: per image, in numpy and PIL."""

    def __init__(self, source: Path) -> None:
        self.files = sorted(p for p in source.glob("*/*") if p.is_file())
        self.crop = transforms.Compose([transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()])
        self.finish = transforms.Compose(
            [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        rng = np.random.default_rng(index)
        image = np.asarray(self.crop(Image.open(self.files[index]).convert("RGB")))
        kind = int(rng.integers(len(TRAINING_KINDS) + 1))
        if kind < len(TRAINING_KINDS):
            function = getattr(reference(), TRAINING_KINDS[kind])
            image = np.uint8(function(Image.fromarray(image), severity=int(rng.integers(1, 6))))
        return self.finish(Image.fromarray(image))


def _peer_row(command: LoaderBenchmark) -> dict[str, Any]:
    """One whole pass over a few batches: only workers that have ended count in the process's CPU time."""
    images = command.peer_batches * command.batch
    dataset = _AuthorsDataset(command.source)
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:images].tolist()
    loader = torch.utils.data.DataLoader(
        torch.utils.data.Subset(dataset, chosen), batch_size=command.batch, num_workers=command.threads
    )
    return _measure(lambda: sum(len(batch) for batch in loader), 1, 1)


def main() -> None:
    """Run the benchmark and print a table."""
    command = tyro.cli(LoaderBenchmark, description=LoaderBenchmark.__doc__)
    device_id = 0 if torch.cuda.is_available() else None
    kinds = tuple(k for k in TRAINING_KINDS if k in available_kinds())
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        build(BuildOptions(source=command.source, out=Path(folder), name="bench"))
        store = shards.open(folder)
        rows["loader, clean"] = _loader_row(store, command, (), device_id)
        rows[f"loader, {len(kinds)} kinds + clean"] = _loader_row(store, command, kinds, device_id)
        rows[_NATIVE] = _native_row(Path(folder), command, device_id)
        if command.peer_batches:
            rows[_AUTHORS] = _peer_row(command)
    ours = rows[f"loader, {len(kinds)} kinds + clean"]
    ratios = {
        peer: {unit: ours[unit]["p50"] / rows[peer][unit]["p50"] for unit in ours}
        for peer in (_NATIVE, _AUTHORS)
        if peer in rows
    }
    for name, row in rows.items():
        rate, per_cpu = row["img_per_s"], row["img_per_cpu_s"]
        print(
            f"{name:44s} {rate['p50']:9.0f} img/s ({rate['p20']:.0f} to {rate['p80']:.0f})  "
            f"{per_cpu['p50']:9.0f} per CPU-s"
        )
    for peer, ratio in ratios.items():
        print(
            f"with all corruptions against {peer}: {ratio['img_per_s']:.2f} x the rate, "
            f"{ratio['img_per_cpu_s']:.2f} x per CPU-second"
        )
    if command.out:
        record = {**environment(), "batch": command.batch, "threads": command.threads}
        command.out.write_text(json.dumps({**record, "rows": rows, "ratios": ratios}, indent=1) + "\n")


if __name__ == "__main__":
    main()
