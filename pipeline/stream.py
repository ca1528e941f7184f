"""Runs the graph over planned batches: keeps plans and outputs in step, jumps, and survives bad records.

DALI calls the source ahead of what it delivers, so the plan of a delivered batch is the oldest one
still in flight. A jump, and an error inside DALI (after which its pipeline must not be used again),
both rebuild the graph at the wanted batch; that takes some 30 ms.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from pipeline import graph
from pipeline.config import PipelineConfig
from pipeline.plan import Plan
from pipeline.readahead import U8, Damage, ReadAhead, ReadBatch, grey_jpeg
from shards import Records, Store

log = logging.getLogger(__name__)


class _Source:
    """What DALI calls for input. Holds no reference to the pipeline: such a cycle would leak its threads."""

    def __init__(self, reader: ReadAhead, training: bool, prefetch: int) -> None:
        self._reader = reader
        self._training = training
        self.in_flight: deque[ReadBatch] = deque()
        # DALI reads the records where they lie for as long as it works on the batch.
        self._alive: deque[ReadBatch] = deque(maxlen=prefetch + 3)
        self.error: BaseException | None = None

    def __call__(self) -> tuple[Any, ...]:
        try:
            batch = self._reader.next()
        except BaseException as error:
            self.error = error  # DALI may wrap what a source raises; the caller gets the original
            raise
        self.in_flight.append(batch)
        self._alive.append(batch)
        return graph.feed(batch.records, batch.plan, training=self._training)


class _InUse:
    """Keeps GPU outputs alive until the work that reads them is done.

    DALI takes a buffer back as soon as the last reference goes, but kernels that read it may still be queued on
    torch's stream. A batch is let go when the work queued before the next one was asked for has finished.
    """

    def __init__(self) -> None:
        self._latest: list[Tensor] = []
        self._waiting: deque[tuple[Any, list[Tensor]]] = deque()  # (torch.cuda.Event, outputs)

    def replace(self, outputs: list[Tensor]) -> None:
        if self._latest and self._latest[0].is_cuda:
            done: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(torch.cuda.current_stream(self._latest[0].device))
            self._waiting.append((done, self._latest))
        self._latest = outputs
        while self._waiting and self._waiting[0][0].query():
            self._waiting.popleft()


class Stream:
    """An endless sequence of decoded batches, in the order of their numbers.

    Args:
        store: the records.
        config: the run's data settings.
        plan_at: batch number to its plan; thread-safe.
        batch: largest batch.
        device_id: CUDA device, or None for the CPU.
        training: see `graph.define`.
        on_damaged: "replace" or "stop".
    """

    def __init__(
        self,
        store: Store,
        config: PipelineConfig,
        plan_at: Callable[[int], Plan],
        *,
        batch: int,
        device_id: int | None,
        training: bool,
        on_damaged: str,
    ) -> None:
        self._config = config
        self._batch = batch
        self._device_id = device_id
        self._training = training
        self.damage = Damage(store, on_damaged)
        self._reader = ReadAhead(
            store, plan_at, self.damage, threads=config.read_threads, depth=config.read_ahead
        )
        self._pipe: Any = None
        self._source: _Source | None = None
        self._in_use = _InUse()
        self._next = 0

    def seek(self, number: int) -> None:
        """Make `number` the next batch."""
        if self._pipe is not None or number != self._next:
            self._drop()
        self._next = number

    def _drop(self) -> None:
        self._pipe = None
        self._source = None

    def _build(self) -> None:
        self._reader.seek(self._next)
        self._source = _Source(self._reader, self._training, self._config.prefetch)
        self._pipe = graph.define(
            self._config,
            self._source,
            batch=self._batch,
            device_id=self._device_id,
            training=self._training,
        )
        self._pipe.build()

    def next(self) -> tuple[ReadBatch, list[Tensor]]:
        """Return the next batch and the graph's outputs as tensors that own their memory."""
        while True:
            if self._pipe is None:
                self._build()
            assert self._source is not None
            try:
                outputs = self._pipe.run()
            except Exception as error:
                source = self._source
                self._drop()
                if source.error is not None:
                    raise source.error from None
                self._blame(list(source.in_flight), error)
                continue
            batch = self._source.in_flight.popleft()
            self._next = batch.number + 1
            tensors = [from_dlpack(output.as_tensor()) for output in outputs]
            self._in_use.replace(tensors)
            return batch, tensors

    def _blame(self, in_flight: list[ReadBatch], error: Exception) -> None:
        """Find which records made DALI fail and note them; raise the error if none did."""
        suspects: dict[tuple[int, int], tuple[ReadBatch, int]] = {}
        for batch in in_flight:
            for i in np.flatnonzero(~batch.damaged_B).tolist():
                suspects.setdefault((int(batch.plan.epoch_B[i]), int(batch.plan.sample_B[i])), (batch, i))
        if not suspects:
            raise error
        # If DALI cannot even decode a sound picture now (out of memory, say), no record is to blame.
        batch, i = next(iter(suspects.values()))
        height, width = (batch.plan.anchor_B2[i] + batch.plan.window_B2[i]).tolist()
        if not self._decodes(batch, i, grey_jpeg(height, width)):
            raise error
        culprits = [
            (batch, i) for batch, i in suspects.values() if not self._decodes(batch, i, batch.records.data[i])
        ]
        if not culprits:
            raise error
        log.warning("the decoder failed: %s", str(error).strip().splitlines()[-1])
        for batch, i in culprits:
            self.damage.reject(int(batch.plan.epoch_B[i]), int(batch.plan.sample_B[i]))

    def _decodes(self, batch: ReadBatch, i: int, data: U8) -> bool:
        """Whether DALI decodes a sample's window of these bytes in a graph of its own."""
        plan, records = batch.plan, Records.of([data])
        geometry = tuple(a[i : i + 1] for a in (plan.anchor_B2, plan.window_B2))
        one = (
            records.span,
            *geometry,
            plan.size_B2[i : i + 1].astype(np.float32),
            plan.offset_B2[i : i + 1],
        )
        probe = graph.define(self._config, lambda: one, batch=1, device_id=self._device_id, training=False)
        try:
            probe.build()
            probe.run()
        except Exception as error:
            log.debug("probe of sample %d: %s", plan.sample_B[i], error)
            return False
        return True

    def reading(self) -> str:
        """Say what is being read now, for a message about a stuck source."""
        return self._reader.reading()

    def close(self) -> None:
        """Stop DALI's and the readers' threads."""
        self._drop()
        self._reader.close()
