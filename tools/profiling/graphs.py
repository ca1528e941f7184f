"""Times the stages of the DALI graph: each alone on data that is there already, and one after another.

Alone means: a graph of this one stage, with the threads of the run, fed the same few batches again and again (the
loader's own output of the stage before). Combined means: the run's graph cut off after a stage.
On a GPU the stages alone are differences between graphs cut off later and earlier, since feeding them would
add copies.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from nvidia.dali import Pipeline, types
from PIL import Image

from pipeline import graph
from pipeline.config import PipelineConfig
from pipeline.corruptions import dali_operator, kind_id
from pipeline.readahead import ReadBatch
from tools.profiling.clock import Probe
from tools.profiling.table import Stage

fn = graph.fn

STAGES = ("feed", "decode", "resize + flip", "corrupt", "normalise")
SMALL_SIDE = 256  # shorter side that ImageNet is often stored at
DECODE_SMALL = f"decode, stored at {SMALL_SIDE} px"
_SEVERITY = 3  # of single kinds: the middle
# Images whose mean stands for all: kinds, windows and image sizes differ in cost by ten times and more, so that
# one small batch says little about the next.
_SAMPLE = 256

Inputs = Sequence[Any]
"""What is fed for one batch: a list of arrays or a (B, ...) array for each input."""


class Cut:
    """A DALI pipeline that runs one batch a call, one after the other in turn; on a CPU nothing ahead of it.

    Args:
        build: makes the outputs inside the pipeline from the fed inputs.
        batches: what is fed.
        kinds: (DALI type, dimensions of a sample) of each input.
        batch: samples.
        threads: DALI's.
        device_id: CUDA device, or None for the CPU.
    """

    def __init__(
        self,
        build: Callable[..., Sequence[Any]],
        batches: Sequence[Inputs],
        kinds: Sequence[tuple[Any, int]],
        *,
        batch: int,
        threads: int,
        device_id: int | None,
    ) -> None:
        self._batch, self._batches = batch, len(batches)
        # Not self: a source that knew the pipeline would keep its threads alive for ever.
        turns = itertools.cycle([tuple(inputs) for inputs in batches])
        # On a GPU the host's part of decoding overlaps with the device's, as it does in the run.
        alone: dict[str, Any] = {"prefetch_queue_depth": 1, "exec_async": False, "exec_pipelined": False}
        options = alone if device_id is None else {}
        self._pipe: Any = Pipeline(batch_size=batch, num_threads=threads, device_id=device_id, **options)
        dtypes, ndims = (list(column) for column in zip(*kinds, strict=True))
        with self._pipe:
            nodes = fn.external_source(
                source=lambda: next(turns),
                num_outputs=len(kinds),
                batch=True,
                no_copy=True,
                dtype=dtypes,
                ndim=ndims,
            )
            self._pipe.set_outputs(*build(*nodes))
        self._pipe.build()

    def run(self) -> Any:
        """Run the next batch and return DALI's outputs."""
        return self._pipe.run()

    def step(self) -> int:
        """Run the next batch and return its images."""
        self._pipe.run()
        return self._batch

    def arrays(self) -> Iterator[list[np.ndarray[Any, Any]]]:
        """Run every batch once and yield copies of its first output, image by image."""
        for _ in range(self._batches):
            (out, *_) = self.run()
            out = out.as_cpu() if hasattr(out, "as_cpu") else out
            yield [np.array(out.at(i)) for i in range(self._batch)]

    def close(self) -> None:
        """Let the pipeline go."""
        self._pipe = None


class GraphStages:
    """The graph's stages over some batches.

    Args:
        config: the run's data settings.
        reads: batches with their plans, all of one size.
        device_id: CUDA device, or None for the CPU.
    """

    def __init__(self, config: PipelineConfig, reads: Sequence[ReadBatch], device_id: int | None) -> None:
        dali_operator.load()
        self._config = config
        self._device_id = device_id
        self._gpu = device_id is not None
        self._batch = len(reads[0].records.span)
        self._plans = [read.plan for read in reads]
        # AugMix works on grey levels after the graph, and normalises itself.
        self._names = STAGES[:-1] if config.augmix else STAGES
        self._fed = [graph.feed(read.records, read.plan, training=True) for read in reads]
        self._cuts: list[Cut] = []

    def _cut(
        self,
        build: Callable[..., Sequence[Any]],
        batches: Sequence[Inputs],
        kinds: Sequence[tuple[Any, int]],
    ) -> Cut:
        cut = Cut(
            build,
            batches,
            kinds,
            batch=self._batch,
            threads=self._config.threads,
            device_id=self._device_id,
        )
        self._cuts.append(cut)
        return cut

    def until(self, last: str) -> Cut:
        """Return the run's graph, cut off after a stage."""
        config, device = self._config, "gpu" if self._gpu else "cpu"
        depth = STAGES.index(last)

        def build(*fed: Any) -> Any:
            if depth == 0:
                return fed
            jpeg, anchor, window = fed[:3]
            image = graph.decode(config, jpeg, anchor, window, device)
            if depth == 1:
                return [image]
            size, flip = fed[3:5]
            image = clean = fn.flip(graph.resize(image, size), horizontal=flip)
            if depth >= 3:
                image = graph.corrupt(config, image, *fed[5:])
            if depth <= 3:
                return [image]
            return [graph.normalise(config, view) for view in ([image, clean] if config.paired else [image])]

        # Of what the source hands over; the encoded bytes are not copied, so feeding them costs nothing.
        used = slice(1, 8) if depth == 0 else slice((0, 3, 5, 8, 8)[depth])
        return self._cut(build, [fed[used] for fed in self._fed], graph.TRAINING_INPUTS[used])

    def alone(self, with_kinds: bool) -> list[Probe]:
        """Return a probe for each stage alone, and where wanted for each corruption kind (CPU)."""
        config, plans = self._config, self._plans
        windows = list(self.until("decode").arrays())
        crops = [np.stack(images) for images in self.until("resize + flip").arrays()]
        pixels, whole, label = (types.UINT8, 3), (types.INT32, 0), (types.INT64, 0)
        planned = [
            (crops_u8_BHWC, plan.kind_B, plan.severity_B, plan.key_B.view(np.int64))
            for crops_u8_BHWC, plan in zip(crops, plans, strict=True)
        ]

        def corrupted(image: Any, kind: Any, severity: Any, key: Any) -> Any:
            return [graph.corrupt(config, image, kind, severity, key)]

        corrupt = [pixels, whole, whole, label]
        probes = [
            Probe("feed", self.until("feed").step),
            Probe("decode", self.until("decode").step),
            Probe(
                "resize + flip",
                self._cut(
                    lambda image, size, flip: [fn.flip(graph.resize(image, size), horizontal=flip)],
                    [
                        (images, fed[3], plan.flip_B)
                        for images, fed, plan in zip(windows, self._fed, plans, strict=True)
                    ],
                    [pixels, (types.FLOAT, 1), whole],
                ).step,
            ),
            Probe("corrupt", self._cut(corrupted, planned, corrupt).step),
        ]
        if "normalise" in self._names:
            normalised = self._cut(
                lambda image: [graph.normalise(config, image) for _ in range(1 + config.paired)],
                [(crops_u8_BHWC,) for crops_u8_BHWC in crops],
                [pixels],
            )
            probes.append(Probe("normalise", normalised.step))
        if with_kinds:
            same = np.ones(self._batch, np.int32)
            for kind in config.kinds:
                one_kind = [
                    (image, same * kind_id(kind), same * _SEVERITY, key) for image, _, _, key in planned
                ]
                probes.append(Probe(f"corrupt: {kind}", self._cut(corrupted, one_kind, corrupt).step))
        return probes

    def combined(self) -> list[Probe]:
        """Return a probe for the graph cut off after each stage."""
        return [Probe(f"up to {name}", self.until(name).step) for name in self._names[1:]]

    def decode_of(self, reads: Sequence[ReadBatch], name: str) -> Probe:
        """Return a probe of decoding other batches of as many images."""
        other = GraphStages(self._config, reads, self._device_id)
        cut = other.until("decode")
        self._cuts.append(cut)
        return Probe(name, cut.step)

    def close(self) -> None:
        """Let all pipelines go."""
        for cut in self._cuts:
            cut.close()


def sample_batches(batch: int) -> int:
    """Return how many batches of this size make up a sample of images that stands for all."""
    return -(-_SAMPLE // batch)


def stages(measured: dict[str, Probe], gpu: bool) -> list[Stage]:
    """Return the stages of the graph's lane, and of the single kinds and combinations those that were measured."""
    combined = [name for name in measured if name.startswith("up to ")]
    feed = measured["feed"]
    found: list[Stage] = [feed.stage("graph")]
    if gpu:
        before, before_cpu = feed.wall(), feed.cpu()
        for cut in combined:
            name = cut.removeprefix("up to ")
            wall, cpu = measured[cut].wall(), measured[cut].cpu()
            time_s, cpu_s = wall.less(before), cpu.less(before_cpu)
            note = "difference of two graphs; GPU time at most this"
            found.append(
                Stage(name=name, lane="graph", wall_s=time_s, cpu_s=cpu_s, device_s=time_s, note=note)
            )
            before, before_cpu = wall, cpu
    else:
        found += [measured[name].stage("graph") for name in STAGES[1:] if name in measured]
    for name, probe in measured.items():
        if name == DECODE_SMALL:
            wall, cpu = probe.wall(), probe.cpu()
            if gpu:
                wall, cpu = wall.less(feed.wall()), cpu.less(feed.cpu())
            note = "the same windows of images stored smaller"
            found.append(Stage(name=name, lane="shown", wall_s=wall, cpu_s=cpu, note=note))
        if name.startswith("corrupt: "):
            found.append(probe.stage("shown", note=f"all images, severity {_SEVERITY}"))
    found += [measured[name].stage("shown", note="combined") for name in combined]
    return found


def stored_smaller(read: ReadBatch, side: int) -> ReadBatch:
    """Return the batch as if its images had been stored with a shorter side of at most `side` pixels.

    JPEG quality 90, Pillow's default chroma subsampling; the windows cover the same part of each image.
    """
    data, anchor_B2, window_B2 = [], read.plan.anchor_B2.copy(), read.plan.window_B2.copy()
    for i, encoded in enumerate(read.records.data):
        image = Image.open(io.BytesIO(encoded.tobytes())).convert("RGB")
        scale = min(1.0, side / min(image.size))
        width, height = (max(1, round(length * scale)) for length in image.size)
        if scale < 1:
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        out = io.BytesIO()
        image.save(out, "JPEG", quality=90)
        data.append(np.frombuffer(out.getvalue(), np.uint8))
        limit = np.array([height, width])
        anchor_B2[i] = np.minimum((anchor_B2[i] * scale).astype(np.int32), limit - 1)
        window_B2[i] = np.clip((window_B2[i] * scale).astype(np.int32), 1, limit - anchor_B2[i])
    plan = dataclasses.replace(read.plan, anchor_B2=anchor_B2, window_B2=window_B2)
    return dataclasses.replace(read, records=read.records.replaced(dict(enumerate(data))), plan=plan)
