"""The manifest: round trip, and refusal of everything a stranger or a bad disk could put there."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

import shards
from shards.manifest import (
    HEADER_NAME,
    TABLE_NAME,
    Header,
    ShardFile,
    Table,
    check_table,
    decode_table,
    describe_table,
    encode_table,
    join_tables,
    make_table,
    read_header,
    read_table,
    write_manifest,
)

RECORD = 1000


def some_table(rows: int, first: int = 0) -> Table:
    at = np.arange(rows, dtype=np.uint64)
    return make_table(
        {
            "shard": np.zeros(rows, np.uint32),
            "length": np.full(rows, RECORD - 24, np.uint32),
            "offset": at * RECORD,
            "checksum": at + 2**63,
            "label": (at % 3).astype(np.int32),
            "width": (at + 1).astype(np.int32),
            "height": (at + 2).astype(np.int32),
        },
        [f"key-{first + i}-é" for i in range(rows)],
    )


def some_header(table: Table, rows: list[int], encoded: bytes | bytearray) -> Header:
    return Header(
        name="set",
        samples=len(table),
        classes=["a", "b", "c"],
        options={"seed": None},
        source="0" * 32,
        counts={"rejected": 0},
        table=describe_table(encoded),
        shards=[
            ShardFile(name=f"set-{k:06d}.tar", size=n * RECORD, samples=n, xxh3_128="1" * 32)
            for k, n in enumerate(rows)
        ],
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A set of 3 + 0 + 4 samples with shard files of zeros."""
    rows = [3, 0, 4]
    table = join_tables([some_table(3), some_table(0), some_table(4, first=3)])
    encoded = encode_table(table)
    header = some_header(table, rows, encoded)
    write_manifest(tmp_path, header, encoded)
    for shard in header.shards:
        (tmp_path / shard.name).write_bytes(bytes(shard.size))
    return tmp_path


def test_round_trip(folder: Path) -> None:
    header = read_header(folder)
    table = read_table(folder, header)
    assert len(table) == header.samples == 7
    assert table.columns["shard"].tolist() == [0, 0, 0, 2, 2, 2, 2]
    assert table.columns["offset"].tolist() == [0, 1000, 2000, 0, 1000, 2000, 3000]
    assert [table.key(i) for i in range(7)] == [f"key-{i}-é" for i in range(7)]
    assert int(table.columns["checksum"][6]) == 2**63 + 3
    with pytest.raises(ValueError, match="read-only"):
        table.columns["label"][0] = 1
    assert not list(folder.glob(".*"))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.text(max_size=20), max_size=5), max_size=4))
def test_any_keys_survive_joining_and_encoding(groups: list[list[str]]) -> None:
    groups = [[key.encode("utf-8", "ignore").decode() for key in keys] for keys in groups]
    column = ("shard", "length", "offset", "checksum", "label", "width", "height")
    tables = [make_table({name: np.arange(len(keys)) for name in column}, keys) for keys in groups]
    table = decode_table(encode_table(join_tables(tables)), "here")
    assert [table.key(i) for i in range(len(table))] == [key for keys in groups for key in keys]
    assert table.columns["width"].tolist() == [i for keys in groups for i in range(len(keys))]
    assert table.columns["shard"].tolist() == [k for k, keys in enumerate(groups) for _ in keys]


def edit_header(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = folder / HEADER_NAME
    header = json.loads(path.read_text())
    edit(header)
    path.write_text(json.dumps(header))


BAD_HEADERS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another format": (lambda h: h.update(format="mds"), "not a vqsa shard manifest"),
    "another version": (lambda h: h.update(version=2), "version 2, this vqsa reads version 1"),
    "no version": (lambda h: h.pop("version"), "version None"),
    "unknown storage": (lambda h: h.update(storage="zip"), "storage"),
    "unknown field": (lambda h: h.update(extra=1), "extra"),
    "field missing": (lambda h: h.pop("classes"), "classes"),
    "text for a number": (lambda h: h.update(samples="7"), "samples"),
    "negative count": (lambda h: h["shards"][0].update(samples=-3), "shards.0.samples"),
    "absurd size": (lambda h: h["shards"][0].update(size=10**30), "shards.0.size"),
    "path in a name": (lambda h: h["shards"][0].update(name="../set-000000.tar"), "shards.0.name"),
    "absolute name": (lambda h: h["shards"][0].update(name="/etc/passwd"), "shards.0.name"),
    "hidden name": (lambda h: h["shards"][0].update(name="..tar"), "shards.0.name"),
    "line end in a name": (lambda h: h["shards"][0].update(name="a.tar\n"), "shards.0.name"),
    "same shard twice": (lambda h: h["shards"][2].update(name="set-000000.tar"), "listed twice"),
    "counts that do not add up": (lambda h: h["shards"][0].update(samples=2), "its shards 6"),
    "more samples than rows": (lambda h: h.update(samples=2**60), "7 rows, but the header says"),
    "counts shifted": (
        lambda h: (h["shards"][0].update(samples=2), h["shards"][2].update(samples=5)),
        "row 2: does not lie in the shard",
    ),
    "fewer classes": (lambda h: h.update(classes=["a", "b"]), "row 2: its label is outside 0..1"),
    "smaller shard": (lambda h: h["shards"][2].update(size=3500), "row 6: the record reaches past the end"),
    "another table": (lambda h: h["table"].update(xxh3_128="0" * 32), "checksum differs"),
    "table of another size": (lambda h: h["table"].update(size=64), "says 64"),
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_bad_headers_are_refused(folder: Path, name: str) -> None:
    edit, wanted = BAD_HEADERS[name]
    edit_header(folder, edit)
    with pytest.raises(ValueError, match=wanted) as caught:
        shards.open(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100000])
def test_a_header_that_is_no_json_object_is_refused(folder: Path, text: bytes) -> None:
    (folder / HEADER_NAME).write_bytes(text)
    with pytest.raises(ValueError, match=r"manifest\.json: not"):
        shards.open(folder)


def test_a_huge_header_is_refused_unread(folder: Path) -> None:
    with (folder / HEADER_NAME).open("wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(ValueError, match="a manifest header has at most"):
        shards.open(folder)


BAD_ROWS: dict[str, tuple[str, int, int, str]] = {
    # name: column, row, value, message
    "offset past the end": ("offset", 1, 10**9, "row 1: the record reaches past the end"),
    "offset that overflows": ("offset", 1, 2**64 - 10, "row 1: the record reaches past the end"),
    "length past the end": ("length", 2, RECORD + 1, "row 2: the record reaches past the end"),
    "overlap": ("length", 0, RECORD + 1, "row 1: the record overlaps another"),
    "backwards": ("offset", 5, 0, "row 5: the record overlaps another"),
    "shard not there": ("shard", 6, 3, "row 6: does not lie in the shard"),
    "label beyond the classes": ("label", 4, 3, r"row 4: its label is outside 0\.\.2"),
    "negative label": ("label", 4, -1, "row 4: its label"),
    "width 0": ("width", 3, 0, "row 3: its width"),
    "height in the millions": ("height", 3, 2_000_000, "row 3: its height"),
    "keys backwards": ("key_end", 3, 0, "row 3: its key"),
    "keys past their end": ("key_end", 6, 2**63, "row 6: its key"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_refused(folder: Path, name: str) -> None:
    column, row, value, wanted = BAD_ROWS[name]
    header = read_header(folder)
    table = read_table(folder, header)
    columns = {key: values.copy() for key, values in table.columns.items()}
    columns[column][row] = value
    encoded = encode_table(Table(columns, table.keys_u8))
    write_manifest(folder, header.model_copy(update={"table": describe_table(encoded)}), encoded)
    with pytest.raises(ValueError, match=wanted):
        shards.open(folder)


def test_a_damaged_table_is_refused(folder: Path) -> None:
    path = folder / TABLE_NAME
    good = path.read_bytes()
    for damaged, wanted in (
        (good[:-1], "says"),
        (good + b"\0", "says"),
        (b"", "says"),
        (good[:100] + b"\1" + good[101:], "checksum differs"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=wanted):
            shards.open(folder)
    path.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"manifest\.table: missing, and manifest\.json alone lists no samples"
    ):
        shards.open(folder)


def test_an_absurd_table_takes_no_memory() -> None:
    for rows, key_bytes in ((2**63, 0), (2**40, 2**40), (1, 2**64 - 1), (2**64 - 1, 2**64 - 1)):
        data = b"VQSATAB1" + rows.to_bytes(8, "little") + key_bytes.to_bytes(8, "little") + bytes(104)
        with pytest.raises(ValueError, match=f"{rows} rows and {key_bytes} bytes of keys"):
            decode_table(data, "here")
    with pytest.raises(ValueError, match="without its signature"):
        decode_table(b"PK" + bytes(200), "here")


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_mutated_tables_never_point_outside(data: st.DataObject) -> None:
    table = join_tables([some_table(3), some_table(4)])
    encoded = encode_table(table)
    header = some_header(table, [3, 4], encoded)
    for _ in range(data.draw(st.integers(1, 4))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = decode_table(encoded, "here")
        check_table(found, header, "here")
    except ValueError:
        return
    end = found.columns["offset"].astype(object) + found.columns["length"].astype(object)
    assert all(e <= header.shards[s].size for e, s in zip(end, found.columns["shard"], strict=True))
    assert all(isinstance(found.key(i), str) for i in range(len(found)))
    assert found.columns["label"].min() >= 0
    assert found.columns["label"].max() < 3


def test_mutated_headers_are_refused_or_stay_in_the_folder(folder: Path) -> None:
    path = folder / HEADER_NAME
    good, rng = path.read_bytes(), random.Random(0)
    opened = 0
    for _ in range(400):
        text = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(text))
            text[at : at + rng.randint(0, 3)] = bytes(
                rng.choice(b'0-9e.,:"{}[]/\\\0\xff') for _ in range(rng.randint(0, 3))
            )
        path.write_bytes(text)
        try:
            store = shards.open(folder)
        except (ValueError, FileNotFoundError):
            continue
        opened += 1
        assert all(file.parent == folder for file in store.files)
        assert (
            store.offset + store.length
            <= np.array([file.stat().st_size for file in store.files])[store.shard]
        ).all()
    assert opened < 350


def test_missing_pieces_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder; build shards with"):
        shards.open(folder / "nowhere")
    with pytest.raises(ValueError, match=r"a file, but neither \.tar nor \.beton; a shard set is a folder"):
        shards.open(folder / HEADER_NAME)
    (folder / HEADER_NAME).unlink()
    (folder / ".build").mkdir()
    with pytest.raises(FileNotFoundError, match="not a finished shard set; if a build was interrupted"):
        shards.open(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="not a finished shard set"):
        shards.open(tmp_path / "empty")


def test_shards_are_compared_with_the_manifest(folder: Path) -> None:
    tar = folder / "set-000002.tar"
    tar.write_bytes(bytes(3999))
    with pytest.raises(ValueError, match=r"set-000002\.tar: 3999 bytes, the manifest says 4000"):
        shards.open(folder)
    tar.unlink()
    with pytest.raises(FileNotFoundError, match=r"set-000002\.tar: shard file missing"):
        shards.open(folder)


def test_a_large_manifest_opens(tmp_path: Path) -> None:
    rows, per_shard = 200_000, 1000
    table = join_tables([some_table(per_shard, first=k * per_shard) for k in range(rows // per_shard)])
    encoded = encode_table(table)
    header = some_header(table, [per_shard] * (rows // per_shard), encoded)
    write_manifest(tmp_path, header, encoded)
    began_s = time.process_time()
    opened = read_table(tmp_path, read_header(tmp_path))
    # Some 0.02 s on an idle machine; row by row it would be seconds. benchmarks/shard_sets.py measures 1.28 M rows.
    assert time.process_time() - began_s < 0.3
    assert opened.key(rows - 1) == f"key-{rows - 1}-é"
    assert xxhash.xxh3_128_hexdigest((tmp_path / TABLE_NAME).read_bytes()) == header.table.xxh3_128
