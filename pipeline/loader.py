"""Iterates batches for training and evaluation: the only face of `pipeline/` that the loop sees."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from pipeline.augmix import augmix, draw_chains
from pipeline.config import PipelineConfig
from pipeline.normalise import normalise
from pipeline.order import Order, batch_positions
from pipeline.plan import Plan, TrainingPlanner, centre_crop_plan
from pipeline.stream import Stream
from shards import Store


@dataclass(frozen=True)
class TrainingBatch:
    """One rank's micro-batch of B samples.

    images: float32 (B, 3, S, S), channels last in memory, normalised, on the loader's device.
    labels: int64 (B,), on the loader's device.
    kind, severity: int32 (B,), on the CPU; clean samples have 0, 0.
    sample_id, position: int64 (B,), on the CPU; position in the training stream.
    clean_images: in paired mode the same crops uncorrupted, as `images`; else None.
    augmented: with augmix = 2 two AugMix views of the images, as `images`; else empty.
    damaged: bool (B,), on the CPU; True where a grey image stands in for a damaged record.
    """

    images: Tensor
    labels: Tensor
    kind: Tensor
    severity: Tensor
    sample_id: Tensor
    position: Tensor
    clean_images: Tensor | None
    augmented: tuple[Tensor, ...]
    damaged: Tensor

    @property
    def views(self) -> tuple[Tensor, ...]:
        """All views of the images that training sees: clean first in paired mode, AugMix's last."""
        clean = () if self.clean_images is None else (self.clean_images,)
        return (*clean, self.images, *self.augmented)


@dataclass(frozen=True)
class EvaluationBatch:
    """B centre crops: images_u8 uint8 (B, S, S, 3) on the device; labels int64 and damaged bool (B,) on the
    CPU; sample_id int64 (B,) on the CPU."""

    images_u8: Tensor
    labels: Tensor
    sample_id: Tensor
    damaged: Tensor


def _identity(store: Store) -> str:
    """Return the xxh3-64 of a store's labels and record sizes in their order, the same wherever it stands."""
    digest = xxhash.xxh3_64()
    for column in (store.label, store.length):
        digest.update(np.asarray(column, np.int64).tobytes())
    return digest.hexdigest()


def _nchw(image_BHWC: Tensor) -> Tensor:
    """View NHWC memory as an NCHW tensor in channels_last format, without a copy."""
    return image_BHWC.permute(0, 3, 1, 2)


class TrainingLoader:
    """The endless stream of training batches of one rank; stop and resume at any batch.

    Args:
        store: the training records.
        config: the run's data settings.
        seed: the run's seed.
        rank, ranks: this process's global rank and their number.
        device_id: CUDA device the graph runs on, or None for the CPU.

    Raises:
        ValueError: if the store has fewer samples than one global batch, or the global batch does not
            divide over the processes.
    """

    def __init__(
        self,
        store: Store,
        config: PipelineConfig,
        *,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
        device_id: int | None = None,
    ) -> None:
        if len(store) < config.batch_global:
            raise ValueError(
                f"{store.name} has {len(store)} samples, fewer than one global batch "
                f"({config.batch_global}); lower pipeline.batch_global or add samples"
            )
        per_rank = config.batch_per_gpu or config.batch_global // ranks
        if (config.mixup or config.cutmix) and per_rank % 2:
            raise ValueError(
                f"pipeline.mixup and cutmix mix neighbours, so every process needs an even number of images at a time; "
                f"it has {per_rank}: choose another pipeline.batch_per_gpu or batch_global"
            )
        if not per_rank or config.batch_global % (ranks * per_rank):
            raise ValueError(
                f"pipeline.batch_global ({config.batch_global}) must be a multiple of {ranks} processes x "
                f"{per_rank or 1} samples each"
            )
        self.micros = config.batch_global // (ranks * per_rank)
        self.batch_per_rank = per_rank
        self._store = store
        self._config = config
        self._rank, self._ranks = rank, ranks
        self._device = torch.device("cpu") if device_id is None else torch.device("cuda", device_id)
        self._order = Order(len(store), seed)
        self._planner = TrainingPlanner(config, seed, store.height, store.width)
        self._seed = seed
        self._data = _identity(store)
        self._origin = 0  # stream position where batch 0 of the current numbering starts
        self._handed = 0  # micro-batches handed to the caller since the origin
        self.waited_s = 0.0
        """Seconds the caller has spent waiting in `next` so far."""
        self._stream = Stream(
            store,
            config,
            self._plan_at,
            batch=per_rank,
            device_id=device_id,
            training=True,
            on_damaged=config.on_damaged,
        )

    def _plan_at(self, number: int) -> Plan:
        step, micro = divmod(number, self.micros)
        position_B = self._origin + batch_positions(
            step,
            micro,
            self._rank,
            batch=self._config.batch_global,
            ranks=self._ranks,
            micros=self.micros,
        )
        return self._planner.plan(position_B, *self._order.at(position_B))

    def __iter__(self) -> Iterator[TrainingBatch]:
        return self

    def __next__(self) -> TrainingBatch:
        began_s = time.perf_counter()
        read, outputs = self._stream.next()
        self.waited_s += time.perf_counter() - began_s
        plan = read.plan
        labels_B = torch.from_numpy(np.asarray(self._store.label[plan.sample_B], np.int64))
        self._handed = read.number + 1
        images = _nchw(outputs[0])
        augmented: tuple[Tensor, ...] = ()
        if self._config.augmix:
            images, augmented = self._augmented(outputs[0], plan)
        return TrainingBatch(
            images=images,
            labels=labels_B.to(self._device, non_blocking=True),
            kind=torch.from_numpy(plan.kind_B),
            severity=torch.from_numpy(plan.severity_B),
            sample_id=torch.from_numpy(plan.sample_B),
            position=torch.from_numpy(plan.position_B),
            clean_images=_nchw(outputs[1]) if len(outputs) > 1 else None,
            augmented=augmented,
            damaged=torch.from_numpy(read.damaged_B),
        )

    def _augmented(self, image_u8_BSSC: Tensor, plan: Plan) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the images to train on and the views beside them."""
        views = tuple(
            augmix(image_u8_BSSC, draw_chains(self._seed, plan.epoch_B, plan.sample_B, view), self._config)
            for view in range(self._config.augmix)
        )
        if len(views) == 1:
            return views[0], ()
        return normalise(image_u8_BSSC, self._config), views

    @property
    def damaged(self) -> Mapping[int, str]:
        """Damaged samples met by this rank so far: id to reason."""
        return self._stream.damage.reasons

    def state_dict(self) -> dict[str, Any]:
        """Return where the stream stands, counting batches handed to the caller, not those planned ahead.

        `position` is the first stream position of the global batch that comes next, `micro` how many of
        its accumulation parts were handed out; both are the same on every rank between global batches.
        """
        step, micro = divmod(self._handed, self.micros)
        return {
            "position": self._origin + step * self._config.batch_global,
            "micro": micro,
            "micros": self.micros,
            "samples": len(self._store),
            "data": self._data,
            "seed": self._seed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken, also with another number of ranks or another batch size.

        Raises:
            ValueError: if the state belongs to another seed or data set, or was taken inside a global
                batch that is now split differently.
        """
        for name, mine in (("samples", len(self._store)), ("seed", self._seed)):
            if state[name] != mine:
                raise ValueError(
                    f"the saved data position belongs to a stream with {name} = {state[name]}, this one has "
                    f"{mine}; resume with the same data and seed, or start a new run"
                )
        if state.get("data", self._data) != self._data:
            raise ValueError(
                f"the saved data position belongs to other data than {self._store.name}: as many samples, but labels "
                "or sizes of the records differ; resume with the same shard sets in the same order, or start a new run"
            )
        if state["micro"] and state["micros"] != self.micros:
            raise ValueError(
                f"the saved data position is inside a global batch split into {state['micros']} parts, here "
                f"it is split into {self.micros}; resume from a checkpoint taken between optimiser steps"
            )
        self._origin = int(state["position"])
        self._handed = int(state["micro"])
        self._stream.seek(self._handed)

    def seek(self, step: int) -> None:
        """Make global batch number `step` (from 0) of the whole stream the next one."""
        self._origin, self._handed = step * self._config.batch_global, 0
        self._stream.seek(0)

    def reading(self) -> str:
        """Say what is being read now, for a message about a stuck source."""
        return self._stream.reading()

    def close(self) -> None:
        """Stop all threads of the loader."""
        self._stream.close()


class EvaluationLoader:
    """Every sample of a store exactly once, over all ranks, as clean uint8 centre crops.

    Resize to `config.resize_shorter` and centre crop to `config.image_size`, with torchvision's arithmetic.
    Nothing is padded: ranks may get different numbers of batches, and the last batch may be short.

    Args:
        store: the records.
        config: the run's data settings.
        batch: samples per batch.
        rank, ranks: this process's global rank and their number.
        device_id: CUDA device the graph runs on, or None for the CPU.
        sample_id: evaluate only these samples, int64; all by default.
        on_damaged: "replace" (by grey, flagged in the batch) or "stop".
    """

    def __init__(
        self,
        store: Store,
        config: PipelineConfig,
        *,
        batch: int,
        rank: int = 0,
        ranks: int = 1,
        device_id: int | None = None,
        sample_id: np.ndarray[Any, np.dtype[np.int64]] | None = None,
        on_damaged: str = "replace",
    ) -> None:
        every = np.arange(len(store), dtype=np.int64) if sample_id is None else sample_id
        self._ids = every[rank::ranks]
        self._store = store
        self._config = config
        self._batch = batch
        self._stream = Stream(
            store,
            config,
            self._plan_at,
            batch=batch,
            device_id=device_id,
            training=False,
            on_damaged=on_damaged,
        )

    def __len__(self) -> int:
        """Number of batches of this rank."""
        return -(-len(self._ids) // self._batch)

    def _plan_at(self, number: int) -> Plan:
        # DALI asks ahead of what is taken from it; past the end it gets one sample over again.
        ids = (
            self._ids[number * self._batch : (number + 1) * self._batch]
            if number < len(self)
            else self._ids[:1]
        )
        return centre_crop_plan(
            ids,
            np.asarray(self._store.height[ids], np.int64),
            np.asarray(self._store.width[ids], np.int64),
            resize=self._config.resize_shorter,
            size=self._config.image_size,
        )

    def __iter__(self) -> Iterator[EvaluationBatch]:
        self._stream.seek(0)
        for _ in range(len(self)):
            read, (images_u8,) = self._stream.next()
            sample_B = read.plan.sample_B
            yield EvaluationBatch(
                images_u8=images_u8,
                labels=torch.from_numpy(np.asarray(self._store.label[sample_B], np.int64)),
                sample_id=torch.from_numpy(sample_B),
                damaged=torch.from_numpy(read.damaged_B),
            )

    def reading(self) -> str:
        """Say what is being read now, for a message about a stuck source."""
        return self._stream.reading()

    @property
    def damaged(self) -> Mapping[int, str]:
        """Damaged samples met by this rank so far: id to reason."""
        return self._stream.damage.reasons

    def close(self) -> None:
        """Stop all threads of the loader."""
        self._stream.close()
