"""Evaluates a checkpoint on clean and corrupted images: table, JSON and CSV.

python tools/evaluate.py --checkpoint runs/x --data SHARDS
"""

from __future__ import annotations

import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import gather_object, reduce
from pydantic import BaseModel, ConfigDict, Field
from tqdm import tqdm

import model
import shards
from pipeline.corruptions import available_kinds, kind_id
from pipeline.loader import EvaluationLoader
from pipeline.order import permutation
from tools.runtime import checkpoint, scoring
from tools.runtime.config import RunConfig, validated
from tools.runtime.device import loader_device_id
from tools.runtime.optim import autocast_dtype
from tools.runtime.results import as_json, summarise, table, write_csv


class EvaluateCommand(BaseModel):
    """Score a checkpoint on clean images and on every corruption x severity, made on the fly."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    checkpoint: Path
    """Run folder (its newest checkpoint) or checkpoint folder."""

    data: Path
    """Shard set of validation images, with the classes of training."""

    out: Path | None = None
    """Folder for results.json and cells.csv. Unset: evaluation/ in the run folder."""

    kinds: tuple[str, ...] = ("all",)
    """Corruptions, by ImageNet-C name; "all" is every one there is."""

    images: int | None = Field(None, ge=1)
    """Score a seeded random subset of this many images."""

    batch: int = Field(64, ge=1)
    """Images per batch and process."""

    seed: int = Field(0, ge=0, lt=2**64)
    """Seed of the noise and of the subset; an image gets the same noise at any batch size."""

    flavour: Literal["hendrycks", "bethge"] = "hendrycks"
    """Reference the corruptions follow: hendrycks is what ImageNet-C was made with."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast type of the model."""

    threads: int = Field(2, ge=1)
    """DALI CPU threads per process."""

    on_damaged: Literal["exclude", "stop"] = "exclude"
    """A damaged image: leave it out of the counts (named and counted), or stop."""


def evaluate(command: EvaluateCommand) -> dict[str, Any]:
    """Run the evaluation; prints the table, writes results.json and cells.csv, returns the JSON's content.

    Raises:
        FileNotFoundError: no checkpoint or no shards there.
        ValueError: classes of data and checkpoint differ, unknown kind, more images asked for than there are.
    """
    state = Accelerator()  # unlike PartialState, it also joins several processes on a CPU
    found = checkpoint.newest(command.checkpoint)
    config = validated(RunConfig, found.config, str(found.path))
    store = shards.open(command.data)
    if store.classes != found.classes:
        raise ValueError(
            f"{command.data} has {len(store.classes)} classes ({', '.join(store.classes[:3])} …), the checkpoint "
            f"{len(found.classes)} ({', '.join(found.classes[:3])} …); evaluate on shards built from the same classes"
        )
    if command.images is not None and command.images > len(store):
        raise ValueError(f"--images asks for {command.images}, but {command.data} has {len(store)}")
    kinds = list(available_kinds())[1:] if command.kinds == ("all",) else list(command.kinds)
    for kind in kinds:
        kind_id(kind)

    # Every tensor comes from the checkpoint, so the weights training started from are not needed.
    net = model.build(config.model.model_copy(update={"weights": ""}), len(store.classes))
    net.load_state_dict(found.model_state())
    net = net.to(memory_format=torch.channels_last).to(state.device)
    pipeline = config.pipeline.model_copy(update={"threads": command.threads})
    ids = None
    if command.images is not None:
        ids = np.sort(permutation(len(store), command.seed, 0)[: command.images])
    loader = EvaluationLoader(
        store,
        pipeline,
        batch=command.batch,
        rank=state.process_index,
        ranks=state.num_processes,
        device_id=loader_device_id(state.device),
        sample_id=ids,
        on_damaged="stop" if command.on_damaged == "stop" else "replace",
    )
    cells = scoring.cells_of(kinds)
    mine = len(np.arange(len(store) if ids is None else len(ids))[state.process_index :: state.num_processes])
    began_s = time.perf_counter()
    try:
        # A log file wants a line now and then, a screen a moving bar.
        interval_s = 1 if sys.stderr.isatty() else 30
        quiet = not state.is_main_process
        with tqdm(total=mine * len(cells), unit="img", disable=quiet, mininterval=interval_s) as bar:
            counts = scoring.score(
                net,
                loader,
                pipeline,
                cells,
                seed=command.seed,
                flavour=command.flavour,
                device=state.device,
                precision=autocast_dtype(command.precision),
                progress=bar.update,
            )
    finally:
        loader.close()
    counts = reduce(counts.to(state.device), "sum").cpu()
    damaged = {store.location(i): reason for i, reason in gather_object(list(loader.damaged.items()))}
    elapsed_s = time.perf_counter() - began_s
    results = scoring.cells_from_counts(cells, counts)
    summary = summarise(results)
    report = {
        "checkpoint": str(found.path),
        "step": found.step,
        "commit": checkpoint.code_version(),
        "data": store.name,
        "classes": len(store.classes),
        "date": datetime.now(UTC).date().isoformat(),
        "seed": command.seed,
        "flavour": command.flavour,
        "images": results[0].images,
        "trained_on": list(config.pipeline.kinds),
        "rate_img_s": int(counts[:, 0].sum()) / elapsed_s,
        "damaged": damaged,
        **as_json(summary),
    }
    if state.is_main_process:
        out = command.out or _run_folder(found.path) / "evaluation"
        out.mkdir(parents=True, exist_ok=True)
        (out / "results.json").write_text(json.dumps(report, indent=1) + "\n")
        write_csv(out / "cells.csv", found.path.name, results)
        print(table(results, len(store.classes)))
        if damaged:
            print(f"left out: {len(damaged)} damaged images, named in {out / 'results.json'}")
        print(f"{report['rate_img_s']:.0f} images/s over {len(cells)} cells; written to {out}")
    return report


def _run_folder(checkpoint_path: Path) -> Path:
    return checkpoint_path.parent.parent if checkpoint_path.parent.name == "checkpoints" else checkpoint_path


def main() -> None:
    """Run the command line."""
    try:
        evaluate(tyro.cli(EvaluateCommand, description=EvaluateCommand.__doc__))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"evaluate.py: {error}")


if __name__ == "__main__":
    main()
