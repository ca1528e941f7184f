"""The .beton tables: what is written reads back, and files that do not add up are refused by name."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shards.beton import read_beton
from shards.manifest import Table, join_tables, make_table
from shards.target import Record, joined_mark
from shards.target_beton import BetonTarget, BetonWriter

PAGE = 1 << 21
METADATA, ROW = 24 + 2 * 1041, 24


def jpeg(side: int, padding: int = 0) -> bytes:
    out = io.BytesIO()
    noise = np.random.default_rng(side).integers(0, 256, (side, side + 3, 3), dtype=np.uint8)
    Image.fromarray(noise).save(out, "JPEG")
    return out.getvalue() + bytes(padding)


def records(count: int, padding: int = 300_000) -> list[Record]:
    made = [(jpeg(8 + i, padding * (i % 3)), i) for i in range(count)]
    return [
        Record(f"k{i}", "jpeg", data, i % 5, 8 + i + 3, 8 + i, xxhash.xxh3_64_intdigest(data))
        for data, i in made
    ]


def write(path: Path, samples: list[Record], room: int | None = None) -> list[int]:
    with BetonWriter(path, path.with_name("tmp"), room or len(samples), PAGE) as writer:
        offsets = [writer.add(record) for record in samples]
        shard = writer.finish()
    assert (shard.name, shard.size, shard.samples) == (path.name, path.stat().st_size, len(samples))
    return offsets


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("beton") / "a.beton"
    write(path, records(12))
    return path.read_bytes()


def test_the_layout_is_ffcvs(whole: bytes) -> None:
    # Read with struct from the format's description, not with our reader.
    samples = records(12)
    version, fields, page, count, alloc = struct.unpack_from("<HHIQQ", whole)
    assert (version, fields, page, count) == (2, 2, PAGE, 12)
    assert [whole[24 + 1041 * k] for k in range(2)] == [2, 1]
    assert [whole[25 + 1041 * k :][:16].rstrip(b"\0") for k in range(2)] == [b"image", b"label"]
    assert len(whole) == alloc + 12 * 24
    at = PAGE
    for i, record in enumerate(samples):
        mode, width, height, ptr = struct.unpack_from("<BHHQ", whole, METADATA + ROW * i)
        (label,) = struct.unpack_from("<q", whole, METADATA + ROW * i + 16)
        assert (mode, width, height, label) == (0, record.width, record.height, record.label)
        assert struct.unpack_from("<QQQ", whole, alloc + 24 * i) == (i, ptr, len(record.data))
        assert whole[ptr : ptr + len(record.data)] == record.data
        assert ptr // PAGE == (ptr + len(record.data) - 1) // PAGE, "a record crosses a page"
        # Records follow each other, or begin the next page with nothing but zeros before it.
        assert ptr == at or (ptr % PAGE == 0 and ptr - at < PAGE and not whole[at:ptr].strip(b"\0"))
        at = ptr + len(record.data)
    assert at == alloc


def test_round_trip(tmp_path: Path) -> None:
    samples = records(9)
    offsets = write(tmp_path / "a.beton", samples, room=40)
    found = read_beton(tmp_path / "a.beton")
    assert found.offset.tolist() == offsets
    assert found.length.tolist() == [len(r.data) for r in samples]
    assert found.label.tolist() == [r.label for r in samples]
    assert list(zip(found.width.tolist(), found.height.tolist(), strict=True)) == [
        (r.width, r.height) for r in samples
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["a.beton"]


def test_an_empty_file_is_one(tmp_path: Path) -> None:
    with BetonWriter(tmp_path / "a.beton", tmp_path / "tmp", 0, PAGE) as writer:
        writer.finish()
    assert len(read_beton(tmp_path / "a.beton")) == 0


def rows_of(samples: list[Record], offsets: list[int]) -> dict[str, np.ndarray]:
    return {
        "shard": np.zeros(len(samples), np.uint32),
        "offset": np.array(offsets, np.uint64),
        "length": np.array([len(r.data) for r in samples], np.uint32),
        "checksum": np.array([r.checksum for r in samples], np.uint64),
        "label": np.array([r.label for r in samples], np.int32),
        "width": np.array([r.width for r in samples], np.int32),
        "height": np.array([r.height for r in samples], np.int32),
    }


@pytest.mark.parametrize("without_copy_in_the_kernel", [False, True])
def test_pieces_join_to_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_copy_in_the_kernel: bool
) -> None:
    if without_copy_in_the_kernel:

        def refuse(*_: object) -> int:
            raise OSError(18, "another file system")

        monkeypatch.setattr("os.copy_file_range", refuse)
    samples = records(17)
    groups = [samples[:7], [], samples[7:8], samples[8:]]
    pieces, tables = [tmp_path / f"{k}.beton" for k in range(4)], []
    for piece, group in zip(pieces, groups, strict=True):
        # Room for more than came: as when damaged images were left out.
        tables.append(make_table(rows_of(group, write(piece, group, room=9)), [r.key for r in group]))
    target = BetonTarget(PAGE)
    shard, table = target.join(tmp_path / "x.beton", tmp_path / "tmp", pieces, join_tables(tables))
    data = (tmp_path / "x.beton").read_bytes()
    assert (shard.name, shard.size, shard.samples) == ("x.beton", len(data), 17)
    assert set(table.columns["shard"].tolist()) == {0}
    found = read_beton(tmp_path / "x.beton")
    assert found.offset.tolist() == table.columns["offset"].tolist()
    for i, record in enumerate(samples):
        at, size = int(found.offset[i]), int(found.length[i])
        assert data[at : at + size] == record.data
        assert at // PAGE == (at + size - 1) // PAGE
        assert table.key(i) == record.key
    assert not any(piece.exists() for piece in pieces)
    assert not (tmp_path / "tmp").exists()


def test_an_interrupted_join_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = records(12)
    groups = [samples[:5], samples[5:6], samples[6:9], samples[9:]]

    def pieces_in(folder: Path) -> tuple[list[Path], Table]:
        folder.mkdir()
        pieces = [folder / f"{k}.beton" for k in range(4)]
        rows = [rows_of(g, write(p, g)) for p, g in zip(pieces, groups, strict=True)]
        return pieces, join_tables(
            [make_table(r, [x.key for x in g]) for r, g in zip(rows, groups, strict=True)]
        )

    target = BetonTarget(PAGE)
    pieces, table = pieces_in(tmp_path / "a")
    whole, wanted = target.join(tmp_path / "a.beton", tmp_path / "a.tmp", pieces, table)

    pieces, table = pieces_in(tmp_path / "b")
    copy, left = os.copy_file_range, 3

    def killed(source: int, to: int, size: int, begin: int, at: int) -> int:
        nonlocal left
        left -= 1
        if left <= 0:
            # Half of a piece is there, and more than its half: as if it had been a longer one.
            os.pwrite(to, b"x" * 4 * PAGE, at)
            raise KeyboardInterrupt
        return copy(source, to, size, begin, at)

    with monkeypatch.context() as patch:
        patch.setattr(os, "copy_file_range", killed)
        with pytest.raises(KeyboardInterrupt):
            target.join(tmp_path / "b.beton", tmp_path / "b.tmp", pieces, table)
    assert not (tmp_path / "b.beton").exists()
    assert [piece.exists() for piece in pieces] == [False, False, True, True]
    again, found = target.join(tmp_path / "b.beton", tmp_path / "b.tmp", pieces, table)
    assert (tmp_path / "b.beton").read_bytes() == (tmp_path / "a.beton").read_bytes()
    assert again.xxh3_128 == whole.xxh3_128
    assert found.columns["offset"].tolist() == wanted.columns["offset"].tolist()

    pieces, table = pieces_in(tmp_path / "c")
    joined_mark(pieces[0]).touch()
    with pytest.raises(ValueError, match=r"c\.tmp: gone, .* run the same command again"):
        target.join(tmp_path / "c.beton", tmp_path / "c.tmp", pieces, table)
    assert not joined_mark(pieces[0]).exists()


def test_what_cannot_be_stored_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    png = Record("k", "png", b"\x89PNG", 0, 1, 1, 0)
    huge = Record("k", "jpeg", bytes(PAGE + 1), 0, 1, 1, 0)
    for record, wanted in ((png, "holds JPEGs alone, this one is a PNG"), (huge, "do not fit into a page")):
        writer = BetonWriter(tmp_path / "a.beton", tmp_path / "tmp", 5, PAGE)
        with pytest.raises(ValueError, match=f"sample k: .*{wanted}"), writer:
            writer.add(record)
        assert not list(tmp_path.iterdir())
    with BetonWriter(tmp_path / "a.beton", tmp_path / "tmp", 1, PAGE) as writer:
        first, second = records(2)
        writer.add(first)
        with pytest.raises(ValueError, match="more than the 1 records"):
            writer.add(second)


def patched(whole: bytes, at: int, form: str, *values: int) -> bytes:
    out = bytearray(whole)
    struct.pack_into(form, out, at, *values)
    return bytes(out)


def alloc_of(whole: bytes) -> int:
    return int.from_bytes(whole[16:24], "little")


REFUSED: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "nothing": (lambda w: b"", "0 bytes, too few"),
    "a stub": (lambda w: w[:20], "20 bytes, too few"),
    "version 1": (lambda w: patched(w, 0, "<H", 1), "version 1, this vqsa reads version 2"),
    "a JPEG": (lambda w: jpeg(30), "version 55551, this vqsa reads"),
    "unfinished": (lambda w: patched(w, 16, "<Q", 0), "unfinished"),
    "page of 3 MB": (lambda w: patched(w, 4, "<I", 3_000_000), "page size 3000000"),
    "page of 4 KiB": (lambda w: patched(w, 4, "<I", 4096), "page size 4096"),
    "cut off in the records": (lambda w: w[: alloc_of(w) - 1], "cut off: .* its allocation table begins at"),
    "cut off in the table": (lambda w: w[:-1], "no multiple of 24"),
    "a row missing": (lambda w: w[:-24], "lists 11 records, the header 12 samples"),
    "no rows": (lambda w: w[: alloc_of(w)], "lists 0 records"),
    "absurd fields": (lambda w: patched(w, 2, "<H", 65535), "claims 65535 fields"),
    "absurd samples": (lambda w: patched(w, 8, "<Q", 2**60), f"claims {2**60} samples"),
    "all samples": (lambda w: patched(w, 8, "<Q", 2**64 - 1), f"claims {2**64 - 1} samples"),
    "table in the header": (lambda w: patched(w, 16, "<Q", (len(w) - 24) % 24 + 24), "claims 2 fields"),
    "a float label": (lambda w: patched(w, 24 + 1041, "<B", 0), r"'image' \(RGB image\), 'label' \(float\)"),
    "custom fields": (lambda w: patched(w, 24, "<B", 255), r"'image' \(custom\)"),
    "unknown fields": (lambda w: patched(w, 24, "<B", 77), r"'image' \(unknown type 77\)"),
    "one field": (lambda w: patched(w, 2, "<H", 1), r"fields are 'image' \(RGB image\);"),
    "raw pixels": (
        lambda w: patched(w, METADATA + 3 * ROW, "<B", 1),
        r"1 of 12 samples hold raw.*sample 3 is",
    ),
    "an unknown mode": (lambda w: patched(w, METADATA + 4 * ROW, "<B", 9), "sample 4 has image mode 9"),
    "a pointer elsewhere": (
        lambda w: patched(w, METADATA + 2 * ROW + 5, "<Q", PAGE + 1),
        "no row for sample 2",
    ),
    "a pointer beyond": (
        lambda w: patched(w, METADATA + 2 * ROW + 5, "<Q", 2**64 - 1),
        "no row for sample 2",
    ),
    "a row of another sample": (lambda w: patched(w, alloc_of(w) + 24, "<Q", 7), "no row for sample 1"),
    "a length beyond": (
        lambda w: patched(w, alloc_of(w) + 11 * 24 + 16, "<Q", len(w)),
        "sample 11 lies at byte .* outside the records",
    ),
    "a length that overflows": (
        lambda w: patched(w, alloc_of(w) + 16, "<Q", 2**64 - 10),
        "sample 0 lies at byte .* outside the records",
    ),
    "a record in the tables": (
        lambda w: patched(patched(w, METADATA + 5, "<Q", 40), alloc_of(w) + 8, "<Q", 40),
        "sample 0 lies at byte 40 .* outside the records",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_add_up_is_refused(whole: bytes, tmp_path: Path, name: str) -> None:
    damage, wanted = REFUSED[name]
    path = tmp_path / "x.beton"
    path.write_bytes(damage(whole))
    with pytest.raises(ValueError, match=wanted) as caught:
        read_beton(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_claims_of_a_sparse_file_take_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.beton"
    size = 1 << 42
    alloc = size - (size // 2 // 24) * 24
    with path.open("wb") as file:
        file.write(struct.pack("<HHIQQ", 2, 2, PAGE, 10**9, alloc))
        for kind in (2, 1):
            file.write(bytes([kind]) + bytes(1040))
        file.truncate(size)
    with pytest.raises(ValueError, match="more than the 100000000 that vqsa reads"):
        read_beton(path)


def test_an_unsorted_allocation_table_and_the_label_first(whole: bytes, tmp_path: Path) -> None:
    alloc = alloc_of(whole)
    rows = [whole[at : at + 24] for at in range(alloc, len(whole), 24)]
    shuffled = whole[:alloc] + b"".join(rows[k] for k in np.random.default_rng(0).permutation(12))
    (tmp_path / "a.beton").write_bytes(whole)
    (tmp_path / "b.beton").write_bytes(shuffled)
    # The other order of the fields: descriptors and each row's two parts change places.
    front, metadata = whole[:24], whole[METADATA : METADATA + 12 * ROW]
    swapped = front + whole[24 + 1041 : METADATA] + whole[24 : 24 + 1041]
    for at in range(0, len(metadata), ROW):
        swapped += metadata[at + 16 : at + 24] + metadata[at : at + 16]
    (tmp_path / "c.beton").write_bytes(swapped + whole[len(swapped) :])
    wanted, *others = (read_beton(tmp_path / f"{name}.beton") for name in "abc")
    for found in others:
        for column in ("offset", "length", "label", "width", "height"):
            np.testing.assert_array_equal(getattr(found, column), getattr(wanted, column))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_mutated_tables_never_point_outside(
    whole: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    alloc = alloc_of(whole)
    tables = [*range(24 + 1 + 16), *range(METADATA, METADATA + 12 * ROW), *range(alloc, len(whole))]
    path = tmp_path_factory.getbasetemp() / "mutant.beton"
    if not path.exists():
        path.write_bytes(whole)
    with path.open("r+b") as file:
        places = data.draw(st.lists(st.sampled_from(tables), min_size=1, max_size=4))
        for at in places:
            file.seek(at)
            file.write(bytes([data.draw(st.integers(0, 255))]))
    try:
        found = read_beton(path)
    except ValueError:
        pass
    else:
        end = found.offset.astype(object) + found.length.astype(object)
        assert all(e <= found.alloc_ptr for e in end)
        assert (found.offset >= found.data_begin).all()
    with path.open("r+b") as file:
        for at in places:
            file.seek(at)
            file.write(whole[at : at + 1])
