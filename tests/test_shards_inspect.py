"""What the inspection shows of a set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import shards
from shards.build import BuildOptions, build
from shards.contact_sheet import contact_sheet
from shards.manifest import describe_table, encode_table, join_tables, read_header, write_manifest
from shards.summary import histogram, summary

ROOT = Path(__file__).resolve().parent.parent
COLOURS = [(200, 20, 20), (20, 200, 20), (20, 20, 200)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """6, 3 and 1 plain-coloured JPEGs in classes `red`, `grün` and `中`; sides 40 x 60 px."""
    for name, colour, count in zip(("red", "grün", "中"), COLOURS, (6, 3, 1), strict=True):
        for i in range(count):
            path = tmp_path / "source" / name / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (60, 40), colour).save(path)
    options = BuildOptions(tmp_path / "source", tmp_path / "set", "set", samples_per_shard=4, workers=1)
    build(options, progress=False)
    return tmp_path / "set"


def test_summary(folder: Path) -> None:
    lines = summary(shards.open(folder)).split("\n")
    assert lines[0] == "set: 10 samples, 3 classes, 3 shards (webdataset)"
    assert "samples_per_shard=4" in lines[2]
    assert "samples per class: 1 to 6, median 3, 0 without any" in lines
    assert [" ".join(line.split()[:2]) for line in lines[4:7]] == ["red 6", "grün 3", "中 1"]
    assert [line.count("█") for line in lines[4:7]] == [40, 20, 7]
    assert lines[8].split()[:5] == ["40", "to", "40", "px", "10"]


def test_many_classes_show_both_ends(folder: Path) -> None:
    lines = summary(shards.open(folder), classes=1).split("\n")
    assert [line.split()[0] for line in lines[4:7]] == ["red", "…", "中"]
    assert lines[5] == "  … 1 more"


def test_names_cannot_steer_the_terminal(folder: Path) -> None:
    store = shards.open(folder)
    store.classes[0] = "\x1b[2J" + "x" * 100
    text = summary(store)
    assert "\x1b" not in text
    assert "?[2Jxxx" in text
    assert max(len(line) for line in text.split("\n")) < 130


@pytest.mark.parametrize(
    "values", [[7], [0], [0, 5, 5], [1, 1, 2], [3, 500, 90_000, 90_000], list(range(1, 200))]
)
def test_a_histogram_counts_every_value_once(values: list[int]) -> None:
    lines = histogram(np.array(values), "B")
    bins = [(int(w[0]), int(w[2]), int(w[4])) for w in (line.split() for line in lines)]
    assert bins[0][0] == min(values)
    assert bins[-1][1] == max(values)
    for low, high, count in bins:
        assert count == sum(low <= v <= high for v in values)
    assert sum(count for _, _, count in bins) == len(values)


def test_contact_sheet(folder: Path) -> None:
    sheet, faults = contact_sheet(shards.open(folder), 60, side=48)
    assert faults == []
    assert sheet.size == (10 * 48, 48 + 14)
    store = shards.open(folder)
    for place in range(10):
        pixel = np.array(sheet.getpixel((place * 48 + 24, 24)), dtype=int)
        colour = {"red": COLOURS[0], "grün": COLOURS[1], "中": COLOURS[2]}[store.classes[store.label[place]]]
        assert np.abs(pixel - colour).max() < 5
    few, _ = contact_sheet(store, 3, side=48)
    assert few.size == (3 * 48, 48 + 14)


def test_a_damaged_picture_is_named_and_red(folder: Path) -> None:
    store = shards.open(folder)
    with (folder / "set-000000.tar").open("r+b") as file:
        file.seek(int(store.offset[1]))
        file.write(b"nothing")
    sheet, faults = contact_sheet(store, 10, side=48)
    assert len(faults) == 1
    assert store.location(1) in faults[0]
    assert sheet.getpixel((48 + 24, 24)) == (160, 0, 0)


def test_a_set_without_samples(folder: Path) -> None:
    header = read_header(folder).model_copy(update={"samples": 0, "shards": [], "classes": []})
    encoded = encode_table(join_tables([]))
    write_manifest(folder, header.model_copy(update={"table": describe_table(encoded)}), encoded)
    store = shards.open(folder)
    assert summary(store).startswith("set: 0 samples, 0 classes, 0 shards")
    with pytest.raises(ValueError, match="without samples has no contact sheet"):
        contact_sheet(store, 5)


def test_the_command_line(folder: Path, tmp_path: Path) -> None:
    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "tools" / "inspect_shards.py"), *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

    done = call(str(folder), "--sheet", str(tmp_path / "sheet.png"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("set: 10 samples")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.format == "PNG"
    done = call(str(tmp_path / "nowhere"))
    assert done.returncode == 1
    assert "no such folder" in done.stderr
