"""The run to be profiled: its model, optimiser and loader, set up as train.py does, and its own training step."""

from __future__ import annotations

import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

import model
import shards
from pipeline.augmix import augmix, draw_chains
from pipeline.loader import TrainingBatch, TrainingLoader
from tools.runtime.codebook import start_codebook
from tools.runtime.config import RunConfig
from tools.runtime.device import loader_device_id
from tools.runtime.ema import Ema
from tools.runtime.guard import FiniteGuard
from tools.runtime.launch import as_configured
from tools.runtime.meter import Meter
from tools.runtime.optim import make_optimizer
from tools.runtime.state import TrainingState
from tools.runtime.step import train_step
from tools.runtime.writer import Writer


class WatchedStore:
    """A store that remembers when its records were fetched, for the timeline."""

    def __init__(self, store: shards.Store) -> None:
        self._store = store
        self.fetches: list[tuple[int, float, float]] = []
        """(thread, start, end) of each call, on the clock of time.perf_counter."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def __len__(self) -> int:
        return len(self._store)

    def fetch(self, *arguments: Any, **named: Any) -> shards.Records:
        """As `Store.fetch`."""
        began_s = time.perf_counter()
        records = self._store.fetch(*arguments, **named)
        self.fetches.append((threading.get_ident(), began_s, time.perf_counter()))
        return records


def each_tensor(batch: TrainingBatch, change: Callable[[torch.Tensor], torch.Tensor]) -> TrainingBatch:
    """Return the batch with every tensor changed."""
    changes: dict[str, Any] = {"augmented": tuple(change(view) for view in batch.augmented)}
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, torch.Tensor):
            changes[field.name] = change(value)
    return dataclasses.replace(batch, **changes)


class Synthetic:
    """Gives the same batch again and again at no cost: the model alone."""

    def __init__(self, batch: TrainingBatch, micros: int) -> None:
        # Copies: DALI's own memory would be held for ever.
        self._batch = each_tensor(batch, lambda x: x.clone(memory_format=torch.preserve_format))
        self.micros = micros
        self.waited_s = 0.0

    def __next__(self) -> TrainingBatch:
        return self._batch

    def first(self, images: int) -> Synthetic:
        """Return one that gives only the first images of the batch."""
        return Synthetic(each_tensor(self._batch, lambda x: x[:images]), self.micros)


@functools.cache
def _group_of_one() -> Any:
    """Return the process group that only this process is in; first called on all processes at the same time."""
    return torch.distributed.new_subgroups(group_size=1)[0]


@contextmanager
def apart(net: Any) -> Iterator[None]:
    """Keep what a model exchanges with other processes in a training step to itself: statistics, codebook updates."""
    norms = [module for module in net.modules() if isinstance(module, nn.SyncBatchNorm)]
    groups = [norm.process_group for norm in norms]
    for norm in norms:
        norm.process_group = _group_of_one()
    net.update_codebook = lambda *outputs: None
    try:
        yield
    finally:
        del net.update_codebook
        for norm, group in zip(norms, groups, strict=True):
            norm.process_group = group


class Workload:
    """Everything a training step needs.

    Args:
        config: the run.
        store: its records.
        accelerator: where it runs.
    """

    def __init__(self, config: RunConfig, store: shards.Store, accelerator: Accelerator) -> None:
        self.config, self.accelerator = config, accelerator
        self.store = WatchedStore(store)
        self.records = cast(shards.Store, self.store)
        self.device: torch.device = accelerator.device
        self.ranks: int = accelerator.num_processes
        set_seed(0)
        self.loader = self.make_loader(config)
        self.batch = self.loader.batch_per_rank
        net = as_configured(model.build(config.model, len(store.classes)), config).to(accelerator.device)
        optimizer: Any = make_optimizer(config.optim, net, scaled=accelerator.scaler is not None)
        self.gradient_numbers = sum(p.numel() for p in net.parameters() if p.requires_grad)
        self.net, self.optimizer = accelerator.prepare(net, optimizer)
        inner: Any = accelerator.unwrap_model(self.net)
        self._ema = Ema(inner, config.optim.ema_decay) if config.optim.ema_decay else None
        self._meter, self._guard = Meter(accelerator), FiniteGuard()
        start_codebook(
            accelerator,
            self.net,
            self.loader,
            lambda batch: torch.cat(batch.views),
            batches=config.model.init_batches,
            samples=len(store),
        )
        self.synthetic = Synthetic(next(self.loader), self.loader.micros)
        self._step = 0

    def make_loader(self, config: RunConfig) -> TrainingLoader:
        """Return a loader of this run with other settings."""
        return TrainingLoader(
            self.records,
            config.pipeline,
            seed=config.seed,
            rank=self.accelerator.process_index,
            ranks=self.ranks,
            device_id=loader_device_id(self.device),
        )

    def train_step(self, loader: Any) -> int:
        """Make one optimiser step of train.py's; returns this process's images."""
        return self._train_step(self.net, loader)

    def lone_step(self, loader: Any) -> int:
        """Make an optimiser step that waits for no other process; what it makes of the weights is of no use."""
        if self.ranks == 1:
            return self.train_step(loader)
        inner = self.accelerator.unwrap_model(self.net)
        with apart(inner):
            return self._train_step(inner, loader)

    def _train_step(self, net: nn.Module, loader: Any) -> int:
        train_step(
            self.accelerator,
            net,
            self.optimizer,
            loader,
            self._meter,
            self.config,
            step=self._step,
            guard=self._guard,
        )
        self._step += 1
        if self._ema is not None:
            self._ema.update(self._step)
        return int(loader.micros * (self.batch if isinstance(loader, Synthetic) else loader.batch_per_rank))

    def load_step(self) -> int:
        """Take one optimiser step's batches from the loader and do nothing with them."""
        for _ in range(self.loader.micros):
            next(self.loader)
        return self.loader.micros * self.batch

    def unsynchronised_step(self) -> int:
        """Make a step on synthetic data whose gradients are not averaged over the processes."""
        with self.accelerator.no_sync(self.net) if self.ranks > 1 else nullcontext():
            return self.train_step(self.synthetic)

    def search(self) -> Callable[[], int] | None:
        """Return a call that searches the codebook for one batch's features; None for a model without one."""
        book = self.accelerator.unwrap_model(self.net).codebook
        if book is None:
            return None
        caught: list[Any] = []
        handle = book.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0].detach().clone()))
        self.train_step(self.synthetic)
        handle.remove()
        z_ND, views = caught[0], len(caught) / self.loader.micros
        codes_KD = book.codes.detach()
        images = round(self.batch / views)

        @torch.no_grad()
        def run() -> int:
            if getattr(book, "top_k", 1) > 1:
                model.codebook.nearest_codes(z_ND, codes_KD, book.top_k, book.metric)
            else:
                model.codebook.nearest_code(z_ND, codes_KD, book.metric)
            return images

        return run

    def all_reduce(self) -> int:
        """Average a gradient's worth of numbers over the processes, in the buckets DistributedDataParallel uses."""
        bucket = 25 * 2**20 // 4  # numbers in 25 MiB of float32
        left = self.gradient_numbers
        while left > 0:
            torch.distributed.all_reduce(torch.zeros(min(bucket, left), device=self.device))
            left -= bucket
        return self.loader.micros * self.batch

    def copy(self) -> Callable[[], int] | None:
        """Return a call that copies one batch's encoded bytes to the GPU; None on a CPU, where nothing is copied.

        From pinned memory, as DALI copies: else the host's own copy into such memory would be measured.
        """
        if self.device.type != "cuda":
            return None
        mean_bytes = int(self.store.length[:1024].mean()) * self.batch
        host = torch.empty(mean_bytes, dtype=torch.uint8, pin_memory=True)

        def run() -> int:
            host.to(self.device, non_blocking=True)
            return self.batch

        return run

    def gflop_per_image(self) -> float:
        """Return the floating-point operations of forward and backward pass, search included, per image, in 1e9.

        Matrix products and convolutions are counted, as usual; a multiply-add is two.
        """
        from torch.utils.flop_counter import FlopCounterMode

        self.train_step(self.synthetic)  # a codebook that starts from data does it outside the count
        # The counter follows modules through hooks that work of no gradient (the search) does not pass.
        with FlopCounterMode(display=False) as counter:
            self.train_step(self.synthetic)
        flops = counter.get_total_flops()
        book = self.accelerator.unwrap_model(self.net).codebook
        if book is not None:
            caught: list[int] = []
            handle = book.register_forward_pre_hook(lambda _, inputs: caught.append(len(inputs[0])))
            self.train_step(self.synthetic)
            handle.remove()
            # The search is an operator of its own, whose inside the counter does not see.
            flops += 2 * sum(caught) * book.codes.numel()
        return float(flops) / (self.loader.micros * self.batch) / 1e9

    def augmix(self) -> Callable[[], int] | None:
        """Return a call that makes the AugMix views of one batch; None where the run has none."""
        pipeline = self.config.pipeline
        if not pipeline.augmix:
            return None
        side = pipeline.image_size
        pixels_u8_BSSC = torch.randint(
            0, 256, (self.batch, side, side, 3), dtype=torch.uint8, device=self.device
        )
        sample_B = np.arange(self.batch, dtype=np.int64)

        def run() -> int:
            for view in range(pipeline.augmix):
                augmix(pixels_u8_BSSC, draw_chains(self.config.seed, sample_B * 0, sample_B, view), pipeline)
            return self.batch

        return run

    def save(self, folder: Path) -> float:
        """Write a checkpoint into an empty folder and return the seconds the loop stood still for it."""
        writer = Writer(
            self.accelerator, folder, config=self.config, classes=self.store.classes, keep=1, background=False
        )
        state = TrainingState(
            self.accelerator,
            self.net,
            self.optimizer,
            self._ema,
            {"stream": self.loader, "meter": self._meter},
        )
        began_s = time.perf_counter()
        written = writer.save(state.snapshot(copy=False), 1, best=0, last=True)
        taken_s = time.perf_counter() - began_s
        if not written:
            raise OSError(
                f"a checkpoint could not be written to {folder}; make room, or choose another --out"
            )
        return taken_s

    def close(self) -> None:
        """Stop the loader."""
        self.loader.close()
