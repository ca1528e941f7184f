"""The images a builder meets: damaged, odd, and unusual ones, each named or counted."""

from __future__ import annotations

import csv
import io
import os
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from building import DAMAGED, contents, digests, encoded, plain_files, run, write_tree
from PIL import Image, ImageOps

import shards


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "source", plain_files())


def test_damaged_images_are_skipped_and_listed(source: Path, tmp_path: Path) -> None:
    write_tree(source / "c1", {name: data for name, (data, _) in DAMAGED.items()})
    (source / "c1" / "link.jpg").symlink_to(tmp_path / "gone.jpg")
    (source / "c1" / "unreadable.jpg").symlink_to("/proc/self/mem")  # whose first byte nobody may read
    os.mkfifo(source / "c1" / "pipe.jpg")  # reading it would wait for a writer
    report = run(source, tmp_path / "out", on_error="skip")
    assert report.counts["rejected"] == 7
    assert report.samples == len(shards.open(tmp_path / "out")) == 12
    with (tmp_path / "out" / "rejected.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    wanted = {f"c1/{name}": why for name, (_, why) in DAMAGED.items()} | {
        "c1/link.jpg": "cannot be read: No such file or directory",
        "c1/unreadable.jpg": "cannot be read: Input/output error",
        "c1/pipe.jpg": "cannot be read: not a regular file",
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


def test_damage_in_mid_stream_is_found_by_a_decode(tmp_path: Path) -> None:
    data = encoded(width=300, height=200, quality=95)
    middle = len(data) // 2
    source = write_tree(tmp_path / "source", {"a/1.jpg": data[:middle] + data[middle + 512 :]})
    assert run(source, tmp_path / "scanned").samples == 1
    with Image.open(source / "a" / "1.jpg") as picture:
        picture.load()  # Pillow says nothing
    with pytest.raises(ValueError, match=r"a/1\.jpg: does not decode: Corrupt JPEG data"):
        run(source, tmp_path / "decoded", validate="decode")
    with pytest.raises(ValueError, match=r"a/1\.jpg: does not decode: Corrupt JPEG data"):
        run(source, tmp_path / "encoded", quality=90)


def huge(width: int, height: int) -> bytes:
    out = io.BytesIO()
    Image.new("1", (width, height)).save(out, "PNG")
    return out.getvalue()


def odd_files() -> dict[str, bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = io.BytesIO()
    levels = np.linspace(0, 65535, 30 * 20).reshape(20, 30).astype(np.uint16)
    Image.fromarray(levels).save(deep, "PNG")
    return {
        "a/cmyk.JPEG": encoded(mode="CMYK"),
        "a/deep.png": deep.getvalue(),
        "a/grey.JPEG": encoded(mode="L"),
        "a/huge.png": huge(20_000, 4_500),
        "a/inner/folder.jpg": encoded(),
        "a/jpeg.png": encoded(),
        "a/plain.jpg": encoded(),
        "a/png.JPEG": encoded("PNG"),
        "a/rotated.jpg": encoded(width=30, height=20, exif=exif),
        "a/transparent.png": encoded("PNG", mode="RGBA"),
    }


KINDS = {
    "cmyk": "cmyk",
    "deep": "png deep grey",
    "grey": "grey",
    "huge": "png grey huge",
    "jpeg": "misnamed",
    "png": "png misnamed",
    "rotated": "rotated",
    "transparent": "png",
}
COUNTS = {"cmyk": 1, "deep": 1, "grey": 3, "huge": 1, "misnamed": 2, "png": 4, "rejected": 0, "rotated": 1}


def listed(out: Path) -> dict[str, tuple[str, str]]:
    with (out / "oddities.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(Path(row["file"]).stem == row["key"].removeprefix("a_") for row in rows)
    return {Path(row["file"]).stem: (row["oddities"], row["image"]) for row in rows}


def pictures(out: Path) -> dict[str, Image.Image]:
    store = shards.open(out)
    found = {}
    for i in range(len(store)):
        found[store.key(i).removeprefix("a_")] = Image.open(io.BytesIO(store.read(i).tobytes()))
        assert found[store.key(i).removeprefix("a_")].size == (store.width[i], store.height[i])
    return found


def test_oddities_are_kept_counted_and_listed(tmp_path: Path) -> None:
    files = odd_files()
    source = write_tree(
        tmp_path / "source", {**files, "a/readme.txt": b"passed over", "a/.DS_Store": b"hidden"}
    )
    report = run(source, tmp_path / "out", samples_per_shard=100)
    assert report.counts == COUNTS
    assert report.ignored == 1
    store = shards.open(tmp_path / "out")
    assert store.header.counts == report.counts
    assert listed(tmp_path / "out") == {name: (kinds, "kept") for name, kinds in KINDS.items()}
    with tarfile.open(tmp_path / "out" / "set-000000.tar") as tar:
        names = [name.removeprefix("a_") for name in tar.getnames() if not name.endswith(".cls")]
    assert names == [
        "cmyk.jpg", "deep.png", "grey.jpg", "huge.png", "inner_folder.jpg", "jpeg.jpg", "plain.jpg", "png.png",
        "rotated.jpg", "transparent.png",
    ]  # fmt: skip
    assert {data for _, data in contents(store).values()} == set(files.values())
    rotated = [store.key(i) for i in range(len(store))].index("a_rotated")
    assert (store.width[rotated], store.height[rotated]) == (30, 20), "as stored, before orientation"


def close(image: Image.Image, wanted: Image.Image, most: float) -> bool:
    """Whether two pictures differ by no more than one JPEG encoding."""
    a, b = (np.asarray(p, dtype=np.float64) for p in (image, wanted))
    return a.shape == b.shape and bool(np.abs(a - b).mean() < most)


def smooth(mode: str = "RGB", kind: str = "JPEG", width: int = 90, height: int = 60, **options: Any) -> bytes:
    ramp = np.add.outer(np.linspace(20, 120, height), np.linspace(0, 100, width))
    pixels = np.stack([ramp, ramp[::-1], ramp[:, ::-1]], axis=2).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, kind, **options)
    return out.getvalue()


def test_cmyk_and_png_are_converted_where_asked_and_for_beton(tmp_path: Path) -> None:
    files = odd_files()
    del files["a/huge.png"]
    files |= {"a/cmyk.JPEG": smooth("CMYK", quality=95), "a/png.JPEG": smooth(kind="PNG")}
    files["a/transparent.png"] = smooth("RGBA", "PNG")
    source = write_tree(tmp_path / "source", files)
    run(source, tmp_path / "tar", samples_per_shard=100, convert="oddities")
    run(source, tmp_path / "beton", samples_per_shard=None, target="beton")
    converted = {"cmyk", "deep", "png", "transparent"}
    for out in (tmp_path / "tar", tmp_path / "beton"):
        store = shards.open(out)
        assert store.header.counts["encoded"] == 4
        assert store.header.options["convert"] == "oddities"
        assert {n for n, (_, done) in listed(out).items() if done == "encoded"} == converted
        found = pictures(out)
        assert {p.format for p in found.values()} == {"JPEG"}
        assert {n: p.mode for n, p in found.items() if n in converted} == {
            "cmyk": "RGB", "deep": "L", "png": "RGB", "transparent": "RGB"
        }  # fmt: skip
        for name, path in (
            ("cmyk", "a/cmyk.JPEG"),
            ("png", "a/png.JPEG"),
            ("transparent", "a/transparent.png"),
        ):
            assert close(found[name], Image.open(io.BytesIO(files[path])).convert("RGB"), 1.5)
        deep = np.asarray(Image.open(io.BytesIO(files["a/deep.png"])), dtype=np.float64) / 256
        assert close(found["deep"], Image.fromarray(deep), 1.0)
        kept = {data for _, data in contents(store).values()} & set(files.values())
        assert kept == {
            files[f"a/{name}"]
            for name in ("grey.JPEG", "inner/folder.jpg", "jpeg.png", "plain.jpg", "rotated.jpg")
        }
    (source / "a" / "cmyk.JPEG").unlink()
    with pytest.raises(
        ValueError,
        match=r"a/deep\.png: a PNG, and a \.beton holds grey and RGB JPEGs only; build with --convert",
    ):
        run(source, tmp_path / "kept", samples_per_shard=None, target="beton", convert="none")


def test_the_shorter_side_is_reduced_and_smaller_images_keep_their_bytes(tmp_path: Path) -> None:
    files = {
        "a/wide.jpg": smooth(width=900, height=301, quality=95),
        "a/tall.png": smooth(kind="PNG", width=100, height=333),
        "a/small.jpg": smooth(width=500, height=64),
        "a/exact.jpg": smooth(width=64, height=70),
    }
    source = write_tree(tmp_path / "source", files)
    run(source, tmp_path / "out", shorter_side=64)
    found = pictures(tmp_path / "out")
    # torchvision's Resize cuts the longer side to whole pixels: 900 * 64 / 301 = 191.4, 333 * 64 / 100 = 213.1.
    assert {n: p.size for n, p in found.items()} == {
        "wide": (191, 64), "tall": (64, 213), "small": (500, 64), "exact": (64, 70)
    }  # fmt: skip
    stored = {k.removeprefix("a_"): data for k, (_, data) in contents(shards.open(tmp_path / "out")).items()}
    assert (stored["small"], stored["exact"]) == (files["a/small.jpg"], files["a/exact.jpg"])
    for name, path in (("wide", "a/wide.jpg"), ("tall", "a/tall.png")):
        whole = Image.open(io.BytesIO(files[path]))
        assert close(found[name], whole.resize(found[name].size, Image.Resampling.BICUBIC), 1.5)
    assert shards.open(tmp_path / "out").header.counts["encoded"] == 2
    small = run(source, tmp_path / "tiny", shorter_side=1)  # 900 x 301 gives 2 x 1
    assert small.samples == 4


def test_a_quality_encodes_every_image(tmp_path: Path) -> None:
    source = write_tree(
        tmp_path / "source", {"a/1.jpg": smooth(quality=98), "a/2.jpg": smooth("L", quality=98)}
    )
    run(source, tmp_path / "low", quality=30)
    run(source, tmp_path / "high", quality=95)
    low, high = (shards.open(tmp_path / name) for name in ("low", "high"))
    assert low.header.counts["encoded"] == 2
    assert (low.length < high.length).all()
    assert [p.mode for p in pictures(tmp_path / "low").values()] == ["RGB", "L"]
    for data in (low.read(0).tobytes(), high.read(1).tobytes()):
        assert close(Image.open(io.BytesIO(data)).convert("RGB"), Image.open(io.BytesIO(smooth())), 60)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_where_asked(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = smooth(quality=97, exif=exif)
    source = write_tree(tmp_path / "source", {"a/1.jpg": data})
    wanted = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    report = run(source, tmp_path / "turned", apply_exif=True)
    found = pictures(tmp_path / "turned")["1"]
    assert close(found, wanted, 1.5)
    assert found.getexif().get(0x0112, 1) == 1
    assert report.counts.get("encoded", 0) == report.counts.get("rotated", 0) == (orientation != 1)
    # Encoded for another reason, an image still says how it is to be turned.
    run(source, tmp_path / "encoded", quality=95)
    again = pictures(tmp_path / "encoded")["1"]
    assert again.size == (90, 60)
    assert close(ImageOps.exif_transpose(again), wanted, 1.5)


def test_conversions_give_the_same_bytes_with_any_workers_and_are_part_of_the_build(tmp_path: Path) -> None:
    source = write_tree(
        tmp_path / "source", {f"{k % 2}{n}": d for k, (n, d) in enumerate(plain_files().items())}
    )
    how = {"shorter_side": 12, "quality": 80, "apply_exif": True}
    run(source, tmp_path / "one", **how)
    run(source, tmp_path / "four", workers=4, **how)
    assert digests(tmp_path / "one") == digests(tmp_path / "four")
    options = shards.open(tmp_path / "one").header.options
    assert {name: options[name] for name in (*how, "convert")} == {**how, "convert": "none"}
    assert not run(source, tmp_path / "one", **how).built
    with pytest.raises(ValueError, match="another build: quality is 80, wanted 81"):
        run(source, tmp_path / "one", **{**how, "quality": 81})


def test_an_image_too_large_to_decode_is_named(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "source", {"a/1.png": huge(20_000, 9_000), "a/2.jpg": encoded()})
    assert run(source, tmp_path / "kept").counts["huge"] == 1
    with pytest.raises(
        ValueError, match=r"a/1\.png: 20000 x 9000 pixels, more than the 178956970 that are decoded"
    ):
        run(source, tmp_path / "decoded", validate="decode")
    assert run(source, tmp_path / "small", shorter_side=10, on_error="skip").counts["rejected"] == 1


def test_a_beton_refuses_cmyk_where_nothing_is_converted(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "source", {"a/1.jpg": encoded(mode="CMYK"), "a/2.jpg": encoded(mode="L")})
    beton = {"samples_per_shard": None, "target": "beton", "convert": "none"}
    with pytest.raises(
        ValueError, match=r"a/1\.jpg: a CMYK JPEG, and a \.beton holds grey and RGB JPEGs only"
    ):
        run(source, tmp_path / "out", **beton)
    assert run(source, tmp_path / "left_out", on_error="skip", **beton).counts["rejected"] == 1
    assert [p.mode for p in pictures(tmp_path / "left_out").values()] == ["L"]


def test_an_image_larger_than_a_page_is_a_damaged_one_to_a_beton(tmp_path: Path) -> None:
    large = encoded() + bytes(8 << 20)  # bytes after the end marker are tolerated
    source = write_tree(tmp_path / "source", {"a/1.jpg": encoded(), "a/2.jpg": large})
    message = rf"a/2\.jpg: {len(large)} bytes, and a page of a \.beton holds 8388608; make the image smaller"
    with pytest.raises(ValueError, match=rf"{message}.*--on-error skip"):
        run(source, tmp_path / "out", samples_per_shard=None, target="beton")
    report = run(source, tmp_path / "out", samples_per_shard=None, target="beton", on_error="skip")
    assert (report.samples, report.counts["rejected"]) == (1, 1)
    assert run(source, tmp_path / "tar").samples == 2


def test_an_image_too_wide_for_a_jpeg_is_named(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "source", {"a/1.png": huge(70_000, 100), "a/2.jpg": encoded()})
    message = (
        r"a/1\.png: 70000 x 100 pixels, and a JPEG is written with at most 65500 a side; make it smaller"
    )
    with pytest.raises(ValueError, match=message):
        run(source, tmp_path / "out", convert="oddities")
    assert run(source, tmp_path / "out", convert="oddities", on_error="skip").counts["rejected"] == 1
    assert run(source, tmp_path / "small", convert="oddities", shorter_side=50).samples == 2


def test_a_conversion_that_fails_names_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object, **__: object) -> None:
        raise OSError("no memory for it")

    source = write_tree(tmp_path / "source", {"a/1.png": encoded("PNG")})
    monkeypatch.setattr(Image.Image, "save", refuses)
    with pytest.raises(ValueError, match=r"a/1\.png: cannot be made a JPEG: no memory for it"):
        run(source, tmp_path / "out", convert="oddities")
