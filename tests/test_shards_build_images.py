"""The images a builder meets: damaged, odd, and unusual ones, each named or counted."""

from __future__ import annotations

import csv
import tarfile
import zlib
from pathlib import Path

import pytest
from building import DAMAGED, encoded, plain_files, run, write_tree
from PIL import Image

import shards


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "source", plain_files())


def test_damaged_images_are_skipped_and_listed(source: Path, tmp_path: Path) -> None:
    write_tree(source / "c1", {name: data for name, (data, _) in DAMAGED.items()})
    (source / "c1" / "link.jpg").symlink_to(tmp_path / "gone.jpg")
    report = run(source, tmp_path / "out", on_error="skip")
    assert report.counts["rejected"] == 5
    assert report.samples == len(shards.open(tmp_path / "out")) == 12
    with (tmp_path / "out" / "rejected.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    wanted = {f"c1/{name}": why for name, (_, why) in DAMAGED.items()} | {
        "c1/link.jpg": "cannot be read: No such file or directory"
    }
    assert {row["file"] for row in rows} == wanted.keys()
    assert all(wanted[row["file"]] in row["reason"] for row in rows)


def test_a_source_of_damaged_images_alone_is_refused(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "source", {"a/1.jpg": b"", "a/2.jpg": b"x"})
    with pytest.raises(ValueError, match=r"all 2 images are damaged, the first is a/1\.jpg: zero bytes"):
        run(source, tmp_path / "out", on_error="skip")


def test_a_fault_that_only_a_decoder_sees(tmp_path: Path) -> None:
    data = encoded("PNG", width=40, height=40)
    at = data.index(b"IDAT")
    length = int.from_bytes(data[at - 4 : at], "big")
    body = b"IDAT" + bytes(length)  # right checksum, no deflate stream
    data = data[:at] + body + zlib.crc32(body).to_bytes(4, "big") + data[at + 4 + length + 4 :]
    source = write_tree(tmp_path / "source", {"a/1.png": data})
    assert run(source, tmp_path / "scanned").samples == 1
    with pytest.raises(ValueError, match=r"a/1\.png: does not decode: "):
        run(source, tmp_path / "decoded", validate="decode")


def test_oddities_are_accepted_and_counted(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    source = write_tree(
        tmp_path / "source",
        {
            "a/cmyk.JPEG": encoded(mode="CMYK"),
            "a/grey.JPEG": encoded(mode="L"),
            "a/png.JPEG": encoded("PNG"),
            "a/plain.jpg": encoded(),
            "a/rotated.jpg": encoded(width=30, height=20, exif=exif),
            "a/deep.png": encoded("PNG", mode="L"),
            "a/readme.txt": b"passed over",
            "a/inner/folder.jpg": encoded(),
            "a/.DS_Store": b"hidden",
        },
    )
    report = run(source, tmp_path / "out", samples_per_shard=100)
    assert report.counts == {"cmyk": 1, "grey": 2, "misnamed": 1, "png": 2, "rejected": 0, "rotated": 1}
    assert report.ignored == 1
    store = shards.open(tmp_path / "out")
    assert store.header.counts == report.counts
    with tarfile.open(tmp_path / "out" / "set-000000.tar") as tar:
        names = [name for name in tar.getnames() if not name.endswith(".cls")]
    assert names == [
        "a_cmyk.jpg", "a_deep.png", "a_grey.jpg", "a_inner_folder.jpg",
        "a_plain.jpg", "a_png.png", "a_rotated.jpg",
    ]  # fmt: skip
    rotated = [store.key(i) for i in range(len(store))].index("a_rotated")
    assert (store.width[rotated], store.height[rotated]) == (30, 20), "as stored, before orientation"
