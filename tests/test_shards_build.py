"""The builder: exact bytes, the same bytes always, readable by others, whatever the files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from building import contents, digests, encoded, plain_files, run, write_tree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import shards
from shards.keys import sample_key

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "source", plain_files())


@pytest.mark.parametrize("target", ["tar", "beton"])
def test_photographs_keep_every_byte(photos_dir: Path, tmp_path: Path, target: str) -> None:
    files = sorted(photos_dir.glob("*/*.JPEG"))
    assert len(files) == 1000
    bounds = {"samples_per_shard": 300 if target == "tar" else None}
    report = run(photos_dir, tmp_path / "out", target=target, **bounds)
    assert (report.samples, report.classes, report.shards) == (1000, 1000, 4 if target == "tar" else 1)
    assert report.counts.get("encoded", 0) == 0
    store = shards.open(tmp_path / "out")
    records = store.fetch(range(1000))
    assert not records.fault.any()
    for i, path in enumerate(files):
        data = path.read_bytes()
        assert store.key(i) == sample_key(path.parent.name, path.name)
        assert store.classes[store.label[i]] == path.parent.name
        assert store.read(i).tobytes() == data
        assert records.data[i].tobytes() == data


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


def test_names_are_utf8_in_every_locale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_tree(tmp_path / "source", {"é/ü.jpg": encoded()})
    run(source, tmp_path / "utf8")
    monkeypatch.setattr(tarfile.TarFile, "encoding", "latin-1")
    run(source, tmp_path / "latin1")
    assert digests(tmp_path / "latin1") == digests(tmp_path / "utf8")


def test_dry_run_writes_nothing(source: Path, tmp_path: Path) -> None:
    report = run(source, tmp_path / "out", dry_run=True)
    assert (report.built, report.samples, report.shards, report.classes) == (False, 12, 4, 3)
    assert report.image_bytes == sum(p.stat().st_size for p in source.glob("*/*"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../up", "", ".hidden", "a/b", "a b"])
def test_names_that_would_leave_the_folder_are_refused(source: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        run(source, tmp_path / "out", name=name)


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


NAMES = st.text(
    st.characters(blacklist_categories=("Cs", "Cc"), blacklist_characters="/"), min_size=1, max_size=60
).filter(lambda name: not name.startswith(".") and len(name.encode()) < 240)


CLASSES = ["a", "b.c", "ключ", "long" * 30]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.tuples(
            st.sampled_from(CLASSES), NAMES, st.sampled_from([".jpg", ".JPEG", ".png"]), st.integers(0, 40)
        ),
        min_size=1,
        max_size=12,
        unique_by=lambda f: f[:3],
    ),
    st.sampled_from([0, 0, 0, 1, 511, 70_000, 3_000_000]),
    st.sampled_from(["tar", "beton"]),
    st.one_of(st.none(), st.integers(0, 2**64 - 1)),
)
def test_any_files_come_back(
    files: list[tuple[str, str, str, int]], tail: int, target: str, seed: int | None
) -> None:
    """Names of any script, blanks and dots, keys over 100 characters or equal, sizes from 0 to several MB."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        wanted: dict[str, list[bytes]] = {}
        for class_name, name, extension, width in files:
            # Bytes after the end marker are tolerated, which makes files of any size; width 0 is damaged.
            data = encoded(width=width, height=3) + bytes(tail) if width else b""
            write_tree(root / "source", {f"{class_name}/{name}{extension}": data})
            if data:
                wanted.setdefault(class_name, []).append(data)
        how = {"on_error": "skip", "target": target, "seed": seed}
        if not wanted:
            with pytest.raises(ValueError, match="images are damaged"):
                run(root / "source", root / "out", **how)
            return
        report = run(root / "source", root / "out", **how)
        assert report.samples + report.counts["rejected"] == len(files)
        store = shards.open(root / "out")
        stored = [
            (store.key(i), store.classes[store.label[i]], store.read(i).tobytes()) for i in range(len(store))
        ]
        found: dict[str, list[bytes]] = {}
        for _, class_name, data in stored:
            found.setdefault(class_name, []).append(data)
        assert {c: sorted(d) for c, d in found.items()} == {c: sorted(d) for c, d in wanted.items()}
        keys = [key for key, _, _ in stored]
        assert len(set(keys)) == len(keys)
        assert all(0 < len(key.encode()) <= 90 and not set(key) & set("./ \n") for key in keys)
        if target == "tar":
            tars = [str(root / "out" / s.name) for s in store.header.shards if s.samples]
            samples = list(webdataset.WebDataset(tars, shardshuffle=False, empty_check=False))
            assert [(s["__key__"], s["jpg"]) for s in samples] == [(key, data) for key, _, data in stored]
