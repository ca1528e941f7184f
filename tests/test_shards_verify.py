"""Verification: a sound set passes, and each kind of damage is named with shard, sample and remedy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xxhash
from PIL import Image

import shards
from shards.build import BuildOptions, build
from shards.manifest import (
    HEADER_NAME,
    TABLE_NAME,
    describe_table,
    encode_table,
    make_table,
    read_header,
    read_table,
    write_manifest,
)
from shards.verify import Fault, verify

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """10 images of 2 classes in shards of 4, 4 and 2; key 3 is a PNG."""
    rng = np.random.default_rng(0)
    for i in range(10):
        path = tmp_path / "source" / f"c{i // 5}" / (f"{i}.png" if i == 3 else f"{i}.jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)).save(path)
    options = BuildOptions(tmp_path / "source", tmp_path / "set", "set", samples_per_shard=4, workers=1)
    build(options, progress=False)
    return tmp_path / "set"


def offset_of(folder: Path, row: int) -> int:
    return int(read_table(folder, read_header(folder)).columns["offset"][row])


def overwrite(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def rewrite_manifest(folder: Path, **changes: tuple[int, int]) -> None:
    """Change single cells (row, value) of the table and make the header agree with it."""
    header = read_header(folder)
    table = read_table(folder, header)
    columns = {name: column.copy() for name, column in table.columns.items() if name != "key_end"}
    for name, (row, value) in changes.items():
        columns[name][row] = value
    encoded = encode_table(make_table(columns, [table.key(i) for i in range(len(table))]))
    write_manifest(folder, header.model_copy(update={"table": describe_table(encoded)}), encoded)


def hash_shard_anew(folder: Path, number: int) -> None:
    """Let the header give the checksum that a changed shard now has."""
    text = json.loads((folder / HEADER_NAME).read_text())
    shard = text["shards"][number]
    shard["xxh3_128"] = xxhash.xxh3_128_hexdigest((folder / shard["name"]).read_bytes())
    (folder / HEADER_NAME).write_text(json.dumps(text))


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("decode", [False, True])
def test_a_sound_set_has_no_faults(folder: Path, decode: bool, workers: int) -> None:
    found = verify(folder, decode=decode, workers=workers)
    assert (found.shards, found.samples, found.faults) == (3, 10, [])


def flip_payload(folder: Path) -> None:
    overwrite(folder / "set-000001.tar", offset_of(folder, 5) + 700, b"\x55\xaa")


def bad_header(folder: Path) -> None:
    overwrite(folder / "set-000001.tar", offset_of(folder, 5) - 512 + 148, b"7")


def header_gone(folder: Path) -> None:
    overwrite(folder / "set-000001.tar", offset_of(folder, 5) - 512, bytes(512))


def other_label(folder: Path) -> None:
    overwrite(folder / "set-000001.tar", offset_of(folder, 5) - 1024, b"0")


def other_label_in_manifest(folder: Path) -> None:
    rewrite_manifest(folder, label=(5, 0))


def other_width(folder: Path) -> None:
    rewrite_manifest(folder, width=(5, 31))


def other_length(folder: Path) -> None:
    length = int(shards.open(folder).length[5])
    rewrite_manifest(folder, length=(5, length - 1))


def cut_off(folder: Path) -> None:
    os.truncate(folder / "set-000001.tar", offset_of(folder, 5) + 10)


def other_offset(folder: Path) -> None:
    rewrite_manifest(folder, offset=(4, 1537))


def bytes_after_the_end(folder: Path) -> None:
    path = folder / "set-000001.tar"
    overwrite(path, path.stat().st_size - 1, b"x")


def owner_changed(folder: Path) -> None:
    # A sound tar header with another time: no sample is damaged, but it is not the file that was built.
    path = folder / "set-000001.tar"
    block = bytearray(path.read_bytes()[:512])
    block[146] += 1
    total = sum(block[:148]) + 8 * 32 + sum(block[156:])
    block[148:156] = f"{total:06o}\0 ".encode()
    overwrite(path, 0, bytes(block))


def shard_missing(folder: Path) -> None:
    (folder / "set-000001.tar").unlink()


def index_missing(folder: Path) -> None:
    (folder / "set-000001.idx").unlink()


def index_differs(folder: Path) -> None:
    path = folder / "set-000001.idx"
    path.write_text(path.read_text().replace("c1_5.jpg", "c1_9.jpg"))


def index_short(folder: Path) -> None:
    path = folder / "set-000001.idx"
    path.write_text("\n".join(path.read_text().split("\n")[:-2]) + "\n")


def index_long(folder: Path) -> None:
    with (folder / "set-000001.idx").open("a") as file:
        file.write("x" * 10_000)


def sizes_differ(folder: Path) -> None:
    path = folder / "sizes.json"
    path.write_text(path.read_text().replace('"set-000001.tar": 4', '"set-000001.tar": 5'))


def info_missing(folder: Path) -> None:
    (folder / "_info.json").unlink()


def info_not_json(folder: Path) -> None:
    (folder / "_info.json").write_text("{" * 5000)


def stray_shard(folder: Path) -> None:
    (folder / "set-000077.tar").write_bytes(b"")


TAR, IDX = "set-000001.tar", "set-000001.idx"


@pytest.mark.parametrize(
    ("damage", "wanted"),
    [
        (flip_payload, [(TAR, "c1_5", "checksum differs", "copy the shard again")]),
        (bad_header, [(TAR, "c1_5", "tar header of c1_5.jpg is damaged", "copy the shard again")]),
        (header_gone, [(TAR, "c1_5", "no tar header", "copy the shard again")]),
        (other_label, [(TAR, "c1_5", "label is 0 in the tar, 1 in the manifest", "copy the shard again")]),
        (other_label_in_manifest, [(TAR, "c1_5", "label is 1 in the tar, 0 in", "not of one build")]),
        (other_width, [(TAR, "c1_5", "31 x 25 pixels", "not of one build")]),
        (other_length, [(TAR, "c1_5", "bytes in the tar", "not of one build")]),
        (other_offset, [(TAR, "c0_4", "at byte 1537", "not of one build")]),
        (
            cut_off,
            [
                (TAR, None, "the manifest says", "copy the shard again"),
                (TAR, "c1_5", "cut off here: 3 of 4 samples are lost", "copy the shard again"),
            ],
        ),
        (bytes_after_the_end, [(TAR, None, "does not end with empty blocks", "copy the shard again")]),
        (owner_changed, [(TAR, None, "file's checksum differs", "copy the shard again")]),
        (shard_missing, [(TAR, None, "shard file missing", "copy the shard again")]),
        (index_missing, [(IDX, None, "index file missing", "wds2idx")]),
        (index_differs, [(IDX, "c1_5", "line 3 is", "wds2idx")]),
        (index_short, [(IDX, None, "not one line for each of 4 samples", "wds2idx")]),
        (index_long, [(IDX, None, "not one line for each of 4 samples", "wds2idx")]),
        (sizes_differ, [("sizes.json", None, "does not list the shards", "copy it again")]),
        (info_missing, [("_info.json", None, "missing", "copy it again")]),
        (info_not_json, [("_info.json", None, "does not list the shards", "copy it again")]),
        (stray_shard, [("set-000077.tar", None, "not in the manifest", "remove it")]),
    ],
)
def test_damage_is_named(
    folder: Path, damage: Callable[[Path], None], wanted: list[tuple[str, str | None, str, str]]
) -> None:
    damage(folder)
    found = verify(folder, workers=2).faults
    assert [(f.file, f.sample) for f in found] == [w[:2] for w in wanted], found
    for fault, (_, _, problem, remedy) in zip(found, wanted, strict=True):
        assert problem in fault.problem
        assert remedy in fault.remedy


def test_the_remedy_names_the_shard_to_write_again(folder: Path) -> None:
    flip_payload(folder)
    (fault,) = verify(folder).faults
    assert fault.remedy.endswith("tools/build_shards.py --only 1")


def test_every_damaged_sample_is_named(folder: Path) -> None:
    for row in (0, 2, 6):
        overwrite(folder / f"set-{row // 4:06d}.tar", offset_of(folder, row) + 650, b"\x55\xaa")
    overwrite(folder / "set-000000.tar", 512 * 2 + 3, b"?")  # the header of the first image too
    assert [f.sample for f in verify(folder).faults] == ["c0_0", "c0_2", "c1_6"]


def test_damage_behind_right_checksums_is_found(folder: Path) -> None:
    """The structural scan and the decoder see what a manifest made from damaged images hides."""
    offset, length = offset_of(folder, 5), int(shards.open(folder).length[5])
    overwrite(folder / TAR, offset, b"no image")
    data = (folder / TAR).read_bytes()[offset : offset + length]
    hash_shard_anew(folder, 1)
    rewrite_manifest(folder, checksum=(5, xxhash.xxh3_64_intdigest(data)))
    (fault,) = verify(folder).faults
    assert (fault.sample, "neither JPEG nor PNG" in fault.problem) == ("c1_5", True)


def test_only_a_decoder_sees_broken_pixels(folder: Path) -> None:
    # A PNG chunk with the right checksum whose content is no deflate stream.
    row = 3
    offset, length = offset_of(folder, row), int(shards.open(folder).length[row])
    data = bytearray((folder / "set-000000.tar").read_bytes()[offset : offset + length])
    at = data.index(b"IDAT")
    size = int.from_bytes(data[at - 4 : at], "big")
    body = b"IDAT" + bytes(size)
    data[at : at + 8 + size] = body + zlib.crc32(body).to_bytes(4, "big")
    overwrite(folder / "set-000000.tar", offset, bytes(data))
    hash_shard_anew(folder, 0)
    rewrite_manifest(folder, checksum=(row, xxhash.xxh3_64_intdigest(bytes(data))))
    assert verify(folder).faults == []
    (fault,) = verify(folder, decode=True).faults
    assert fault.sample == "c0_3"
    assert "does not decode" in fault.problem


def test_a_damaged_manifest_is_a_fault(folder: Path) -> None:
    overwrite(folder / TABLE_NAME, 100, b"\xff\xff")
    (fault,) = verify(folder).faults
    assert (fault.file, fault.problem[:16]) == (TABLE_NAME, "checksum differs")
    (folder / TABLE_NAME).unlink()
    (fault,) = verify(folder).faults
    assert fault.problem.startswith("missing, and manifest.json alone lists no samples")
    (folder / HEADER_NAME).write_text("{")
    (fault,) = verify(folder).faults
    assert (fault.file, fault.problem[:8]) == (HEADER_NAME, "not JSON")


def test_no_set_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        verify(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="not a finished shard set"):
        verify(tmp_path)


def test_a_fault_reads_as_one_line() -> None:
    assert str(Fault("a.tar", "key", "it is bad", "do this")) == "a.tar, sample key: it is bad; do this"
    assert str(Fault("a.tar", None, "it is bad", "do this")) == "a.tar: it is bad; do this"


def command_line(*arguments: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "verify_shards.py"), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


def test_the_command_line_answers_with_its_exit_code(folder: Path, tmp_path: Path) -> None:
    code, out, err = command_line(str(folder))
    assert (code, out) == (0, f"{folder}: 10 samples in 3 shards, sound\n"), err
    flip_payload(folder)
    overwrite(folder / TAR, offset_of(folder, 6) + 650, b"\x55\xaa")
    code, out, _ = command_line(str(folder), "--max-faults", "1", "--decode")
    assert code == 1
    assert out.startswith("set-000001.tar, sample c1_5: the image's checksum differs")
    assert out.endswith(f"... and 1 more\n{folder}: 10 samples in 3 shards, 2 faults\n")
    code, _, err = command_line(str(tmp_path / "nowhere"))
    assert code == 2
    assert "no such folder" in err
    assert "Traceback" not in err
