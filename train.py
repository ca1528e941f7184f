"""Trains VQSA: the whole loop, top to bottom.

accelerate launch train.py --recipe recipes/paper.toml --data SHARDS --out runs/x --epochs 90 --resume auto
"""

from __future__ import annotations

import logging
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, set_seed
from torch import Tensor, nn

import model
import shards
from model.codebook import codes_used, perplexity
from pipeline.loader import EvaluationLoader, TrainingLoader
from tools.runtime import checkpoint, scoring
from tools.runtime.config import RunConfig, differences, flatten, parse_command, validated
from tools.runtime.device import loader_device_id
from tools.runtime.interrupt import StopRequest
from tools.runtime.meter import Meter
from tools.runtime.metrics import MetricsFile, progress_line
from tools.runtime.optim import autocast_dtype, learning_rate, make_optimizer, set_learning_rate
from tools.runtime.results import CLEAN

log = logging.getLogger("vqsa")


class TrainCommand(RunConfig):
    """Train VQSA on a shard set. Starting values come from --recipe FILE; every setting can be overridden."""

    recipe: Path | None = None
    """TOML file with starting values, such as recipes/paper.toml."""

    resume: str = "no"
    """"auto": go on from the newest whole checkpoint in `out`, or start there if it has none. A path: go on
    from that checkpoint. "no": start; refuses a folder that already has checkpoints."""

    dry_run: bool = False
    """Check everything, print the resolved configuration and the length of the run, and stop."""


class Progress:
    """How far the run is; saved in every checkpoint."""

    def __init__(self) -> None:
        self.step = 0

    def state_dict(self) -> dict[str, int]:
        """Return the number of optimiser steps done."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after that many steps."""
        self.step = state["step"]


def starting_point(
    command: TrainCommand, config: RunConfig, classes: list[str]
) -> checkpoint.Checkpoint | None:
    """Return the checkpoint to go on from, or None to start; refuses one of another configuration."""
    folder = config.out / "checkpoints"
    if command.resume == "no":
        if checkpoint.complete(folder):
            raise ValueError(
                f"{config.out} already holds a run; say --resume auto to go on with it, or choose another --out"
            )
        return None
    if command.resume == "auto":
        found = checkpoint.complete(folder)
        start = found[-1] if found else None
    else:
        start = checkpoint.newest(Path(command.resume))
        later = [
            c.path.name
            for c in checkpoint.complete(folder)
            if c.step > start.step or start.path.resolve().parent != folder.resolve()
        ]
        if later:
            raise ValueError(
                f"{config.out} holds other checkpoints ({', '.join(later)}) than the one to go on from; give another "
                "--out, or move them away"
            )
    if start is not None:
        if start.classes != classes:
            raise ValueError(
                f"{config.data} has other classes than {start.path} was trained on; resume on its data"
            )
        changed = differences(start.config, config.model_dump(mode="json"))
        if changed:
            raise ValueError(
                f"{start.path} was made with another configuration ({'; '.join(changed)}); go on with the same "
                "settings, or start a new run in another --out"
            )
    return start


def validate(
    accelerator: Accelerator, net: nn.Module, store: shards.Store, config: RunConfig
) -> dict[str, float]:
    """Return clean top-1 and top-5 (percent) on the validation shards, over all processes."""
    if accelerator.num_processes > 1:
        # Each process has updated its running statistics from its own images; a checkpoint has the first one's.
        for buffer in net.buffers():
            broadcast(buffer)
    loader = EvaluationLoader(
        store,
        config.pipeline,
        batch=config.pipeline.batch_per_gpu or config.pipeline.batch_global // accelerator.num_processes,
        rank=accelerator.process_index,
        ranks=accelerator.num_processes,
        device_id=loader_device_id(accelerator.device),
    )
    cells = [(CLEAN, 0)]
    try:
        counts = scoring.score(
            accelerator.unwrap_model(net),
            loader,
            config.pipeline,
            cells,
            seed=config.seed,
            flavour="hendrycks",
            device=accelerator.device,
            precision=autocast_dtype(config.precision),
        )
    finally:
        loader.close()
    total = accelerator.reduce(counts.to(accelerator.device), "sum").cpu()
    (clean,) = scoring.cells_from_counts(cells, total)
    return {"val_top1_pct": 100 * clean.top1, "val_top5_pct": 100 * clean.top5}


def micro_batches(loader: TrainingLoader, meter: Meter) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the (images, labels) that make up this process's part of one global batch."""
    for _ in range(loader.micros):
        began_s = time.perf_counter()
        batch = next(loader)
        meter.wait(time.perf_counter() - began_s)
        if batch.clean_images is None:
            yield batch.images, batch.labels
        else:
            yield torch.cat([batch.clean_images, batch.images]), torch.cat([batch.labels, batch.labels])


def train_step(
    accelerator: Accelerator,
    net: nn.Module,
    optimizer: Any,
    loader: TrainingLoader,
    meter: Meter,
) -> None:
    """Make one optimiser step from one global batch, in as many parts as the loader gives it."""
    net.train()
    batches: Iterable[tuple[Tensor, Tensor]] = micro_batches(loader, meter)
    inner = accelerator.unwrap_model(net)
    if loader.micros > 1 and inner.codebook is not None and not inner.codebook.is_initialised:
        # Codes that start from data start from the whole global batch, however it is divided.
        batches = list(batches)
        with accelerator.autocast():
            inner.initialise_codebook(*(images for images, _ in batches))
    for part, (images, labels) in enumerate(batches, start=1):
        with nullcontext() if part == loader.micros else accelerator.no_sync(net):
            with accelerator.autocast():
                output = net(images, labels)
            accelerator.backward(output.loss / loader.micros)
        losses = {name: getattr(output, name) for name in ("loss", "ce", "vq", "commit")}
        meter.add(losses, output.logits, labels)
    optimizer.step()
    optimizer.zero_grad()


def codebook_metrics(accelerator: Accelerator, net: nn.Module) -> dict[str, float]:
    """Return the share of codes in use (percent) and their perplexity since the last call, over all processes."""
    book = accelerator.unwrap_model(net).codebook
    if book is None:
        return {}
    usage_K = accelerator.reduce(book.usage_K, "sum")
    book.reset_usage()
    return {
        "codes_used_pct": 100 * codes_used(usage_K).item() / len(usage_K),
        "perplexity": perplexity(usage_K).item(),
    }


def memory_gib(device: torch.device) -> float:
    """Return the peak memory of the device, or of this process where that is the CPU, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def train(command: TrainCommand) -> int:
    """Run or continue a training; returns the exit code."""
    settings = command.model_dump(exclude={"recipe", "resume", "dry_run"})
    config = validated(RunConfig, settings, "command line")
    store = shards.open(config.data)
    val_store = shards.open(config.val) if config.val is not None else None
    if val_store is not None and val_store.classes != store.classes:
        raise ValueError(
            f"{config.val} and {config.data} have different class lists; build both from the same classes"
        )
    total = config.total_steps(len(store))
    steps_per_epoch = len(store) / config.pipeline.batch_global

    start = starting_point(command, config, store.classes)
    accelerator = Accelerator(
        mixed_precision={"fp32": "no"}.get(config.precision, config.precision),
        log_with="tensorboard",
        project_dir=str(config.out),
        step_scheduler_with_optimizer=False,
    )
    main = accelerator.is_main_process
    say = print if main else (lambda *_: None)
    set_seed(
        config.seed % 2**32
    )  # numpy takes no more; nothing of ours uses these generators but initial weights
    loader = TrainingLoader(
        store,
        config.pipeline,
        seed=config.seed,
        rank=accelerator.process_index,
        ranks=accelerator.num_processes,
        device_id=loader_device_id(accelerator.device),
    )
    net: nn.Module = model.build(config.model, len(store.classes)).to(memory_format=torch.channels_last)
    optimizer = make_optimizer(config.optim, net.parameters())
    parameters = sum(p.numel() for p in net.parameters())
    say(
        f"{store.name}: {len(store)} images, {len(store.classes)} classes; {config.model.trunk}, {parameters:,} "
        f"parameters; {total} steps of {config.pipeline.batch_global} on {accelerator.num_processes} process(es), "
        f"{accelerator.device.type}, {config.precision}; code {checkpoint.code_version()}"
    )
    if command.dry_run:
        for name, value in flatten(config.model_dump(mode="json")).items():
            say(f"  {name} = {value}")
        loader.close()
        return 0

    net, optimizer = accelerator.prepare(net, optimizer)
    progress = Progress()
    accelerator.register_for_checkpointing(progress, loader)
    if start is not None:
        accelerator.load_state(str(start.path))
        say(f"resumed after step {progress.step} from {start.path}")
    metrics = MetricsFile(config.out / "metrics.jsonl", progress.step) if main else None
    accelerator.init_trackers("tensorboard", config=None)
    meter = Meter(accelerator.device)

    def report(record: dict[str, Any]) -> None:
        accelerator.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])
        if metrics is not None:
            metrics.write(record)

    def save() -> bool:
        return checkpoint.save(
            accelerator,
            config.out / "checkpoints",
            step=progress.step,
            config=config,
            classes=store.classes,
            keep=config.keep,
        )

    began_s, began_step = time.perf_counter(), progress.step
    try:
        with StopRequest() as stop:
            while progress.step < total:
                rate = learning_rate(config.optim, progress.step, total, steps_per_epoch)
                set_learning_rate(optimizer, rate)
                train_step(accelerator, net, optimizer, loader, meter)
                progress.step += 1
                step, done = progress.step, progress.step == total
                due = step % config.log_every == 0 or done
                if due:
                    record: dict[str, Any] = {"step": step, "epoch": step / steps_per_epoch, "lr": rate}
                    record |= meter.report(accelerator)
                    record |= codebook_metrics(accelerator, net)
                    record["memory_gib"] = memory_gib(accelerator.device)
                    damaged = torch.tensor(len(loader.damaged), device=accelerator.device)
                    record["damaged"] = int(accelerator.reduce(damaged, "sum"))
                    left_s = (time.perf_counter() - began_s) / (step - began_step) * (total - step)
                    say(progress_line({**record, "eta_s": left_s}, total))
                    report(record)
                aside_s = time.perf_counter()
                if val_store is not None and (step % config.val_every == 0 or done):
                    scores = validate(accelerator, net, val_store, config)
                    say(
                        f"step {step}/{total}  val top1 {scores['val_top1_pct']:.2f}%  "
                        f"top5 {scores['val_top5_pct']:.2f}%"
                    )
                    report({"step": step, "epoch": step / steps_per_epoch, **scores})
                stopping = stop.agreed() and not done
                saved = save() if step % config.checkpoint_every == 0 or done or stopping else True
                meter.exclude(time.perf_counter() - aside_s)
                if (done or stopping) and not saved:
                    raise OSError(
                        f"the run ends after step {step} of {total} without its last checkpoint, which could not be "
                        f"written to {config.out}; make room and say --resume auto to repeat what came after the "
                        "previous one"
                    )
                if stopping:
                    say(f"stopped after step {step} of {total}; go on with --resume auto")
                    return 130
    finally:
        loader.close()
        if metrics is not None:
            metrics.close()
    accelerator.end_training()
    say(f"done: {total} steps, checkpoint in {config.out / 'checkpoints'}")
    return 0


def main() -> None:
    """Run the command line; what the user got wrong is said in a line, without a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        code = train(parse_command(TrainCommand))
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {error}")
    sys.exit(code)


if __name__ == "__main__":
    main()
