"""Shards that others made: found, indexed once, read in the order of their own readers; damage is named."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import resource
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import shards
from shards import FAULTS
from shards.index import FOLDER
from shards.target import Record
from shards.target_beton import BetonWriter


def jpeg(number: int) -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (9 + number % 5, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


def png(number: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (7, 9 + number)).save(out, "PNG")
    return out.getvalue()


def write_tars(folder: Path, samples: list[dict[str, Any]], per_shard: int = 4, **options: Any) -> None:
    folder.mkdir(exist_ok=True)
    pattern = str(folder / "other-%06d.tar")
    with webdataset.ShardWriter(pattern, maxcount=per_shard, verbose=0, **options) as writer:
        for sample in samples:
            writer.write(sample)


def numbered(count: int) -> list[dict[str, Any]]:
    return [{"__key__": f"s{i:03d}", "jpg": jpeg(i), "cls": i % 3} for i in range(count)]


def webdataset_reads(files: list[Path]) -> list[tuple[str, bytes, int]]:
    samples = webdataset.WebDataset([str(f) for f in files], shardshuffle=False)
    return [(s["__key__"], s.get("jpg") or s.get("png"), int(s["cls"])) for s in samples]


def ours(store: shards.Store) -> list[tuple[str, bytes, int]]:
    data = store.fetch(range(len(store))).data
    return [(store.key(i), data[i].tobytes(), int(store.label[i])) for i in range(len(store))]


@pytest.mark.parametrize("options", [{}, {"mtime": 0}], ids=["extended headers", "plain headers"])
def test_a_folder_a_file_and_a_pattern(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, options: dict[str, Any]
) -> None:
    folder = tmp_path / "set"
    write_tars(folder, numbered(10), **options)
    files = sorted(folder.glob("*.tar"))
    assert len(files) == 3
    store = shards.open(folder)
    assert "indexing 0.0 GB once; the index is kept in" in caplog.text
    assert ours(store) == webdataset_reads(files)
    assert store.files == files
    assert (store.name, store.classes) == ("other", ["0", "1", "2"])
    with Image.open(io.BytesIO(store.read(5).tobytes())) as image:
        assert (store.width[5], store.height[5]) == image.size
    caplog.clear()
    again = shards.open(folder)
    assert not caplog.records, "the second time the index is there"
    assert ours(again) == ours(store)
    assert ours(shards.open(files[1])) == webdataset_reads(files[1:2])
    assert ours(shards.open(folder / "other-{000001..000002}.tar")) == webdataset_reads(files[1:])
    assert ours(pickle.loads(pickle.dumps(store))) == ours(store)


def test_an_index_is_made_again_when_a_shard_changes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "set"
    write_tars(folder, numbered(6), mtime=0)
    first = shards.open(folder)
    write_tars(folder, numbered(7), mtime=0)
    caplog.clear()
    second = shards.open(folder)
    assert "indexing" in caplog.text
    assert (len(first), len(second)) == (6, 7)
    with pytest.raises(ValueError, match="built again since this store was opened"):
        pickle.loads(pickle.dumps(first))
    index = next((folder / FOLDER).iterdir())
    (index / "manifest.table").write_bytes(b"damaged")
    caplog.clear()
    assert ours(shards.open(folder)) == ours(second)
    assert "the index is damaged and made again" in caplog.text


def test_where_one_may_not_write_the_index_goes_to_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder, cache = tmp_path / "set", tmp_path / "cache"
    write_tars(folder, numbered(3))
    may = os.access
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(
        os, "access", lambda p, mode: folder not in (Path(p), *Path(p).parents) and may(p, mode)
    )
    store = shards.open(folder)
    assert str(cache) in caplog.text
    assert not (folder / FOLDER).exists()
    caplog.clear()
    assert ours(shards.open(folder)) == ours(store)
    assert not caplog.records


def test_several_processes_index_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tars(tmp_path / "set", numbered(9))
    with ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(shards.open, [tmp_path / "set"] * 4))
    assert sum("indexing" in record.message for record in caplog.records) == 1
    assert len({str(ours(store)) for store in stores}) == 1


def test_labels_by_name_and_in_json(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    names = ["cat", "ant", "cat", "bee"]
    write_tars(folder, [{"__key__": f"{i}", "jpg": jpeg(i), "cls": n} for i, n in enumerate(names)])
    with pytest.raises(
        ValueError, match=r"sample 0: its label is the name 'cat', and no list .* classes\.txt"
    ):
        shards.open(folder)
    (folder / "classes.txt").write_text("ant\nbee\ncat\n")
    store = shards.open(folder)
    assert [store.classes[k] for k in store.label] == names
    short = tmp_path / "short.txt"
    short.write_text("ant\ncat\n")
    with pytest.raises(
        ValueError, match="sample 3: its label is the name 'bee', which is not in the list of 2"
    ):
        shards.open(folder, classes=short)

    described = tmp_path / "json"
    write_tars(
        described,
        [
            {"__key__": "a", "png": png(1), "json": {"label": 2}},
            {"__key__": "b", "jpeg": jpeg(1), "json": {"cls": 0, "x": 1}},
        ],
    )
    store = shards.open(described)
    assert store.label.tolist() == [2, 0]
    assert store.read(0).tobytes() == png(1)
    (described / "classes.txt").write_text("one\n")
    with pytest.raises(ValueError, match=r"sample a: label 2 is outside 0\.\.0 of the list of classes"):
        shards.open(described)


def test_damaged_images_keep_their_place(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples = numbered(5)
    samples[2]["jpg"] = b"not a picture"
    samples[3]["jpg"] = samples[3]["jpg"][:200]
    write_tars(tmp_path / "set", samples)
    store = shards.open(tmp_path / "set")
    assert "2 images are damaged, and will be marked when read; the first: " in caplog.text
    assert "sample s002: neither JPEG nor PNG" in caplog.text
    assert store.header.counts == {"damaged": 2}
    assert [store.key(i) for i in range(5)] == [f"s{i:03d}" for i in range(5)]
    assert [FAULTS[f] for f in store.fetch(range(5)).fault][2] == "neither JPEG nor PNG"
    assert np.flatnonzero(store.fetch(range(5)).fault).tolist() == [2, 3]


def tar_of(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


BAD_SAMPLES: dict[str, tuple[list[tuple[str, bytes]], str]] = {
    "no image": ([("a.cls", b"1"), ("a.webp", b"x")], r"sample a: no image .* only \.cls, \.webp"),
    "no label": ([("a.jpg", jpeg(0))], "sample a: no label; wanted a .cls, or a .json with"),
    "empty label": ([("a.jpg", jpeg(0)), ("a.cls", b" ")], "'' in its .cls is neither"),
    "negative label": ([("a.jpg", jpeg(0)), ("a.cls", b"-1")], r"label -1 in its \.cls is outside"),
    "absurd label": ([("a.jpg", jpeg(0)), ("a.cls", b"9" * 19)], r"label 9+ in its \.cls is outside"),
    "endless label": ([("a.jpg", jpeg(0)), ("a.cls", b"9" * 5000)], "a .cls of 5000 bytes is no label"),
    "no JSON": ([("a.jpg", jpeg(0)), ("a.json", b"{")], "its .json cannot be read"),
    "deep JSON": ([("a.jpg", jpeg(0)), ("a.json", b"[" * 100_000)], "its .json cannot be read"),
    "JSON without": ([("a.jpg", jpeg(0)), ("a.json", b'{"label": true}')], "its .json has no label or cls"),
    "JSON list": ([("a.jpg", jpeg(0)), ("a.json", b"[1]")], "its .json has no label or cls"),
    "a member twice": ([("a.jpg", jpeg(0)), ("a.JPG", jpeg(1))], r"sample a: two members \.jpg"),
    "a pickle": ([("a.pyd", b"cos\nsystem\n(S'exit 1'\ntR."), ("a.cls", b"1")], r"no image .* \.cls, \.pyd"),
}


@pytest.mark.parametrize("name", BAD_SAMPLES)
def test_samples_that_cannot_be_used_are_named(tmp_path: Path, name: str) -> None:
    members, wanted = BAD_SAMPLES[name]
    path = tar_of(tmp_path / "x.tar", [("ok.cls", b"0"), ("ok.jpg", jpeg(3)), *members])
    with pytest.raises(ValueError, match=wanted) as caught:
        shards.open(path)
    assert str(path) in str(caught.value)


def test_grouping_is_webdatasets(tmp_path: Path) -> None:
    members = [
        ("README", b"no dot"),
        ("__meta__", b"{}"),
        ("d/a.jpg", jpeg(0)),
        ("d/a.cls", b"1"),
        ("d/a.seg.png", png(0)),
        ("e/a.cls", b"2"),
        ("e/a.jpg", jpeg(1)),
        ("é.b.cls", b"7"),
        ("é.cls", b"0"),
        ("é.jpg", jpeg(2)),
    ]
    path = tar_of(tmp_path / "x.tar", members)
    store = shards.open(path)
    assert ours(store) == webdataset_reads([path])
    assert [store.key(i) for i in range(3)] == ["d/a", "e/a", "é"]


def test_damaged_tars_are_refused_where_others_lose_samples(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    write_tars(folder, numbered(8), per_shard=8, mtime=0)
    (path,) = folder.glob("*.tar")
    good = path.read_bytes()
    with tarfile.open(path) as tar:
        header = tar.getmembers()[6].offset
    damaged = bytearray(good)
    damaged[header + 150] ^= 1
    path.write_bytes(damaged)
    assert len(webdataset_reads([path])) == 3, "webdataset drops the rest in silence"
    with pytest.raises(ValueError, match=rf"other-000000\.tar: the header at byte {header} is damaged"):
        shards.open(folder)
    path.write_bytes(good[: header + 1024 + 600])
    with pytest.raises(ValueError, match=r"other-000000\.tar: the header at byte .* claims .* cut off"):
        shards.open(folder)
    assert not list((folder / FOLDER).rglob("manifest.json"))


def test_paths_that_mean_nothing_usable(tmp_path: Path) -> None:
    write_tars(tmp_path / "set", numbered(3))
    (tmp_path / "x.zip").touch()
    (tmp_path / "mixed").mkdir()
    for name in ("a.tar", "b.beton"):
        (tmp_path / "mixed" / name).touch()
    for path, error, wanted in (
        ("set/other-{000000..000009}.tar", FileNotFoundError, r"other-000001\.tar: no such file \(from"),
        ("set/other-{0..99999999999}.tar", ValueError, "means 100000000000 files, more than"),
        ("set/other-{0..9.tar", ValueError, "braces without a partner"),
        ("set/other-{0}.tar", FileNotFoundError, "no such file, and no pattern"),
        ("set/other-{000000,000000}.tar", ValueError, "means the same file twice"),
        ("x.zip", ValueError, "a file, but neither .tar nor .beton"),
        ("mixed", ValueError, "holds 1 .tar and 1 .beton files"),
        ("mixed/{a.tar,b.beton}", ValueError, "means .tar and .beton files"),
        ("nothing", FileNotFoundError, "no such folder"),
    ):
        with pytest.raises(error, match=wanted):
            shards.open(tmp_path / path)
    (tmp_path / "set" / "other-000000.tar").rename(tmp_path / "set" / ".hidden.tar")
    with pytest.raises(ValueError, match="a name that a manifest cannot hold"):
        shards.open(tmp_path / "set" / ".hidden.tar")


def test_a_foreign_beton(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = [jpeg(i) for i in range(6)]
    path = tmp_path / "b" / "other.beton"
    path.parent.mkdir()
    with BetonWriter(path, tmp_path / "tmp", 6) as writer:
        for i, image in enumerate(data):
            # A size that is not the image's: what the file says is not believed.
            writer.add(
                Record(
                    f"k{i}", "jpeg", image, i % 4, 12, 9 + i % 5 + (i == 3), xxhash.xxh3_64_intdigest(image)
                )
            )
        shard = writer.finish()
    for where in (path, path.parent):
        store = shards.open(where)
        assert ours(store) == [(f"{i:08d}", image, i % 4) for i, image in enumerate(data)]
        assert store.height[3] == 9 + 3
        assert not store.fetch(range(6)).fault.any()
        assert store.header.shards == [shard]
    assert len([r for r in caplog.records if "indexing" in r.message]) == 1
    broken = path.read_bytes()
    path.write_bytes(broken[:-24])
    with pytest.raises(ValueError, match=r"other\.beton: the allocation table lists 5 records"):
        shards.open(path)


def test_a_beton_whose_records_overlap_is_refused_each_time(tmp_path: Path) -> None:
    path = tmp_path / "other.beton"
    with BetonWriter(path, tmp_path / "tmp", 2) as writer:
        for i in range(2):
            data = jpeg(i) + bytes(500)
            writer.add(Record(f"k{i}", "jpeg", data, 0, 12, 9, xxhash.xxh3_64_intdigest(data)))
        writer.finish()
    whole = bytearray(path.read_bytes())
    at = len(whole) - 2 * 24 + 16  # the first record's size in the allocation table
    whole[at : at + 8] = (int.from_bytes(whole[at : at + 8], "little") + 1).to_bytes(8, "little")
    path.write_bytes(whole)
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"other\.beton: row 1: the record overlaps another one; copy the"
        ):
            shards.open(path)


def test_a_store_opened_with_a_relative_class_file_travels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tar_of(tmp_path / "a.tar", [("1.jpg", jpeg(0)), ("1.cls", b"cat")])
    (tmp_path / "names").write_text("dog\ncat\n")
    monkeypatch.chdir(tmp_path)
    text = pickle.dumps(shards.open("a.tar", classes="names"))
    monkeypatch.chdir("/")
    with pickle.loads(text) as store:
        assert store.classes == ["dog", "cat"]


def test_many_shards_need_few_descriptors(tmp_path: Path) -> None:
    write_tars(tmp_path / "set", numbered(300), per_shard=1, mtime=0)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 60, hard))
    try:
        store = shards.open(tmp_path / "set", max_open_files=16)
        assert len(store.files) == 300
        ids = np.random.default_rng(0).permutation(300)
        for copy in (False, True):
            assert not store.fetch(ids, copy=copy).fault.any()
        assert all(len(store.read(i)) for i in range(300))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_mutated_tars_give_an_error_or_samples_inside(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    logging.disable(logging.WARNING)
    folder = tmp_path_factory.mktemp("mutant")
    path = tar_of(
        folder / "x.tar", [(f"{i}.{k}", d) for i in range(3) for k, d in (("cls", b"1"), ("jpg", jpeg(i)))]
    )
    whole = bytearray(path.read_bytes())
    headers = [
        at + b
        for at in range(0, len(whole), 512)
        if whole[at + 257 : at + 262] == b"ustar"
        for b in range(512)
    ]
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.sampled_from(headers))
        whole[place] = data.draw(st.sampled_from([0, 0xFF, 0x30, 0x37, 0x4C, 0x78, 0x80]))
        if data.draw(st.booleans()):  # a right checksum, so that what the header says is looked at
            at = place // 512 * 512
            block = whole[at : at + 512]
            block[148:156] = b" " * 8
            whole[at + 148 : at + 156] = b"%06o\0 " % sum(block)
    path.write_bytes(whole[: len(whole) - data.draw(st.sampled_from([0, 0, 0, 512, 1024, 9000]))])
    try:
        store = shards.open(path)
    except ValueError:
        pass
    else:
        assert (store.offset + store.length <= path.stat().st_size).all()
        store.fetch(range(len(store)))
    finally:
        logging.disable(logging.NOTSET)
    assert {p.name for p in folder.iterdir()} <= {"x.tar", FOLDER}


def test_json_index_of_a_stranger_cannot_point_elsewhere(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tars(tmp_path / "set", numbered(3))
    store = shards.open(tmp_path / "set")
    header = next((tmp_path / "set" / FOLDER).iterdir()) / "manifest.json"
    for name, said in (("/etc/passwd", "shards.0.name"), ("elsewhere.tar", "lists other shards than those")):
        text = json.loads(header.read_text())
        text["shards"][0]["name"] = name
        header.write_text(json.dumps(text))
        caplog.clear()
        assert ours(shards.open(tmp_path / "set")) == ours(store)
        assert said in caplog.text


def test_some_shards_of_a_set_keep_its_keys_and_classes(picture_shards: Path) -> None:
    whole = shards.open(picture_shards)
    second = range(40, 80)
    for path, ids in (
        ("pictures-000001.tar", second),
        ("pictures-{000002,000001}.tar", [*range(80, 90), *second]),
        ("pictures-{000000..000002}.tar", range(90)),
    ):
        some = shards.open(picture_shards / path)
        assert ours(some) == [ours(whole)[i] for i in ids]
        assert some.classes == whole.classes
        assert not some.fetch(range(len(some))).fault.any()
        assert ours(pickle.loads(pickle.dumps(some))) == ours(some)
    assert not (picture_shards / FOLDER).exists()
