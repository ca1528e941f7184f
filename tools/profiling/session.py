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
from tools.profiling.clock import Probe, measure, settle
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
        self.steps: dict[str, list[list[Step]]] = {"model alone": [], "not averaged": []}
        """Watched steps on synthetic data, by probe and measurement; the first measurement is warm-up."""
        self.wholes: list[tuple[float, float, float]] = []
        """(seconds, seconds waited for data, CPU seconds) of each measurement of whole training steps; likewise."""
        self._loader_s: float | None = None  # per image, alone

    def _check_gpu(self) -> None:
        work = self.work

        def step(images: int) -> object:
            try:
                return work.lone_step(work.synthetic.first(images))
            finally:
                work.optimizer.zero_grad()

        memory.check_gpu(self.config, work.ranks, work.batch, step, self.agree)

    def agree(self, number: int) -> int:
        """Return the largest number any process has, so that all take the same number of steps."""
        if self.work.ranks == 1:
            return number
        mine = torch.tensor([number], device=self.work.device)
        return int(self.work.accelerator.gather(mine).max())

    def loader_that_fits(self, config: RunConfig) -> tuple[TrainingLoader | None, str]:
        """Return a loader with other settings, or None and why not: a training step from it has to fit in memory.

        Called on every process, with the same result on all.
        """
        work = self.work
        batch = config.pipeline.batch_per_gpu or max(1, config.pipeline.batch_global // work.ranks)
        unit = memory.unit(config)
        if not self.gpu:
            # Only estimated: a process that asks for too much is killed.
            need = memory.estimate(config, len(self.store.classes))
            largest = -self.agree(-need.largest(available_bytes() // work.ranks))
            if largest < batch:
                largest -= largest % unit
                return None, f"does not fit in memory; the largest batch that does is {largest}"
        if (loader := self._try(config)) is not None:
            return loader, ""
        micros = config.pipeline.batch_global // (work.ranks * batch)

        def fits(units: int) -> bool:
            size = units * unit
            pipeline = config.pipeline.model_copy(
                update={"batch_per_gpu": size, "batch_global": size * work.ranks * micros}
            )
            tried = self._try(config.model_copy(update={"pipeline": pipeline}))
            if tried is not None:
                tried.close()
            return tried is not None

        known = work.batch if work.batch < batch else 0
        largest = (
            unit * memory.largest_fitting(fits, (batch - 1) // unit, known // unit) if batch > unit else 0
        )
        return None, f"does not fit in memory; the largest batch that does is {largest}"

    def _try(self, config: RunConfig) -> TrainingLoader | None:
        """Return a loader with other settings if a training step from it fits in memory on every process."""
        made: list[TrainingLoader] = []

        def step() -> int:
            made.append(self.work.make_loader(config))
            return self.work.lone_step(made[0])

        if memory.fits(step, self.agree):
            return made[0]
        self.work.optimizer.zero_grad()
        for loader in made:
            loader.close()
        memory.release()
        return None

    def measured(self, *probes: Probe) -> bool:
        """Measure probes in turns; False if that took more memory than there is."""
        try:
            measure(
                probes,
                rounds=self.rounds,
                seconds=self.seconds,
                agree=self.agree,
                progress=self.progress,
            )
        except (RuntimeError, MemoryError) as error:
            # Several processes are not in step any more: this one has to end, and its launcher ends the others.
            if self.work.ranks > 1 or not memory.ran_out(error):
                raise
            return False
        return True

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
        """Return a probe of training steps on synthetic data, cut into pieces.

        Nothing waits for the device between the steps of a measurement: they are cut when it is over.
        """

        def prepare() -> None:
            settle()
            self.watch.take()
            self.watch.watch(self.work.synthetic)

        def watched() -> int:
            images = step()
            self.watch.step()
            return images

        def finish() -> None:
            self.steps[name].append(self.watch.take())

        return Probe(name, watched, device=True, prepare=prepare, finish=finish)

    def both_probe(self) -> Probe:
        """Return a probe of whole training steps."""
        loader = self.work.loader
        began: list[tuple[float, float, float]] = []

        def now() -> tuple[float, float, float]:
            return time.perf_counter(), loader.waited_s, time.process_time()

        def prepare() -> None:
            self.drain(loader)
            began[:] = [now()]

        def finish() -> None:
            wall_s, waited_s, cpu_s = (after - before for after, before in zip(now(), began[0], strict=True))
            self.wholes.append((wall_s, waited_s, cpu_s))

        return Probe("both", lambda: self.work.train_step(loader), prepare=prepare, finish=finish)

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
