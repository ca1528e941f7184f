"""Several shard sets under one numbering."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import write_pictures

import shards
from pipeline.config import PipelineConfig
from pipeline.joined import join
from pipeline.loader import TrainingLoader
from shards.build import BuildOptions, build


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other")
    write_pictures(folder / "source", 12, seed=9)
    build(BuildOptions(source=folder / "source", out=folder / "set", name="other", workers=1))
    return folder / "set"


def test_samples_are_those_of_the_sets_in_order(picture_shards: Path, other: Path) -> None:
    first, second = shards.open(picture_shards), shards.open(other)
    both = join([first, second])
    assert len(both) == 102
    assert both.name == "pictures + other"
    assert np.array_equal(both.label, np.concatenate([first.label, second.label]))
    ids = np.array([101, 3, 90, 89, 3])
    records = both.fetch(ids)
    expected = [second.read(11), first.read(3), second.read(0), first.read(89), first.read(3)]
    assert all(np.array_equal(a, b) for a, b in zip(records.data, expected, strict=True))
    assert not records.fault.any()
    assert both.location(90) == f"other: {second.location(0)}"
    assert both.location(89) == f"pictures: {first.location(89)}"
    assert join([first]) is first


def test_an_epoch_has_every_sample_of_all_sets_once(picture_shards: Path, other: Path) -> None:
    both = join([shards.open(picture_shards), shards.open(other)])
    config = PipelineConfig(image_size=32, batch_global=34, kinds=(), threads=1, constants="imagenet")
    loader = TrainingLoader(both, config, seed=0)
    seen = [i for _ in range(3) for i in next(loader).sample_id.tolist()]
    loader.close()
    assert sorted(seen) == list(range(102))


def test_a_position_belongs_to_its_sets_in_their_order(picture_shards: Path, other: Path) -> None:
    first, second = shards.open(picture_shards), shards.open(other)
    config = PipelineConfig(image_size=32, batch_global=34, kinds=(), threads=1, constants="imagenet")
    saved = TrainingLoader(join([first, second]), config, seed=0).state_dict()
    TrainingLoader(join([shards.open(picture_shards), second]), config, seed=0).load_state_dict(saved)
    with pytest.raises(
        ValueError, match=r"other data than other \+ pictures: as many samples, but labels or sizes"
    ):
        TrainingLoader(join([second, first]), config, seed=0).load_state_dict(saved)


def test_other_classes_are_refused(picture_shards: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path / "source", 8, classes=2)
    build(BuildOptions(source=tmp_path / "source", out=tmp_path / "set", name="two", workers=1))
    with pytest.raises(ValueError, match=r"two \(.*\) has other classes than pictures"):
        join([shards.open(picture_shards), shards.open(tmp_path / "set")])
