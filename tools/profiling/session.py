"""A run that is set up and ready to be measured in several ways."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator

import shards
from pipeline.joined import join
from pipeline.loader import TrainingLoader
from tools.profiling import memory, reading
from tools.profiling.attached import Step, StepProfile
from tools.profiling.clock import Probe
from tools.profiling.machine import available_bytes
from tools.profiling.table import Spread
from tools.profiling.workload import Workload
from tools.runtime.config import RunConfig

_FASTER = 0.25  # loader's time over the step's: its queues stay full


class Session:
    """Holds the run's model and loader, and makes probes of them.

    Args:
        config: the run.
        accelerator: where it runs.
        rounds: turns of every measurement.
        seconds: least length of one.
        progress: called with the name of what is measured next.

    Raises:
        ValueError: the batch does not fit in memory, or the shards are damaged beyond use.
    """

    def __init__(
        self,
        config: RunConfig,
        accelerator: Accelerator,
        *,
        rounds: int,
        seconds: float,
        progress: Callable[[str], None],
    ) -> None:
        self.config, self.rounds, self.seconds, self.progress = config, rounds, seconds, progress
        self.gpu = accelerator.device.type == "cuda"
        self.store = shards.open(config.data)
        joined = join([self.store, *(shards.open(path) for path in config.extra)])
        self.samples = len(joined)
        ranks = accelerator.num_processes
        batch = config.pipeline.batch_per_gpu or max(1, config.pipeline.batch_global // ranks)
        self.reader = reading.Reader(self.store, config.pipeline, config.seed, batch)
        self.warnings = self.reader.check()
        progress("memory")
        if not self.gpu:
            memory.check_cpu(config, len(self.store.classes), ranks, batch, available_bytes())
        self.work = Workload(config, joined, accelerator)
        if self.gpu:
            self._check_gpu()
        self.watch = StepProfile(self.work.net, self.work.optimizer, self.work.synthetic, steps=2**62, skip=0)
        self.steps: dict[str, list[Step]] = {"model alone": [], "not averaged": []}
        """Watched steps on synthetic data, by probe."""
        self.wholes: list[tuple[float, float, float]] = []
        """(seconds, seconds waited for data, CPU seconds) of each whole training step."""
        self._loader_s: float | None = None  # per image, alone

    def _check_gpu(self) -> None:
        work = self.work

        def step(images: int) -> object:
            try:
                return work.train_step(work.synthetic.first(images))
            finally:
                work.optimizer.zero_grad()

        memory.check_gpu(self.config, work.ranks, work.batch, step)

    def agree(self, number: int) -> int:
        """Return the largest number any process has, so that all take the same number of steps."""
        if self.work.ranks == 1:
            return number
        mine = torch.tensor([number], device=self.work.device)
        return int(self.work.accelerator.gather(mine).max())

    def rate(self, probe: Probe) -> Spread:
        """Return a probe's images per second of all processes."""
        return Spread.of([self.work.ranks / reading.wall_s for reading in probe.readings])

    def loader_probe(self) -> Probe:
        """Return a probe of the loader alone."""
        work = self.work

        def step() -> int:
            began_s = time.perf_counter()
            images = work.load_step()
            self._loader_s = (time.perf_counter() - began_s) / images
            return images

        return Probe("loader alone", step, prepare=lambda: self.drain(work.loader, work.load_step))

    def model_probe(self, name: str, step: Callable[[], int]) -> Probe:
        """Return a probe of training steps on synthetic data, cut into pieces."""

        def watched() -> int:
            self.watch.watch(self.work.synthetic)
            self.watch.take()
            images = step()
            self.watch.step()
            self.steps[name] += self.watch.take()
            return images

        return Probe(name, watched, device=True)

    def both_probe(self) -> Probe:
        """Return a probe of whole training steps."""
        loader = self.work.loader

        def step() -> int:
            wait_s, cpu_s, began_s = loader.waited_s, time.process_time(), time.perf_counter()
            images = self.work.train_step(loader)
            wall_s = time.perf_counter() - began_s
            self.wholes.append((wall_s, loader.waited_s - wait_s, time.process_time() - cpu_s))
            return images

        return Probe("both", step, prepare=lambda: self.drain(loader))

    def training_probe(self, name: str, config: RunConfig, loader: TrainingLoader) -> Probe:
        """Return a probe of whole training steps from a loader with other settings."""
        return Probe(
            name,
            lambda: self.work.train_step(loader),
            prepare=lambda: self.drain(loader, lambda: self.work.train_step(loader), config),
        )

    def drain(
        self, loader: Any, step: Callable[[], int] | None = None, config: RunConfig | None = None
    ) -> None:
        """Take what has gathered in the loader's queues while something else was measured.

        A short measurement would else be of batches that were there already. Ends early where the loader is so much
        faster that its queues stay full anyway.
        """
        pipeline = (config or self.config).pipeline
        take = step or (lambda: self.work.train_step(loader))
        for _ in range(-(-(pipeline.prefetch + pipeline.read_ahead) // loader.micros)):
            began_s = time.perf_counter()
            images = take()
            step_s = time.perf_counter() - began_s
            stays_full = self._loader_s is not None and self._loader_s * images < _FASTER * step_s
            if not self.agree(int(not stays_full)):
                return

    def close(self) -> None:
        """Stop all threads."""
        self.watch.detach()
        self.work.close()
        self.reader.close()
        self.store.close()
