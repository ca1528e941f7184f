"""Verification of .beton sets and of shards that others made: each fault with file, sample and remedy."""

from __future__ import annotations

import io
import os
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

import shards
from shards.beton import read_beton
from shards.build import BuildOptions, build
from shards.summary import summary
from shards.verify import verify

FILE = "set.beton"
TABLES = 24 + 2 * 1041


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for label in range(2):
        (root / f"c{label}").mkdir()
        for i in range(4):
            pixels = rng.integers(0, 256, (30 + i, 40, 3), dtype=np.uint8)
            # Bytes after the end marker: three such images to a page.
            out = io.BytesIO()
            Image.fromarray(pixels).save(out, "JPEG")
            (root / f"c{label}" / f"{i}.jpg").write_bytes(out.getvalue() + bytes(2_500_000))
    return root


@pytest.fixture
def folder(images: Path, tmp_path: Path) -> Path:
    build(BuildOptions(images, tmp_path / "set", "set", target="beton", workers=1), progress=False)
    return tmp_path / "set"


def poke(folder: Path, at: int, form: str, *values: int) -> None:
    with (folder / FILE).open("r+b") as file:
        file.seek(at)
        file.write(struct.pack(form, *values))


def alloc_of(folder: Path) -> int:
    return read_beton(folder / FILE).alloc_ptr


def flip_payload(folder: Path) -> None:
    poke(folder, int(shards.open(folder).offset[5]) + 700, "<B", 0x55)


def head_gone(folder: Path) -> None:
    poke(folder, int(shards.open(folder).offset[5]), "<Q", 0)


def other_label(folder: Path) -> None:
    poke(folder, TABLES + 24 * 5 + 16, "<q", 0)


def other_width(folder: Path) -> None:
    poke(folder, TABLES + 24 * 5 + 1, "<H", 41)


def between(folder: Path) -> None:
    poke(folder, int(shards.open(folder).offset[3]) - 1, "<B", 1)


def after_the_tables(folder: Path) -> None:
    poke(folder, TABLES + 24 * 8 + 9, "<B", 1)


def field_name(folder: Path) -> None:
    poke(folder, 25, "<B", ord("I"))


def cut_off(folder: Path) -> None:
    os.truncate(folder / FILE, int(shards.open(folder).offset[6]) + 10)


def row_lost(folder: Path) -> None:
    os.truncate(folder / FILE, (folder / FILE).stat().st_size - 24)


def unfinished(folder: Path) -> None:
    poke(folder, 16, "<Q", 0)


def version(folder: Path) -> None:
    poke(folder, 0, "<H", 1)


def missing(folder: Path) -> None:
    (folder / FILE).unlink()


def stray(folder: Path) -> None:
    (folder / "set-000007.beton").touch()


WHOLE = "copy the file again from where it is whole, or build the set again"
DAMAGES: list[tuple[Callable[[Path], None], list[tuple[str | None, str, str]]]] = [
    (flip_payload, [("c1_1", "checksum differs from the manifest's", WHOLE)]),
    (head_gone, [("c1_1", "checksum differs from the manifest's", WHOLE)]),
    (other_label, [("c1_1", "its label is 0 in the .beton, 1 in the manifest", "not of one build")]),
    (other_width, [("c1_1", "its width is 41 in the .beton, 40 in the manifest", "not of one build")]),
    (between, [(None, "bytes between its records", WHOLE)]),
    (after_the_tables, [(None, "bytes between its records", WHOLE)]),
    (field_name, [(None, "the checksum of its tables differs", WHOLE)]),
    (
        cut_off,
        [
            (None, "bytes, the manifest says", WHOLE),
            (None, "cut off", WHOLE),
            ("c1_2", "cut off: the file ends before the image does", WHOLE),
            ("c1_3", "cut off", WHOLE),
        ],
    ),
    (
        row_lost,
        [(None, "bytes, the manifest says", WHOLE), (None, "lists 7 records, the header 8 samples", WHOLE)],
    ),
    (unfinished, [(None, "unfinished: its writer stopped", WHOLE)]),
    (version, [(None, ".beton version 1, this vqsa reads version 2", WHOLE)]),
    (missing, [(None, "shard file missing", WHOLE)]),
]


@pytest.mark.parametrize(("decode", "workers"), [(False, 1), (True, 3)])
def test_a_sound_beton_has_no_faults(folder: Path, decode: bool, workers: int) -> None:
    for path in (folder, folder / FILE):
        found = verify(path, decode=decode, workers=workers)
        assert (found.shards, found.samples, found.faults) == (1, 8, [])


@pytest.mark.parametrize(("damage", "wanted"), DAMAGES, ids=lambda x: getattr(x, "__name__", ""))
def test_damage_is_named(
    folder: Path, damage: Callable[[Path], None], wanted: list[tuple[str | None, str, str]]
) -> None:
    damage(folder)
    faults = verify(folder, workers=2).faults
    assert len(faults) == len(wanted), faults
    for fault, (sample, problem, remedy) in zip(faults, wanted, strict=True):
        assert (fault.file, fault.sample) == (FILE, sample)
        assert problem in fault.problem
        assert remedy in fault.remedy


def test_a_stray_file_is_named(folder: Path) -> None:
    stray(folder)
    (fault,) = verify(folder).faults
    assert (fault.file, fault.remedy) == ("set-000007.beton", "remove it")


def test_several_betons_can_be_written_again(images: Path, tmp_path: Path) -> None:
    options = BuildOptions(images, tmp_path / "set", "set", target="beton", samples_per_shard=3, workers=1)
    build(options, progress=False)
    assert not verify(tmp_path / "set").faults
    poke_at = tmp_path / "set" / "set-000001.beton"
    whole = poke_at.read_bytes()
    poke_at.write_bytes(whole[: len(whole) // 2])
    faults = verify(tmp_path / "set").faults
    assert {f.file for f in faults} == {"set-000001.beton"}
    assert all("--only 1" in f.remedy for f in faults)


def test_a_record_that_crosses_a_page_is_named(folder: Path) -> None:
    # The same file said to have smaller pages: records of 2.5 MB then cross them.
    poke(folder, 4, "<I", 1 << 21)
    problems = [f.problem for f in verify(folder).faults]
    assert any("crosses a page of 2097152 bytes, where ffcv misreads it" in p for p in problems)


def test_inspect_describes_a_beton(folder: Path) -> None:
    text = summary(shards.open(folder))
    assert text.startswith("set: 8 samples, 2 classes, 1 shards (ffcv)")


def write_tar(path: Path, images: Path) -> None:
    with webdataset.TarWriter(str(path), mtime=0) as writer:
        for i, image in enumerate(sorted(images.glob("*/*.jpg"))):
            writer.write({"__key__": f"s{i}", "jpg": image.read_bytes()[:4000], "cls": i % 2})


def test_shards_of_others_are_compared_with_their_index(images: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.tar"
    write_tar(path, images)
    store = shards.open(path)
    assert verify(path, decode=True).faults == []
    offset = int(store.offset[3])
    good = path.read_bytes()

    path.write_bytes(good[: offset + 700] + b"\x55\xaa" + good[offset + 702 :])
    (fault,) = verify(path).faults
    assert str(fault).startswith(
        "other.tar, sample s3: the image's checksum differs from the index's; copy it"
    )
    label = offset - 1024
    with tarfile.open(path) as tar:
        label = tar.getmember("s3.cls").offset_data
    path.write_bytes(good[:label] + b"0" + good[label + 1 :])
    (fault,) = verify(path).faults
    assert (fault.sample, fault.problem) == ("s3", "its label is 0 in the tar, 1 in the index")
    path.write_bytes(good[: offset - 100])
    (fault,) = verify(path).faults
    assert fault.sample is None
    assert "cut off" in fault.problem
    path.write_bytes(good[: label - 512] + b"x" * 512 + good[label:])
    (fault,) = verify(path).faults
    assert "is damaged or none (its checksum differs)" in fault.problem
    path.write_bytes(good[:100] + b"0000640" + good[107:])
    assert len(verify(path).faults) == 1, "only the header's mode differs, and its checksum"
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"other\.tar"):
        verify(path)


def test_a_foreign_beton_is_compared_with_its_index(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "theirs.beton"
    (folder / FILE).rename(path)
    store = shards.open(path)
    assert verify(path, decode=True).faults == []
    with path.open("r+b") as file:
        file.seek(int(store.offset[2]) + 700)
        file.write(b"\x55\xaa")
    (fault,) = verify(path).faults
    assert (fault.file, fault.sample) == ("theirs.beton", "00000002")
