"""The structural scan: agrees with PIL on sound images, names damage, never reads out of bounds."""

from __future__ import annotations

import io
import random
import shutil
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import shards
from shards import FAULTS, scan

CSRC = Path(shards.__file__).parent / "csrc"


def picture(mode: str = "RGB", width: int = 57, height: int = 41) -> Image.Image:
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height))
    return smooth.convert(mode)


def encode(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


SOUND = {
    "baseline": encode(picture()),
    "quality 100, no subsampling": encode(picture(), quality=100, subsampling=0),
    "4:2:2": encode(picture(), subsampling=1),
    "progressive": encode(picture(), progressive=True),
    "progressive grey": encode(picture("L"), progressive=True),
    "grey": encode(picture("L")),
    "CMYK": encode(picture("CMYK")),
    "restart markers": encode(picture(), restart_marker_rows=1),
    "optimised tables": encode(picture(), optimize=True),
    "rotated": encode(picture(), exif=orientation(6)),
    "comment with end markers": encode(picture(), comment=b"\xff\xd9" * 40),
    "one pixel": encode(picture(width=1, height=1)),
    "PNG": encode(picture(), "PNG"),
    "PNG palette": encode(picture("P"), "PNG"),
    "PNG grey": encode(picture("L"), "PNG"),
    "PNG grey with alpha": encode(picture("LA"), "PNG"),
    "PNG RGBA": encode(picture("RGBA"), "PNG"),
    "PNG 16 bit": encode(Image.fromarray(np.full((9, 5), 40000, np.uint16)), "PNG"),
    "PNG bilevel": encode(picture("1"), "PNG"),
    "PNG rotated": encode(picture(), "PNG", exif=orientation(3)),
}
JPEG, PNG = SOUND["baseline"], SOUND["PNG"]


def words(data: bytes) -> str:
    return scan(data).words


@pytest.mark.parametrize("name", SOUND)
def test_sound_images_agree_with_pil(name: str) -> None:
    data = SOUND[name]
    found = scan(data)
    with Image.open(io.BytesIO(data)) as image:
        assert (found.fault, found.words) == (0, "sound")
        assert (found.width, found.height) == image.size
        assert found.format == image.format.lower()
        assert found.components == (3 if image.mode == "P" else len(image.getbands()))
        assert found.orientation == image.getexif().get(0x0112, 1)


def test_all_photographs_agree_with_pil(photos_dir: Path) -> None:
    photos = sorted(photos_dir.glob("*/*.JPEG"))
    assert len(photos) == 1000
    for path in photos:
        data = path.read_bytes()
        found = scan(data)
        with Image.open(io.BytesIO(data)) as image:
            wanted = (0, "jpeg", image.width, image.height, len(image.getbands()))
            assert (found.fault, found.format, found.width, found.height, found.components) == wanted, path
            # One photograph carries orientation 0, which is none of the eight.
            assert found.orientation == (image.getexif().get(0x0112, 1) or 1), path


def test_bytes_after_the_end_marker_are_tolerated() -> None:
    assert words(JPEG + b"\0" * 100) == "sound"
    assert words(PNG + b"tail") == "sound"


def test_expected_size_is_compared() -> None:
    assert scan(JPEG, 57, 41).fault == 0
    assert "differ from the manifest" in scan(JPEG, 57, 42).words
    assert "differ from the manifest" in scan(PNG, 58, 41).words


def patched(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def segment(marker: int, occurrence: int = 0, data: bytes = JPEG) -> int:
    """Where a segment's marker is in a JPEG."""
    at, seen = 2, 0
    while True:
        if data[at + 1] == marker:
            if seen == occurrence:
                return at
            seen += 1
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")


SOF, DHT, DQT, SOS = (segment(m) for m in (0xC0, 0xC4, 0xDB, 0xDA))
DAMAGED = {
    "empty": (b"", "zero bytes"),
    "text": (b"<html>not found</html>", "neither JPEG nor PNG"),
    "GIF": (b"GIF89a" + b"\0" * 50, "neither JPEG nor PNG"),
    "half": (JPEG[: len(JPEG) // 2], "truncated"),
    "no end marker": (JPEG[:-2], "truncated"),
    "cut in a header segment": (JPEG[: DQT + 30], "past the end"),
    "start marker alone": (JPEG[:3], "truncated"),
    "segment too long": (patched(JPEG, DQT + 2, b"\xff\xff"), "past the end"),
    "segment length 1": (patched(JPEG, DQT + 2, b"\0\1"), "impossible length"),
    "segment one byte short": (patched(JPEG, DQT + 2, b"\0\x42"), "quantisation table"),
    "garbage for a marker": (patched(JPEG, DQT, b"\0"), "no JPEG marker"),
    "reserved marker": (patched(JPEG, DQT + 1, b"\x42"), "marker that may not stand"),
    "12 bit": (patched(JPEG, SOF + 4, b"\x0c"), "unsupported JPEG"),
    "arithmetic": (patched(JPEG, SOF + 1, b"\xc9"), "unsupported JPEG"),
    "height 0": (patched(JPEG, SOF + 5, b"\0\0"), "width or height"),
    "width 0": (patched(JPEG, SOF + 7, b"\0\0"), "width or height"),
    "width 65535": (patched(JPEG, SOF + 7, b"\xff\xff"), "width or height"),
    "height in the thousands": (patched(JPEG, SOF + 5, b"\xea\x60"), "fewer image data"),
    "2 components": (patched(JPEG, SOF + 9, b"\2"), "frame header"),
    "same component twice": (patched(JPEG, SOF + 13, b"\1"), "frame header"),
    "sampling 0": (patched(JPEG, SOF + 11, b"\0"), "sampling"),
    "sampling 5": (patched(JPEG, SOF + 11, b"\x52"), "sampling"),
    "sampling 3 over 2": (patched(JPEG, SOF + 14, b"\x31"), "sampling"),
    "quant table 4": (patched(JPEG, SOF + 12, b"\4"), "frame header"),
    "quant table not there": (patched(JPEG, SOF + 12, b"\3"), "not defined"),
    "quant table of no precision": (patched(JPEG, DQT + 4, b"\x20"), "quantisation table"),
    "huffman class 2": (patched(JPEG, DHT + 4, b"\x20"), "Huffman table"),
    "huffman codes over-subscribed": (patched(JPEG, DHT + 5, b"\3"), "Huffman table"),
    "huffman counts beyond 256": (patched(JPEG, DHT + 16, b"\xff\xff\xff"), "Huffman table"),
    "huffman DC symbol 16": (patched(JPEG, DHT + 4 + 17, b"\x10"), "Huffman table"),
    "scan of an unknown component": (patched(JPEG, SOS + 5, b"\x63"), "scan header"),
    "scan of one component twice": (patched(JPEG, SOS + 7, JPEG[SOS + 5 : SOS + 6]), "scan header"),
    "scan table not there": (patched(JPEG, SOS + 6, b"\x22"), "not defined"),
    "scan of no component": (patched(JPEG, SOS + 4, b"\0"), "scan header"),
    "frame missing": (JPEG[:SOF] + JPEG[SOF + 19 :], "marker that may not stand"),
    "two frames": (JPEG[:SOF] + JPEG[SOF : SOF + 19] + JPEG[SOF:], "marker that may not stand"),
    "no scan": (JPEG[:SOS] + b"\xff\xd9", "without image data"),
    "data cut, end marker put back": (JPEG[: SOS + 16] + b"\xff\xd9", "fewer image data"),
    "PNG half": (PNG[: len(PNG) // 2], "past the end"),
    "PNG without its end": (PNG[:-12], "truncated"),
    "PNG flipped bit": (patched(PNG, 60, bytes([PNG[60] ^ 1])), "checksum"),
    "PNG signature alone": (PNG[:8], "truncated"),
    "PNG chunk of 4 GiB": (patched(PNG, 33, b"\xff\xff\xff\xff"), "PNG chunks"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_named(name: str) -> None:
    data, wanted = DAMAGED[name]
    found = scan(data)
    assert found.fault != 0
    assert wanted in found.words


def chunk(kind: bytes, body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")


@pytest.mark.parametrize(
    ("header", "wanted"),
    [
        ((0, 5, 8, 2, 0, 0, 0), "width or height"),
        ((2**30, 5, 8, 2, 0, 0, 0), "width or height"),
        ((5, 5, 3, 2, 0, 0, 0), "PNG header"),
        ((5, 5, 8, 5, 0, 0, 0), "PNG header"),
        ((5, 5, 8, 2, 1, 0, 0), "PNG header"),
        ((5, 5, 8, 2, 0, 0, 2), "PNG header"),
        ((5, 5, 8, 3, 0, 0, 0), "PNG chunks"),  # a palette image without its palette
        ((900000, 900000, 8, 2, 0, 0, 0), "fewer image data"),
        ((5, 5, 8, 2, 0, 0, 0), "sound"),
    ],
)
def test_png_headers_with_right_checksums(header: tuple[int, ...], wanted: str) -> None:
    width, height, *rest = header
    body = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes(rest)
    data = PNG[:8] + chunk(b"IHDR", body) + chunk(b"IDAT", b"\0" * 40) + chunk(b"IEND", b"")
    assert wanted in words(data)


def test_every_truncation_is_found() -> None:
    for name in ("baseline", "progressive", "restart markers", "PNG palette", "comment with end markers"):
        data = SOUND[name]
        assert [n for n in range(len(data)) if scan(data[:n]).fault == 0] == []


def test_scans_without_end_are_refused() -> None:
    data = SOUND["progressive grey"]
    at = data.rindex(b"\xff\xda")
    last_scan = data[at:-2]
    assert words(data[:at] + last_scan * 100 + b"\xff\xd9") == "sound"
    assert "500" in words(data[:at] + last_scan * 600 + b"\xff\xd9")


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400))
def test_garbage_never_passes(data: bytes) -> None:
    for start in (b"", b"\xff\xd8\xff", PNG[:8]):
        found = scan(start + data)
        assert 0 < found.fault < len(FAULTS)


def test_mutants_give_a_fault_or_a_scan_in_range() -> None:
    rng = random.Random(5)
    seeds = list(SOUND.values())
    for _ in range(4000):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.choice((1, 1, 2, 8))):
            data[rng.randrange(min(len(data), 700))] = rng.choice((0, 255, rng.randrange(256)))
        found = scan(data)
        assert 0 <= found.fault < len(FAULTS)
        assert 1 <= found.orientation <= 8
        if not found.fault:
            assert min(found.width, found.height) >= 1
            assert found.components in (1, 2, 3, 4)


def test_scan_stays_inside_its_buffer(tmp_path: Path) -> None:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler here")
    program = tmp_path / "fuzz"
    flags = ["-std=c++17", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    built = subprocess.run(
        [compiler, *flags, str(CSRC / "fuzz.cc"), str(CSRC / "scan.cc"), "-o", str(program)],
        capture_output=True,
        text=True,
    )
    if "cannot find" in built.stderr:
        pytest.skip(f"this compiler has no sanitizers: {built.stderr[-200:]}")
    assert built.returncode == 0, built.stderr
    for number, data in enumerate(SOUND.values()):
        (tmp_path / f"{number}.seed").write_bytes(data)
    seeds = sorted(str(path) for path in tmp_path.glob("*.seed"))
    ran = subprocess.run([str(program), "2000", *seeds], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stdout + ran.stderr[-3000:]
    assert ran.stdout.startswith(f"{2000 * len(seeds)} scanned")
