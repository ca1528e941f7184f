"""The builder under damage: nothing that was finished is lost, nothing half-written has a final name."""

from __future__ import annotations

import errno
import fcntl
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
from building import DAMAGED, GOOD, contents, digests, plain_files, run, write_tree

import shards
from shards import claim, plan, target_beton, target_tar
from shards.target import Record
from shards.verify import verify

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "source", plain_files())


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


def test_several_lost_shards_are_written_again_one_by_one(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(source, out)
    before = digests(out)
    for number in (1, 3):
        (out / f"set-{number:06d}.tar").unlink()
    run(source, out, only=3)
    run(source, out, only=1)
    assert digests(out) == before


def test_side_files_of_a_finished_set_are_written_again(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(source, out)
    before = digests(out)
    (out / "_info.json").unlink()
    (out / "sizes.json").write_text("{}")
    assert {fault.remedy for fault in verify(out).faults} == {
        "copy it again, or run the build command again, which writes it"
    }
    assert run(source, out).built
    assert digests(out) == before
    assert not run(source, out).built


@pytest.mark.parametrize("name", ["manifest.json", "manifest.table"])
def test_a_damaged_manifest_is_not_taken_for_a_finished_set(source: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    run(source, out)
    (out / name).write_bytes((out / name).read_bytes()[:-100])
    message = rf"{name}: .* again.*To build the set again, delete the folder or give another --out"
    with pytest.raises(ValueError, match=message):
        run(source, out)


def test_only_what_the_builder_named_is_removed(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    extra = source / "c0" / "z.jpg"
    extra.write_bytes(b"")
    with pytest.raises(ValueError, match="zero bytes"):
        run(source, out)
    extra.unlink()
    stale, notes = out / "set-000009.tar", out / "set-notes.tar"
    stale.write_bytes(b"of a larger plan")
    notes.write_bytes(b"somebody's")
    run(source, out)
    assert not stale.exists()
    assert notes.read_bytes() == b"somebody's"
    assert verify(out).faults == []


def test_a_dry_run_says_what_the_build_would_say(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(source, out)
    assert run(source, out, dry_run=True).reused_shards == 4
    with pytest.raises(ValueError, match="holds a finished set of another build: samples_per_shard is 3"):
        run(source, out, dry_run=True, samples_per_shard=5)


def test_foreign_tars_are_not_overwritten(source: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "out" / "set-000000.tar"
    foreign.parent.mkdir()
    foreign.write_bytes(b"somebody's work")
    with pytest.raises(ValueError, match="not from an unfinished build of this tool"):
        run(source, tmp_path / "out")
    assert foreign.read_bytes() == b"somebody's work"


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
            writer.add(Record("key", "jpeg", GOOD * 1000, 0, 90, 70, 0))
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


def test_a_lost_beton_is_built_again_as_a_whole(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    how = {"target": "beton", "samples_per_shard": None}
    run(source, out, **how)
    before = digests(out)
    (out / "set.beton").unlink()
    with pytest.raises(
        ValueError, match=r"set\.beton: missing or of another size .* delete manifest\.json and the file"
    ):
        run(source, out, **how)
    with pytest.raises(ValueError, match=r"the set is one file, and --only is for one of several"):
        run(source, out, only=0, **how)
    (out / "manifest.json").unlink()
    run(source, out, **how)
    assert digests(out) == before
    # Several .beton files are shards like others.
    run(source, tmp_path / "several", target="beton")
    before = digests(tmp_path / "several")
    (tmp_path / "several" / "set-000001.beton").write_bytes(b"")
    assert run(source, tmp_path / "several", target="beton", only=1).reused_shards == 3
    assert digests(tmp_path / "several") == before


def stop_join_after(count: int, patch: pytest.MonkeyPatch) -> None:
    copy, calls = target_beton._copy_piece, iter(range(100))

    def stopping(*arguments: Any) -> None:
        if next(calls) == count:
            raise OSError(errno.EIO, "stopped here")
        copy(*arguments)

    patch.setattr(target_beton, "_copy_piece", stopping)


@pytest.mark.parametrize("touched", [None, "first", "last"])
def test_a_stopped_join_goes_on_or_begins_anew(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, touched: str | None
) -> None:
    out = tmp_path / "out"
    how = {"target": "beton", "samples_per_shard": None}
    monkeypatch.setattr(plan, "_BYTES_PER_PIECE", 3000)
    with monkeypatch.context() as patch:
        stop_join_after(2, patch)
        with pytest.raises(OSError, match="stopped here"):
            run(source, out, **how)
    assert len(list((out / ".build").glob("*.joined"))) == 2
    assert not (out / "set.beton").exists()
    paths = sorted(source.glob("*/*"))
    if touched:
        path = paths[0 if touched == "first" else -1]
        data = bytearray(path.read_bytes())
        data[-10] ^= 4  # same size, other content
        path.write_bytes(data)
        os.utime(path, ns=(1, 1))
    report = run(source, out, **how)
    # Where nothing was touched no piece is written again, also not those that were joined and removed.
    assert report.shards - report.reused_shards == {None: 0, "first": 2, "last": 3}[touched]
    run(source, tmp_path / "straight", **how)
    assert digests(out) == digests(tmp_path / "straight")


def test_a_beton_that_has_its_name_but_no_manifest_yet_is_not_lost(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    how = {"target": "beton", "samples_per_shard": None}

    def stop(*arguments: Any) -> None:
        raise OSError(errno.EIO, "stopped here")

    with monkeypatch.context() as patch:
        patch.setattr("shards.build.write_manifest", stop)
        with pytest.raises(OSError, match="stopped here"):
            run(source, out, **how)
    assert (out / "set.beton").is_file()
    report = run(source, out, **how)
    assert report.reused_shards == report.shards == 1
    run(source, tmp_path / "straight", **how)
    assert digests(out) == digests(tmp_path / "straight")
