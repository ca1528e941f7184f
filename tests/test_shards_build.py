"""The builder: exact bytes, the same bytes always, readable by others, and nothing lost or swallowed."""

from __future__ import annotations

import csv
import errno
import fcntl
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import shards
from shards import claim, target_tar
from shards.build import BuildOptions, BuildReport, build
from shards.keys import sample_key, unique_keys
from shards.target import Record

ROOT = Path(__file__).resolve().parent.parent


def encoded(
    kind: str = "JPEG", mode: str = "RGB", width: int = 24, height: int = 17, seed: int = 0, **options: Any
) -> bytes:
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def write_tree(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def plain_files(count: int = 12, classes: int = 3) -> dict[str, bytes]:
    return {f"c{i % classes}/c{i % classes}_{i}.JPEG": encoded(seed=i, width=20 + i) for i in range(count)}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "source", plain_files())


def run(source: Path, out: Path, **options: Any) -> BuildReport:
    options = {"name": "set", "samples_per_shard": 3, "workers": 1, **options}
    return build(BuildOptions(source=source, out=out, **options), progress=False)


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def contents(store: shards.Store) -> dict[str, tuple[str, bytes]]:
    return {store.key(i): (store.classes[store.label[i]], store.read(i).tobytes()) for i in range(len(store))}


def test_photographs_keep_every_byte(photos_dir: Path, tmp_path: Path) -> None:
    chosen = sorted(photos_dir.glob("*/*.JPEG"))[::10]
    assert len(chosen) == 100
    for path in chosen:
        (tmp_path / "source" / path.parent.name).mkdir(parents=True)
        (tmp_path / "source" / path.parent.name / path.name).symlink_to(path)
    report = run(tmp_path / "source", tmp_path / "out", name="photos", samples_per_shard=30)
    assert (report.samples, report.classes, report.shards) == (100, 100, 4)
    store = shards.open(tmp_path / "out")
    assert contents(store) == {p.stem: (p.parent.name, p.read_bytes()) for p in chosen}
    records = store.fetch(range(100))
    assert not records.fault.any()
    assert [r.tobytes() for r in records.data] == [p.read_bytes() for p in chosen]


def test_webdataset_reads_the_same_samples(source: Path, tmp_path: Path) -> None:
    (source / "c1" / "drawing.png").write_bytes(encoded("PNG", mode="RGBA"))
    run(source, tmp_path / "out")
    store = shards.open(tmp_path / "out")
    tars = [str(tmp_path / "out" / shard.name) for shard in store.header.shards]
    assert len(tars) == 5
    samples = list(webdataset.WebDataset(tars, shardshuffle=False, empty_check=False))
    assert [s["__key__"] for s in samples] == [store.key(i) for i in range(len(store))]
    assert [int(s["cls"]) for s in samples] == store.label.tolist()
    assert [s.get("jpg", s.get("png")) for s in samples] == [
        store.read(i).tobytes() for i in range(len(store))
    ]
    assert ["png" in s for s in samples] == [store.key(i) == "c1_drawing" for i in range(len(store))]


def test_dali_reads_the_same_samples_through_our_index(source: Path, tmp_path: Path) -> None:
    fn = pytest.importorskip("nvidia.dali.fn")
    from nvidia.dali import pipeline_def

    (source / "c1" / "drawing.png").write_bytes(encoded("PNG"))
    (source / "c2" / ("long" * 40 + ".jpg")).write_bytes(encoded(seed=99))
    (source / "c2" / "naïve 中文.v2.jpg").write_bytes(encoded(seed=98))
    run(source, tmp_path / "out", samples_per_shard=8)
    store = shards.open(tmp_path / "out")
    tars = [tmp_path / "out" / shard.name for shard in store.header.shards]

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def graph() -> Any:
        image, label = fn.readers.webdataset(
            paths=[str(tar) for tar in tars],
            index_paths=[str(tar.with_suffix(".idx")) for tar in tars],
            ext=["jpg;png", "cls"],
            missing_component_behavior="error",
        )
        return image, label

    pipe = graph()
    pipe.build()
    assert len(store) == 15
    for i in range(len(store)):
        image, label = pipe.run()
        assert np.array(image[0]).tobytes() == store.read(i).tobytes()
        assert int(np.array(label[0]).tobytes()) == store.label[i]


def test_index_is_the_one_dali_would_write(source: Path, tmp_path: Path) -> None:
    wds2idx = pytest.importorskip("wds2idx")
    run(source, tmp_path / "out")
    for tar in sorted((tmp_path / "out").glob("*.tar")):
        theirs = tmp_path / "theirs.idx"
        with wds2idx.IndexCreator(str(tar), str(theirs), verbose=False) as creator:
            creator.create_index()
        assert tar.with_suffix(".idx").read_text() == theirs.read_text()


def test_members_are_plain_and_without_time_or_owner(source: Path, tmp_path: Path) -> None:
    (source / "c0" / "élan.jpg").write_bytes(encoded())
    run(source, tmp_path / "out", samples_per_shard=5)
    with tarfile.open(tmp_path / "out" / "set-000000.tar") as tar:
        members = tar.getmembers()
    assert members[-1].name == "c0_élan.jpg"
    assert [m.offset for m in members[2:]] == [m.offset_data + 512 * -(-m.size // 512) for m in members[1:-1]]
    assert [m.name for m in members[:2]] == ["c0_0.cls", "c0_0.jpg"]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {
        (0, 0, 0, "vqsa", "vqsa", 0o444)
    }
    assert not any(m.pax_headers for m in members)


def test_the_bytes_do_not_depend_on_workers_or_runs(source: Path, tmp_path: Path) -> None:
    (source / "c0" / "broken.jpg").write_bytes(b"broken")
    for out, workers in (("one", 1), ("again", 1), ("three", 3)):
        report = run(source, tmp_path / out, workers=workers, on_error="skip")
        assert (report.shards, report.reused_shards, report.counts["rejected"]) == (5, 0, 1)
    assert digests(tmp_path / "one") == digests(tmp_path / "again") == digests(tmp_path / "three")
    assert sorted(digests(tmp_path / "one")) == sorted(
        [f"set-{k:06d}.{e}" for k in range(5) for e in ("tar", "idx")]
        + ["_info.json", "manifest.json", "manifest.table", "rejected.csv", "sizes.json"]
    )


def test_a_seed_shuffles_over_all_shards(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "sorted")
    run(source, tmp_path / "seven", seed=7)
    run(source, tmp_path / "seven again", seed=7, workers=2)
    run(source, tmp_path / "eight", seed=8)
    orders = {}
    for name in ("sorted", "seven", "eight"):
        store = shards.open(tmp_path / name)
        orders[name] = [store.key(i) for i in range(len(store))]
        assert contents(store) == contents(shards.open(tmp_path / "sorted"))
    assert orders["sorted"] == sorted(orders["sorted"])
    assert len({tuple(order) for order in orders.values()}) == 3
    assert digests(tmp_path / "seven") == digests(tmp_path / "seven again")
    # The order is part of the format: a change of it would make old and new builds differ.
    assert orders["seven"][:4] == ["c1_10", "c2_2", "c2_11", "c0_6"]


def test_bytes_per_shard_bounds_each_shard(source: Path, tmp_path: Path) -> None:
    sizes = [p.stat().st_size for p in sorted(source.glob("*/*"))]
    bound = max(sizes) * 2 + 10
    run(source, tmp_path / "out", samples_per_shard=None, bytes_per_shard=bound)
    store = shards.open(tmp_path / "out")
    at, groups = 0, []
    for shard in store.header.shards:
        groups.append(int(store.length[at : at + shard.samples].sum()))
        at += shard.samples
    assert len(groups) > 3
    assert max(groups) <= bound
    first = np.cumsum([shard.samples for shard in store.header.shards])[:-1]
    assert all(g + n > bound for g, n in zip(groups[:-1], store.length[first].tolist(), strict=True))
    assert contents(store).keys() == {p.stem for p in source.glob("*/*")}
    # An image larger than the bound still gets a shard.
    run(source, tmp_path / "tiny", samples_per_shard=None, bytes_per_shard=1)
    assert len(shards.open(tmp_path / "tiny").header.shards) == 12


def test_both_bounds_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="both samples_per_shard and bytes_per_shard"):
        run(source, tmp_path / "out", samples_per_shard=2, bytes_per_shard=2)


def test_a_finished_set_is_recognised_and_another_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(source, out).built
    before = digests(out)
    times = {p: p.stat().st_mtime_ns for p in out.iterdir()}
    report = run(source, out, workers=2)
    assert (report.built, report.samples, report.reused_shards) == (False, 12, 4)
    assert {p: p.stat().st_mtime_ns for p in out.iterdir()} == times
    for options, wanted in (
        ({"samples_per_shard": 4}, "samples_per_shard is 3, wanted 4"),
        ({"seed": 1}, "seed is None, wanted 1"),
        ({"name": "other"}, "name is 'set', wanted 'other'"),
        ({"validate": "decode"}, "validate is 'scan', wanted 'decode'"),
    ):
        with pytest.raises(ValueError, match=f"finished set of another build: {wanted}"):
            run(source, out, **options)
    (source / "c0" / "new.jpg").write_bytes(encoded())
    with pytest.raises(ValueError, match="images or classes in --source are others"):
        run(source, out)
    assert digests(out) == before
    (source / "c0" / "new.jpg").unlink()
    (out / "set-000001.tar").unlink()
    with pytest.raises(ValueError, match=r"set-000001\.tar: missing or of another size"):
        run(source, out)


def test_side_files_list_the_shards(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out", samples_per_shard=5)
    names = [f"set-{k:06d}.tar" for k in range(3)]
    assert json.loads((tmp_path / "out" / "sizes.json").read_text()) == dict(
        zip(names, (5, 5, 2), strict=True)
    )
    assert json.loads((tmp_path / "out" / "_info.json").read_text()) == {
        "splits": {
            "set": {
                "name": "set", "num_samples": 12, "filenames": names, "shard_lengths": [5, 5, 2], "alt_label": ""
            }
        }
    }  # fmt: skip


@pytest.mark.parametrize("damage", ["missing", "cut off", "overwritten"])
def test_one_shard_of_a_finished_set_is_written_again(source: Path, tmp_path: Path, damage: str) -> None:
    out = tmp_path / "out"
    run(source, out)
    before = digests(out)
    tar = out / "set-000002.tar"
    if damage == "missing":
        tar.unlink()
        tar.with_suffix(".idx").unlink()
        with pytest.raises(ValueError, match=r"set-000002\.tar: missing.*--only 2"):
            run(source, out)
    else:
        tar.write_bytes(tar.read_bytes()[:700] if damage == "cut off" else bytes(tar.stat().st_size))
    times = {p: p.stat().st_mtime_ns for p in out.glob("set-00000[013]*")}
    report = run(source, out, only=2)
    assert (report.built, report.shards, report.reused_shards) == (True, 4, 3)
    assert digests(out) == before
    assert {p: p.stat().st_mtime_ns for p in times} == times
    with pytest.raises(
        ValueError, match=r"--only 4 needs that shard of a finished set, and .* has shards 0\.\.3"
    ):
        run(source, out, only=4)
    with pytest.raises(ValueError, match=r"this folder has no manifest\.json"):
        run(source, tmp_path / "other", only=0)
    assert not (tmp_path / "other").exists()


def test_a_changed_source_does_not_replace_a_shard(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(source, out)
    before = digests(out)
    first = sorted(source.glob("c0/*"))[0]
    data = bytearray(first.read_bytes())
    data[-10] ^= 4  # same size, other content
    first.write_bytes(data)
    with pytest.raises(ValueError, match=r"set-000000\.tar: nothing was replaced"):
        run(source, out, only=0)
    assert digests(out) == before
    first.write_bytes(b"x" * len(data))
    with pytest.raises(ValueError, match="neither JPEG nor PNG"):
        run(source, out, only=0)
    assert digests(out) == before


def test_foreign_tars_are_not_overwritten(source: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "out" / "set-000000.tar"
    foreign.parent.mkdir()
    foreign.write_bytes(b"somebody's work")
    with pytest.raises(ValueError, match="not from an unfinished build of this tool"):
        run(source, tmp_path / "out")
    assert foreign.read_bytes() == b"somebody's work"


def test_dry_run_writes_nothing(source: Path, tmp_path: Path) -> None:
    report = run(source, tmp_path / "out", dry_run=True)
    assert (report.built, report.samples, report.shards, report.classes) == (False, 12, 4, 3)
    assert report.image_bytes == sum(p.stat().st_size for p in source.glob("*/*"))
    assert not (tmp_path / "out").exists()


# Bad input.


def test_missing_and_empty_sources(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        run(tmp_path / "nowhere", tmp_path / "out")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"wanted one folder per class \(<class>/<image>\), found nothing"):
        run(empty, tmp_path / "out")
    (empty / "a.jpg").write_bytes(encoded())
    with pytest.raises(ValueError, match="found 1 files and no folders"):
        run(empty, tmp_path / "out")
    with pytest.raises(ValueError, match="a file; --source must be a folder"):
        run(empty / "a.jpg", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_class_without_images_is_named(source: Path, tmp_path: Path) -> None:
    (source / "c9").mkdir()
    (source / "c9" / "notes.txt").write_text("soon")
    with pytest.raises(ValueError, match="c9: a class folder without images"):
        run(source, tmp_path / "out")


def test_output_inside_the_source_is_refused(source: Path) -> None:
    with pytest.raises(ValueError, match="where it would be a class"):
        run(source, source / "out")


@pytest.mark.parametrize("name", ["../up", "", ".hidden", "a/b", "a b"])
def test_names_that_would_leave_the_folder_are_refused(source: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        run(source, tmp_path / "out", name=name)


def test_links_in_a_circle_are_refused(source: Path, tmp_path: Path) -> None:
    (source / "c0" / "again").symlink_to(source / "c0")
    with pytest.raises(ValueError, match="leads back into a folder above"):
        run(source, tmp_path / "out")


GOOD = encoded(width=90, height=70)
DAMAGED: dict[str, tuple[bytes, str]] = {
    "truncated.JPEG": (GOOD[: len(GOOD) // 2], "truncated"),
    "zero.JPEG": (b"", "zero bytes"),
    "text.jpg": (b"404 not found", "neither JPEG nor PNG"),
    "image.gif": (b"GIF89a" + bytes(20), "neither JPEG nor PNG"),
}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_damaged_image_stops_and_is_named_and_what_is_finished_stays(
    source: Path, tmp_path: Path, workers: int
) -> None:
    out = tmp_path / "out"
    bad = source / "c1" / "c1_z.jpg"  # in the third of five shards
    worse = source / "c2" / "c2_z.jpg"
    bad.write_bytes(DAMAGED["truncated.JPEG"][0])
    worse.write_bytes(b"")
    message = rf"{bad}: truncated.*Finished shards are kept.*--on-error skip"
    with pytest.raises(ValueError, match=message):
        run(source, out, workers=workers)
    assert not list(out.rglob("*.tmp"))
    kept = {p: p.stat().st_mtime_ns for p in out.glob("*.tar")}
    assert {"set-000000.tar", "set-000001.tar"} <= {p.name for p in kept}
    with pytest.raises(FileNotFoundError, match="not a finished shard set; if a build was interrupted"):
        shards.open(out)
    with pytest.raises(ValueError, match="unfinished build with other options"):
        run(source, out, samples_per_shard=5)

    bad.write_bytes(GOOD)
    worse.unlink()
    report = run(source, out, workers=workers)
    assert report.reused_shards >= 2
    assert all(p.stat().st_mtime_ns == kept[p] for p in (out / "set-000000.tar", out / "set-000001.tar")), (
        "finished shards are not redone"
    )
    run(source, tmp_path / "straight")
    assert digests(out) == digests(tmp_path / "straight")


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


def test_a_full_disk_leaves_no_partial_shard_and_the_build_goes_on_later(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    room = 25_000  # bytes: two of the four shards, and a bit
    written = 0
    write = target_tar.HashingFile.write

    def limited(self: target_tar.HashingFile, data: bytes) -> int:
        nonlocal written
        written += len(data)
        if written > room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, data)

    monkeypatch.setattr(target_tar.HashingFile, "write", limited)
    with pytest.raises(OSError, match=r"no space left in .*Finished shards are kept: make room") as caught:
        run(source, out)
    assert caught.value.errno == errno.ENOSPC
    finished = sorted(p.name for p in out.glob("*.tar"))
    assert 1 <= len(finished) < 4
    for name in finished:
        with tarfile.open(out / name) as tar:
            assert len(tar.getnames()) == 6
    assert not list(out.rglob("*.tmp"))
    monkeypatch.undo()
    assert run(source, out).reused_shards == len(finished)
    run(source, tmp_path / "straight")
    assert digests(out) == digests(tmp_path / "straight")


def test_a_truly_full_file_system(tmp_path: Path) -> None:
    # /dev/full answers every write as a full disk does.
    (tmp_path / "temporary").symlink_to("/dev/full")

    def write_one() -> None:
        with target_tar.TarShardWriter(tmp_path / "a.tar", tmp_path / "temporary") as writer:
            writer.add(Record("key", "jpeg", GOOD * 1000, 0, 90, 70))
            writer.finish()

    with pytest.raises(OSError, match="No space left"):
        write_one()
    assert list(tmp_path.iterdir()) == []


def test_two_builders_refuse_each_other(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    seen: list[str] = []
    write = target_tar.TarShardWriter.finish

    def second_builder(self: target_tar.TarShardWriter) -> Any:
        with pytest.raises(ValueError, match=r"another builder is writing here \(process \d+ on ") as caught:
            run(source, out)
        seen.append(str(caught.value))
        return write(self)

    patch = pytest.MonkeyPatch()
    patch.setattr(target_tar.TarShardWriter, "finish", second_builder)
    try:
        run(source, out)
    finally:
        patch.undo()
    assert len(seen) == 4
    assert f"process {os.getpid()}" in seen[0]
    assert len(shards.open(out)) == 12


def test_an_image_touched_between_runs_is_read_again(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    bad = source / "c2" / "zzz.jpg"
    bad.write_bytes(b"bad")
    with pytest.raises(ValueError, match="neither JPEG nor PNG"):
        run(source, out)
    first = sorted(source.glob("c0/*"))[0]
    data = bytearray(first.read_bytes())
    data[-10] ^= 4  # same size, other content
    first.write_bytes(data)
    os.utime(first, ns=(1, 1))
    bad.unlink()
    assert run(source, out).reused_shards == 3
    assert contents(shards.open(out))[first.stem][1] == bytes(data)


def test_shards_of_a_longer_plan_are_removed(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_tree(source, {"c9/1.jpg": GOOD, "c9/2.jpg": GOOD, "c9/3.jpg": GOOD, "c9/4.jpg": b"bad"})
    with pytest.raises(ValueError, match=r"c9/4\.jpg"):
        run(source, out)
    assert len(list(out.glob("*.tar"))) == 5
    for path in (source / "c9").iterdir():
        path.unlink()
    (source / "c9").rmdir()
    run(source, out)
    assert [p.name for p in sorted(out.glob("*.tar"))] == [f"set-{k:06d}.tar" for k in range(4)]
    assert len(list(out.glob("*.idx"))) == 4


def test_what_a_killed_build_leaves_behind_is_removed(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    bad = source / "c2" / "zzz.jpg"
    bad.write_bytes(b"bad")
    with pytest.raises(ValueError, match="neither JPEG nor PNG"):
        run(source, out)
    bad.unlink()
    for name in ("set-000003.tar.77.tmp", ".set-000002.tar.part.77.tmp", "../.set-000003.idx.77.tmp"):
        (out / ".build" / name).write_bytes(b"half")
    (out / ".build" / "set-000001.tar.part").write_bytes(b"{}\nnot a table")
    assert run(source, out).reused_shards == 3
    run(source, tmp_path / "straight")
    assert digests(out) == digests(tmp_path / "straight")

    # Killed after the manifest was written, before the last tidying.
    (out / ".build").mkdir()
    (out / ".build" / "set-000000.tar.part").write_bytes(b"")
    assert not run(source, out).built
    assert digests(out) == digests(tmp_path / "straight")


def test_workers_of_a_killed_builder_are_waited_for(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "out" / ".build"
    work.mkdir(parents=True)
    fd = os.open(work / "workers", os.O_RDWR | os.O_CREAT)
    fcntl.flock(fd, fcntl.LOCK_SH)
    monkeypatch.setattr(claim, "_ORPHAN_TIMEOUT_S", 0.05)
    with pytest.raises(ValueError, match="worker processes of an earlier builder are still writing"):
        run(source, tmp_path / "out")
    os.close(fd)
    assert run(source, tmp_path / "out").built


def test_a_killed_parallel_build_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "source", plain_files(60))
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "tools" / "build_shards.py"), "--source", str(source)]
    command += ["--out", str(out), "--name", "set", "--samples-per-shard", "3", "--workers", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    until = time.monotonic() + 60
    while len(list(out.glob("*.tar"))) < 2 and time.monotonic() < until and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()  # ends when the orphaned workers have let go of the pipes
    run(source, out)
    run(source, tmp_path / "straight")
    assert digests(out) == digests(tmp_path / "straight")


def command_line(*arguments: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "build_shards.py"), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


def test_the_command_line(source: Path, tmp_path: Path) -> None:
    arguments = ("--source", str(source), "--out", str(tmp_path / "out"), "--name", "set", "--workers", "1")
    code, out, err = command_line(*arguments)
    assert code == 0, err
    assert "12 images of 3 classes" in out
    assert "img/s" in err
    assert "MB/s" in err
    assert len(shards.open(tmp_path / "out")) == 12
    code, out, _ = command_line(*arguments)
    assert code == 0
    assert out.startswith("nothing to do")
    code, _, err = command_line("--source", str(tmp_path / "none"), *arguments[2:])
    assert code == 1
    assert err.startswith("error: ")
    assert "Traceback" not in err


# Keys.


@pytest.mark.parametrize(
    ("class_name", "path", "key"),
    [
        ("n01440764", "n01440764_18.JPEG", "n01440764_18"),
        ("n01440764", "ILSVRC2012_val_00000293.JPEG", "n01440764_ILSVRC2012_val_00000293"),
        ("cats", "my.best cat.v2.jpg", "cats_my_best_cat_v2"),
        ("cats", "images/1.jpg", "cats_images_1"),
        ("chats", "été.jpg", "chats_été"),
        ("chats", "e\u0301te\u0301.jpg", "chats_été"),
        ("a/b", "x.jpg", "a_b_x"),
    ],
)
def test_keys(class_name: str, path: str, key: str) -> None:
    assert sample_key(class_name, path) == key


def test_equal_keys_are_told_apart_in_order() -> None:
    names = ["a.jpg", "a.png", "a-2.jpg", "a.webp", "a b.jpg", "a_b.jpg"]
    keys = ["c_a", "c_a-2", "c_a-2-2", "c_a-3", "c_a_b", "c_a_b-2"]
    assert unique_keys(sample_key("c", name) for name in names) == keys


NAMES = st.text(
    st.characters(blacklist_categories=("Cs", "Cc"), blacklist_characters="/"), min_size=1, max_size=60
).filter(lambda name: not name.startswith(".") and len(name.encode()) < 240)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "b.c", "ключ"]), NAMES, st.integers(0, 40), st.integers(0, 200_000)),
        min_size=1,
        max_size=12,
        unique_by=lambda f: (f[0], f[1]),
    )
)
def test_any_files_come_back(files: list[tuple[str, str, int, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        wanted: dict[str, list[bytes]] = {}
        for class_name, name, width, tail in files:
            # Bytes after the end marker are tolerated, which makes files of any size; width 0 is damaged.
            data = encoded(width=width, height=3) + bytes(tail) if width else b""
            write_tree(root / "source", {f"{class_name}/{name}.jpg": data})
            if data:
                wanted.setdefault(class_name, []).append(data)
        if not wanted:
            with pytest.raises(ValueError, match="images are damaged"):
                run(root / "source", root / "out", on_error="skip")
            return
        report = run(root / "source", root / "out", on_error="skip")
        assert report.samples + report.counts["rejected"] == len(files)
        store = shards.open(root / "out")
        found: dict[str, list[bytes]] = {}
        for class_name, data in contents(store).values():
            found.setdefault(class_name, []).append(data)
        assert {c: sorted(d) for c, d in found.items()} == {c: sorted(d) for c, d in wanted.items()}
        tars = [str(root / "out" / s.name) for s in store.header.shards if s.samples]
        samples = list(webdataset.WebDataset(tars, shardshuffle=False, empty_check=False))
        assert [(s["__key__"], s["jpg"]) for s in samples] == [
            (store.key(i), store.read(i).tobytes()) for i in range(len(store))
        ]
