"""Images per second of the loader: with and without corruptions, beside what the authors' code does.

    python benchmarks/loader.py --source FOLDER_OF_CLASS_FOLDERS [--out result.json]

Two peers run over the same photographs in the same run: a PyTorch DataLoader with torchvision's RandomResizedCrop and
PyPI `imagecorruptions`, on as many workers as the loader has threads; and a DALI pipeline of DALI's own operators
(readers.webdataset, random crop, resize, flip, normalise) without corruptions, with the same settings of the decoder.
On a GPU both are measured again with DALI's hardware decoder, which the loader uses with decode = "fast". Ratios to the
peers are printed and stored. On the CPU rates are also given per second of process CPU time, which a busy machine
disturbs less. What was ready before a measurement began is taken out first.
"""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from nvidia.dali import Pipeline, fn, types
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from torchvision import transforms

import shards
from benchmarks.environment import environment, percentiles, write_result
from benchmarks.reference import reference
from pipeline.config import PipelineConfig
from pipeline.corruptions import TRAINING_KINDS, available_kinds, frost
from pipeline.loader import TrainingLoader
from shards.build import BuildOptions, build

_NATIVE, _AUTHORS = "DALI's own reader, clean", "DataLoader + torchvision + imagecorruptions"
_FAST = ", hardware decoder"


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


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _measure(step: Callable[[], int], batches: int, repeats: int, ready: int = 0) -> dict[str, Any]:
    """Rates over `batches` steps, each time after as many as may be `ready` in queues, and one more."""
    walls, cpus = [], []
    for _ in range(repeats):
        for _ in range(ready + 1 if ready else 0):
            step()
        _finish()
        began_s, cpu_s, images = time.perf_counter(), _cpu_s(), 0
        for _ in range(batches):
            images += step()
        _finish()
        walls.append(images / (time.perf_counter() - began_s))
        cpus.append(images / (_cpu_s() - cpu_s))
    return {"img_per_s": percentiles(walls), "img_per_cpu_s": percentiles(cpus)}


def _loader_row(
    store: shards.Store,
    command: LoaderBenchmark,
    kinds: tuple[str, ...],
    device_id: int | None,
    decode: Literal["exact", "fast"] = "exact",
) -> dict[str, Any]:
    config = PipelineConfig(
        batch_global=command.batch, kinds=kinds, clean_fraction=None, threads=command.threads, decode=decode
    )
    loader = TrainingLoader(store, config, seed=0, device_id=device_id)
    ready = config.read_ahead + config.prefetch
    try:
        return _measure(lambda: len(next(loader).labels), command.batches, command.repeats, ready)
    finally:
        loader.close()


def decoder_settings(device_id: int | None, decode: Literal["exact", "fast"]) -> dict[str, Any]:
    """DALI's decoder as the loader sets it for "exact", and as DALI does by itself for "fast"."""
    if device_id is None or decode == "fast":
        return {}
    return {"hw_decoder_load": 0.0, "jpeg_fancy_upsampling": True}


def _native_row(
    shard_set: Path,
    command: LoaderBenchmark,
    device_id: int | None,
    decode: Literal["exact", "fast"] = "exact",
) -> dict[str, Any]:
    """DALI alone: its reader, its random numbers, no corruptions and nothing of ours."""
    tars = sorted(shard_set.glob("*.tar"))
    place = "cpu" if device_id is None else "gpu"
    queue = PipelineConfig().prefetch
    pipe = Pipeline(
        batch_size=command.batch,
        num_threads=command.threads,
        device_id=device_id,
        seed=0,
        prefetch_queue_depth=queue,
    )
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
            **decoder_settings(device_id, decode),
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

    return _measure(step, command.batches, command.repeats, queue)


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


def measure(
    command: LoaderBenchmark, device_id: int | None, keep: Callable[[], None], rows: dict[str, Any]
) -> str:
    """Measure row by row into `rows`, calling `keep` after each; return the name of the row that is compared."""
    kinds = tuple(k for k in TRAINING_KINDS if k in available_kinds() and (k != "frost" or frost.found()))
    ours = f"loader, {len(kinds)} kinds + clean"
    with tempfile.TemporaryDirectory() as folder:
        build(BuildOptions(source=command.source, out=Path(folder), name="bench"))
        store = shards.open(folder)
        jobs: dict[str, Callable[[], dict[str, Any]]] = {
            "loader, clean": lambda: _loader_row(store, command, (), device_id),
            ours: lambda: _loader_row(store, command, kinds, device_id),
            _NATIVE: lambda: _native_row(Path(folder), command, device_id),
        }
        if device_id is not None:
            jobs[ours + _FAST] = lambda: _loader_row(store, command, kinds, device_id, "fast")
            jobs[_NATIVE + _FAST] = lambda: _native_row(Path(folder), command, device_id, "fast")
        if command.peer_batches:
            jobs[_AUTHORS] = lambda: _peer_row(command)
        for name, job in jobs.items():
            rows[name] = job()
            keep()
    return ours


def ratios(rows: dict[str, Any], ours: str) -> dict[str, dict[str, float]]:
    """Our rates with all corruptions against each peer's, the hardware decoder against the hardware decoder."""
    pairs = {_NATIVE: ours, _NATIVE + _FAST: ours + _FAST, _AUTHORS: ours}
    return {
        peer: {unit: rows[row][unit]["p50"] / rows[peer][unit]["p50"] for unit in rows[row]}
        for peer, row in pairs.items()
        if peer in rows and row in rows
    }


def main() -> None:
    """Run the benchmark and print a table."""
    command = tyro.cli(LoaderBenchmark, description=LoaderBenchmark.__doc__)
    rows: dict[str, Any] = {}
    record = {**environment(), "batch": command.batch, "threads": command.threads, "rows": rows}

    def keep() -> None:
        if command.out:
            write_result(command.out, record)

    ours = measure(command, 0 if torch.cuda.is_available() else None, keep, rows)
    record["ratios"] = ratios(rows, ours)
    keep()
    for name, row in rows.items():
        rate, per_cpu = row["img_per_s"], row["img_per_cpu_s"]
        print(
            f"{name:44s} {rate['p50']:9.0f} img/s ({rate['p20']:.0f} to {rate['p80']:.0f})  "
            f"{per_cpu['p50']:9.0f} per CPU-s"
        )
    for peer, ratio in record["ratios"].items():
        print(
            f"with all corruptions against {peer}: {ratio['img_per_s']:.2f} x the rate, "
            f"{ratio['img_per_cpu_s']:.2f} x per CPU-second"
        )


if __name__ == "__main__":
    main()
