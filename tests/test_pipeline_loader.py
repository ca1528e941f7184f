"""The loader: same pixels everywhere, exact resume, torchvision's evaluation, damaged records."""

from __future__ import annotations

import gc
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nvidia.dali import backend
from PIL import Image
from torchvision import transforms

import shards
from pipeline import graph
from pipeline.config import PipelineConfig
from pipeline.corruptions import corrupt, kind_id
from pipeline.loader import EvaluationLoader, TrainingBatch, TrainingLoader
from pipeline.normalise import denormalise, normalise
from pipeline.readahead import UNDECODABLE, DamagedSampleError
from shards.build import BuildOptions, build

KINDS = ("gaussian_noise", "brightness", "contrast")
N = 90


def settings(**changes: object) -> PipelineConfig:
    return PipelineConfig(
        **{"image_size": 48, "kinds": KINDS, "batch_global": 8, "read_threads": 2, **changes}  # type: ignore[arg-type]
    )


@pytest.fixture(scope="module")
def store(picture_shards: Path) -> Iterator[shards.Store]:
    opened = shards.open(picture_shards)
    yield opened
    opened.close()


def take(
    store: shards.Store, config: PipelineConfig, batches: int, *, rank: int = 0, ranks: int = 1, skip: int = 0
) -> list[TrainingBatch]:
    loader = TrainingLoader(store, config, seed=3, rank=rank, ranks=ranks)
    if skip:
        loader.load_state_dict(
            {
                "position": skip * config.batch_global,
                "micro": 0,
                "micros": loader.micros,
                "samples": N,
                "seed": 3,
            }
        )
    got = [next(loader) for _ in range(batches)]
    loader.close()
    return got


def by_position(batches: list[TrainingBatch]) -> dict[int, tuple[object, ...]]:
    out: dict[int, tuple[object, ...]] = {}
    for b in batches:
        for i, position in enumerate(b.position.tolist()):
            pixels = b.images[i].numpy().tobytes()
            out[position] = (
                int(b.sample_id[i]), int(b.labels[i]), int(b.kind[i]), int(b.severity[i]), pixels,
            )  # fmt: skip
    return out


@pytest.fixture(scope="module")
def expected(store: shards.Store) -> dict[int, tuple[object, ...]]:
    """The first two epochs and a bit, in batches of 8 on one rank: what every other way must equal."""
    return by_position(take(store, settings(), 24))


def test_batches_are_what_they_say(store: shards.Store) -> None:
    (batch,) = take(store, settings(), 1)
    assert batch.images.shape == (8, 3, 48, 48)
    assert batch.images.dtype == torch.float32
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.labels.tolist() == store.label[batch.sample_id.numpy()].tolist()
    assert not batch.damaged.any()
    assert ((batch.kind == 0) == (batch.severity == 0)).all()


@pytest.mark.parametrize("size", [1, 7, 32])
def test_pixels_do_not_depend_on_the_batch_size(
    store: shards.Store, expected: dict[int, tuple[object, ...]], size: int
) -> None:
    got = by_position(take(store, settings(batch_global=size), 96 // size))
    assert len(got) == 96 // size * size
    assert all(expected[position] == sample for position, sample in got.items())


@pytest.mark.parametrize("ranks", [2, 4])
def test_pixels_do_not_depend_on_the_number_of_ranks(
    store: shards.Store, expected: dict[int, tuple[object, ...]], ranks: int
) -> None:
    """A whole epoch and more over the ranks: every position once, with the pixels of one rank."""
    got: dict[int, tuple[object, ...]] = {}
    for rank in range(ranks):
        mine = by_position(take(store, settings(), 12, rank=rank, ranks=ranks))
        assert not got.keys() & mine.keys()
        got |= mine
    assert got == {position: expected[position] for position in range(96)}
    visits = Counter(sample[0] for position, sample in got.items() if position < N)
    assert visits == dict.fromkeys(range(N), 1)


def test_accumulation_parts_make_up_the_global_batch(
    store: shards.Store, expected: dict[int, tuple[object, ...]]
) -> None:
    batches = take(store, settings(batch_per_gpu=2), 8)
    assert [len(b.labels) for b in batches] == [2] * 8
    assert by_position(batches) == {position: expected[position] for position in range(16)}


@pytest.mark.parametrize("skip", [1, 5, 11, 20])
def test_a_restart_continues_with_the_same_pixels(
    store: shards.Store, expected: dict[int, tuple[object, ...]], skip: int
) -> None:
    got = by_position(take(store, settings(), 3, skip=skip))
    assert list(got) == list(range(8 * skip, 8 * skip + 24))
    assert all(expected[position] == sample for position, sample in got.items())


@pytest.mark.parametrize("threads", [1, 4])
def test_pixels_do_not_depend_on_threads(
    store: shards.Store, expected: dict[int, tuple[object, ...]], threads: int
) -> None:
    got = by_position(take(store, settings(threads=threads, read_threads=threads, read_ahead=2), 6))
    assert all(expected[position] == sample for position, sample in got.items())


def test_the_state_counts_what_was_handed_out(
    store: shards.Store, expected: dict[int, tuple[object, ...]]
) -> None:
    loader = TrainingLoader(store, settings(batch_per_gpu=4), seed=3)
    for _ in range(5):
        next(loader)
    state = loader.state_dict()
    assert (state["position"], state["micro"]) == (16, 1)
    after = [next(loader) for _ in range(3)]
    loader.load_state_dict(state)  # a jump back in place
    again = [next(loader) for _ in range(3)]
    loader.close()
    assert by_position(after) == by_position(again)
    assert list(by_position(again)) == list(range(20, 32))


def test_resuming_with_another_batch_size_continues_the_sequence(
    store: shards.Store, expected: dict[int, tuple[object, ...]]
) -> None:
    loader = TrainingLoader(store, settings(batch_global=10), seed=3)
    loader.load_state_dict({"position": 24, "micro": 0, "micros": 1, "samples": N, "seed": 3})
    got = by_position([next(loader), next(loader)])
    loader.close()
    assert got == {position: expected[position] for position in range(24, 44)}


def test_the_wait_for_data_is_counted(store: shards.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = TrainingLoader(store, settings(read_ahead=1), seed=3)
    fetch = store.fetch
    slow = {"s": 0.0}

    def fetch_slowly(*arguments: Any, **named: Any) -> Any:
        time.sleep(slow["s"])
        return fetch(*arguments, **named)

    monkeypatch.setattr(store, "fetch", fetch_slowly)
    next(loader)
    assert loader.waited_s > 0
    slow["s"] = 0.15
    for _ in range(4):  # the batches that were already on their way
        next(loader)
    before_s, began_s = loader.waited_s, time.perf_counter()
    for _ in range(3):
        next(loader)
    waited_s, passed_s = loader.waited_s - before_s, time.perf_counter() - began_s
    loader.close()
    assert 0.3 < waited_s <= passed_s


def test_a_foreign_state_is_refused(store: shards.Store) -> None:
    loader = TrainingLoader(store, settings(batch_per_gpu=4), seed=3)
    state = loader.state_dict()
    with pytest.raises(ValueError, match="seed = 4, this one has 3"):
        loader.load_state_dict({**state, "seed": 4})
    with pytest.raises(ValueError, match="samples = 7"):
        loader.load_state_dict({**state, "samples": 7})
    with pytest.raises(ValueError, match="inside a global batch split into 4"):
        loader.load_state_dict({**state, "micro": 1, "micros": 4})
    loader.close()


def test_too_few_samples_and_uneven_batches_are_refused(store: shards.Store) -> None:
    with pytest.raises(ValueError, match=r"has 90 samples, fewer than one global batch \(91\)"):
        TrainingLoader(store, settings(batch_global=91), seed=0)
    with pytest.raises(ValueError, match="multiple of 3 processes"):
        TrainingLoader(store, settings(batch_global=8), seed=0, ranks=3)


def test_paired_views_are_the_same_crop(store: shards.Store, expected: dict[int, tuple[object, ...]]) -> None:
    """The corrupted view is the torch operator's output on the clean view."""
    config = settings(paired=True)
    (batch,) = take(store, config, 1)
    assert batch.clean_images is not None
    clean_u8 = denormalise(batch.clean_images, config)
    loader = TrainingLoader(store, config, seed=3)
    plan = loader._plan_at(0)
    loader.close()
    keys = torch.from_numpy(plan.key_B.view(np.int64))
    want = corrupt(clean_u8, batch.kind, batch.severity, keys, flavour="bethge")
    torch.testing.assert_close(batch.images, normalise(want, config), rtol=0, atol=1e-5)
    assert not torch.equal(batch.images, batch.clean_images)


def test_the_graph_corrupts_as_the_plan_says(store: shards.Store) -> None:
    kinds = Counter(int(k) for b in take(store, settings(), 24) for k in b.kind)
    assert set(kinds) == {0, *(kind_id(kind) for kind in KINDS)}


def test_loaders_leave_no_threads_behind(store: shards.Store) -> None:
    take(store, settings(), 2)
    gc.collect()
    before = threading.active_count()
    for _ in range(5):
        take(store, settings(), 2)
    gc.collect()
    assert threading.active_count() <= before


# Evaluation


def evaluate_all(store: shards.Store, config: PipelineConfig, **how: int) -> dict[int, np.ndarray]:
    loader = EvaluationLoader(store, config, **{"batch": 8, **how})  # type: ignore[arg-type]
    got = {}
    for batch in loader:
        assert batch.labels.tolist() == store.label[batch.sample_id.numpy()].tolist()
        for i, sample in enumerate(batch.sample_id.tolist()):
            assert sample not in got
            got[sample] = batch.images_u8[i].numpy()
    loader.close()
    return got


def test_evaluation_sees_every_sample_once_on_any_number_of_ranks(store: shards.Store) -> None:
    config = settings()
    whole = evaluate_all(store, config)
    assert sorted(whole) == list(range(N))
    parts: dict[int, np.ndarray] = {}
    for rank in range(4):
        mine = evaluate_all(store, config, rank=rank, ranks=4, batch=7)
        assert not parts.keys() & mine.keys()
        parts |= mine
    assert all(np.array_equal(parts[i], whole[i]) for i in range(N))


def test_evaluation_can_be_repeated_and_restricted(store: shards.Store) -> None:
    loader = EvaluationLoader(store, settings(), batch=4, sample_id=np.array([5, 80, 7]))
    first, second = ([b.images_u8 for b in loader] for _ in range(2))
    loader.close()
    assert torch.equal(first[0], second[0])
    assert first[0].shape == (3, 48, 48, 3)


def torchvision_crop(encoded: bytes, config: PipelineConfig) -> np.ndarray:
    import io

    both = transforms.Compose(
        [transforms.Resize(config.resize_shorter), transforms.CenterCrop(config.image_size)]
    )
    return np.asarray(both(Image.open(io.BytesIO(encoded)).convert("RGB")))


def test_evaluation_equals_torchvision_on_photographs(photos_dir: Path, tmp_path: Path) -> None:
    """Mean difference at most 0.3 grey level on every one of 60 photographs, the worst named."""
    source = tmp_path / "photos"
    for path in sorted(photos_dir.glob("*/*.JPEG"))[::17][:60]:
        (source / path.parent.name).mkdir(parents=True)
        (source / path.parent.name / path.name).symlink_to(path)
    build(BuildOptions(source=source, out=tmp_path / "set", name="photos", workers=1))
    store, config = shards.open(tmp_path / "set"), settings(image_size=224)
    got = evaluate_all(store, config, batch=32)
    differences = {
        store.key(i): np.abs(
            got[i].astype(int) - torchvision_crop(bytes(store.read(i)), config).astype(int)
        ).mean()
        for i in range(len(store))
    }
    worst = max(differences, key=differences.__getitem__)
    assert differences[worst] <= 0.3, (worst, differences[worst])


# Damage


@pytest.fixture
def damaged_store(tmp_path: Path, picture_shards: Path) -> shards.Store:
    """A copy of the pictures whose records a test may overwrite in place."""
    import shutil

    shutil.copytree(picture_shards, tmp_path / "set")
    return shards.open(tmp_path / "set")


def overwrite(store: shards.Store, sample: int, data: bytes) -> None:
    """Put other bytes where a record's are; shorter data is followed by zeros."""
    path = store.path / store.location(sample).split(",")[0]
    with path.open("r+b") as file:
        file.seek(int(store.offset[sample]))
        file.write(data.ljust(int(store.length[sample]), b"\0")[: int(store.length[sample])])


def record(store: shards.Store, sample: int) -> bytes:
    return store.read(sample).tobytes()


DAMAGE = {
    "garbage": lambda data: bytes(np.random.default_rng(0).integers(0, 256, len(data), np.uint8)),
    "zeros": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "header only": lambda data: data[:200],
    "no end": lambda data: data[:-2],
    "huffman table": lambda data: data.replace(b"\xff\xc4", b"\xff\xc5", 1),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_record_is_named_counted_and_replaced(
    damaged_store: shards.Store, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    config = settings(batch_global=32, kinds=())
    clean = by_position(take(damaged_store, config, 3))
    bad = next(int(sample[0]) for position, sample in clean.items() if position == 40)  # type: ignore[call-overload]
    overwrite(damaged_store, bad, DAMAGE[damage](record(damaged_store, bad)))
    loader = TrainingLoader(damaged_store, config, seed=3)
    batches = [next(loader) for _ in range(3)]
    assert list(loader.damaged) == [bad]
    loader.close()
    assert damaged_store.location(bad) in caplog.text
    got = by_position(batches)
    for position, sample in got.items():
        assert (sample == clean[position]) == (sample[0] != bad), position
    flagged = {int(b.sample_id[i]) for b in batches for i in torch.nonzero(b.damaged).flatten()}
    assert flagged == {bad}


def test_a_damaged_record_stops_the_run_where_that_is_wanted(damaged_store: shards.Store) -> None:
    overwrite(damaged_store, 17, b"not a picture")
    loader = TrainingLoader(damaged_store, settings(batch_global=30, on_damaged="stop"), seed=3)
    with pytest.raises(DamagedSampleError, match=r"pictures-000000\.tar, sample .*on_damaged = 'replace'"):
        [next(loader) for _ in range(3)]
    loader.close()


def test_evaluation_flags_damaged_records(damaged_store: shards.Store) -> None:
    overwrite(damaged_store, 17, b"not a picture")
    loader = EvaluationLoader(damaged_store, settings(), batch=32)
    flagged = [int(b.sample_id[i]) for b in loader for i in torch.nonzero(b.damaged).flatten()]
    loader.close()
    assert flagged == [17]


def test_what_only_the_decoder_rejects_is_found_and_replaced(
    damaged_store: shards.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the structural check blind, DALI's own error must lead to the culprit and nothing else."""
    config = settings(batch_global=32, kinds=())
    clean = by_position(take(damaged_store, config, 3))
    bad = next(int(sample[0]) for position, sample in clean.items() if position == 40)  # type: ignore[call-overload]
    overwrite(damaged_store, bad, DAMAGE["truncated"](record(damaged_store, bad)))
    fetch = shards.Store.fetch
    monkeypatch.setattr(shards.Store, "fetch", lambda self, ids, check: fetch(self, ids, check=False))
    loader = TrainingLoader(damaged_store, config, seed=3)
    got = by_position([next(loader) for _ in range(3)])
    assert loader.damaged == {bad: UNDECODABLE}
    loader.close()
    assert len(got) == 96
    assert all((sample == clean[position]) == (sample[0] != bad) for position, sample in got.items())


def test_a_failing_decoder_blames_no_record(store: shards.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory, say: the error comes through, and no sound image is called damaged."""

    def out_of_memory(self: object) -> None:
        raise RuntimeError("CUDA allocation failed")

    monkeypatch.setattr("nvidia.dali.Pipeline.run", out_of_memory)
    loader = TrainingLoader(store, settings(), seed=3)
    with pytest.raises(RuntimeError, match="CUDA allocation failed"):
        next(loader)
    assert not loader.damaged
    loader.close()


def test_a_failing_disk_is_not_damage(store: shards.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch = shards.Store.fetch

    def broken(self: shards.Store, ids: np.ndarray, check: bool) -> shards.Records:
        records = fetch(self, ids, check)
        records.fault[1], records.errno[1] = 1, 5
        return records

    monkeypatch.setattr(shards.Store, "fetch", broken)
    loader = TrainingLoader(store, settings(), seed=3)
    with pytest.raises(OSError, match=r"reading pictures-.*sample .* failed: Input/output error"):
        next(loader)
    assert not loader.damaged
    loader.close()


@pytest.mark.slow
def test_three_hundred_damaged_batches_do_no_harm(damaged_store: shards.Store) -> None:
    """Bit flips, truncation, garbage, nothing, another size: no crash, every other sample unchanged."""
    config = settings(batch_global=32, kinds=(), image_size=32)
    clean = by_position(take(damaged_store, config, 2))
    originals = {sample: record(damaged_store, sample) for sample in range(N)}
    rng = np.random.default_rng(1)
    touched: set[int] = set()
    for _ in range(300):
        bad = int(rng.integers(N))
        data = bytearray(originals[bad])
        match int(rng.integers(6)):
            case 0:
                for at in rng.integers(0, len(data), rng.integers(1, 20)):
                    data[at] ^= 1 << int(rng.integers(8))
            case 1:
                for at in rng.integers(0, min(700, len(data)), rng.integers(1, 6)):  # the headers
                    data[at] ^= 1 << int(rng.integers(8))
            case 2:
                del data[int(rng.integers(len(data))) :]
            case 3:
                data[:] = bytes(rng.integers(0, 256, len(data), np.uint8))
            case 4:
                data.clear()
            case 5:
                data = bytearray(originals[int(rng.integers(N))])  # another picture, of another size
        overwrite(damaged_store, bad, bytes(data))
        got = by_position(take(damaged_store, config, 2))
        assert all(sample == clean[position] for position, sample in got.items() if sample[0] != bad)
        touched.add(bad)
        overwrite(damaged_store, bad, originals[bad])
    assert len(touched) > 50


# The GPU graph, as far as it can be checked without a GPU


@pytest.mark.parametrize("training", [True, False])
def test_the_gpu_graph_is_made_of_operators_with_a_gpu_backend(training: bool) -> None:
    config = settings(paired=training)
    unbuilt = graph.define(config, lambda: (), batch=4, device_id=None, training=training, device="gpu")
    unbuilt.serialize()  # constructs every operator's specification
    registered = {
        "gpu": set(backend.RegisteredGPUOps()),
        "mixed": set(backend.RegisteredMixedOps()),
        "cpu": set(backend.RegisteredCPUOps()),
    }
    # The only CPU operators are the external sources, which hand over what the host has.
    placed = {(op._op.schema_name, op._op._device) for op in unbuilt._ops if op._op._device != "cpu"}
    assert all(name in registered[device] for name, device in placed), placed
    on_gpu = {name for name, device in placed if device in ("gpu", "mixed")}
    wanted = {"decoders__ImageSlice", "Resize"}
    wanted |= {"Flip", "vqsa__Corrupt", "CropMirrorNormalize"} if training else {"Slice"}
    assert wanted <= on_gpu
