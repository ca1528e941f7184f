"""fn.vqsa.records: a store's encoded images in a DALI graph, by address."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shards
from pipeline.corruptions import dali_operator
from pipeline.joined import JoinedStore

dali = pytest.importorskip("nvidia.dali")


def run(source: Callable[[], Any], kind: Any, ndim: int) -> Any:
    dali_operator.load()
    pipe = dali.Pipeline(batch_size=64, num_threads=2, device_id=None)
    with pipe:
        span = dali.fn.external_source(source=source, batch=True, no_copy=True, dtype=kind, ndim=ndim)
        pipe.set_outputs(dali.fn.vqsa.records(span))
    pipe.build()
    return pipe.run()[0]


def bytes_of(span: np.ndarray) -> list[bytes]:
    out = run(lambda: span, dali.types.INT64, 1)
    return [np.asarray(out[i]).tobytes() for i in range(len(out))]


@pytest.mark.parametrize("copy", [False, True])
def test_the_graph_sees_the_bytes_of_the_store(picture_shards: Path, copy: bool) -> None:
    with shards.open(picture_shards) as store:
        ids = np.random.default_rng(0).integers(0, len(store), 20)
        wanted = [store.read(int(i)).tobytes() for i in ids]
        span = store.fetch(ids, copy=copy).span
    del store
    gc.collect()
    np.full(10_000_000, 7, np.uint8)  # takes the place of memory that was let go
    assert bytes_of(span) == wanted


def test_joined_stores_and_replaced_records(picture_shards: Path) -> None:
    store = JoinedStore([shards.open(picture_shards), shards.open(picture_shards)])
    half = len(store) // 2
    records = store.fetch([half + 2, 0, half]).replaced({1: np.frombuffer(b"other", np.uint8)})
    gc.collect()
    first = shards.open(picture_shards)
    assert bytes_of(records.span) == [first.read(2).tobytes(), b"other", first.read(0).tobytes()]


@pytest.mark.parametrize(
    ("fed", "kind", "ndim", "message"),
    [
        (np.ones((3, 2), np.int32), "INT32", 1, "needs INT64"),
        (np.ones((3, 3), np.int64), "INT64", 1, "two numbers per sample"),
        (np.ones(3, np.int64), "INT64", 0, "two numbers per sample"),
        (np.array([[0, 5]]), "INT64", 1, "sample 0 of the batch has 5 bytes at 0"),
        (np.array([[64, -1]]), "INT64", 1, "sample 0 of the batch has -1 bytes at 64"),
    ],
)
def test_what_are_no_addresses_is_refused(fed: np.ndarray, kind: str, ndim: int, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        run(lambda: fed, getattr(dali.types, kind), ndim)
