"""The tar walk: what tarfile finds in sound archives, and an error where tarfile would say nothing."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.tar_index import Member, members

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def make_tar(
    files: dict[str, bytes],
    form: int = tarfile.USTAR_FORMAT,
    change: Callable[[tarfile.TarInfo], None] | None = None,
) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if change:
                change(info)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def walk(data: bytes, begin: int = 0, end: int | None = None) -> list[Member]:
    fd = os.memfd_create("tar")
    try:
        os.write(fd, data)
        return list(members(fd, begin, len(data) if end is None else end, "a.tar"))
    finally:
        os.close(fd)


FILES = {"a/1.jpg": b"x" * 700, "a/empty.jpg": b"", "été/2.jpg": b"y" * 512, "./b": b"z"}


@pytest.mark.parametrize("form", FORMATS)
def test_finds_what_tarfile_finds(form: int) -> None:
    files = dict(FILES)
    if form != tarfile.USTAR_FORMAT:
        files["long/" + "name" * 70 + ".jpg"] = b"long"
        files["中" * 60] = b"longer in bytes"
    else:
        files["p" * 90 + "/" + "n" * 90] = b"prefix"
    data = make_tar(files, form)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        wanted = [Member(m.name, m.offset_data, m.size) for m in tar.getmembers()]
    found = walk(data)
    assert [(m.name, m.size) for m in found] == [(n, len(d)) for n, d in files.items()]
    assert found == wanted
    assert [data[m.offset : m.offset + m.size] for m in found] == list(files.values())


def test_pax_times_and_folders_are_passed_over() -> None:
    def with_time(info: tarfile.TarInfo) -> None:
        info.mtime = 1.5

    data = make_tar(FILES, tarfile.PAX_FORMAT, with_time)
    assert data.count(b"mtime=1.5") == len(FILES)
    assert [m.name for m in walk(data)] == list(FILES)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        folder = tarfile.TarInfo("a")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        tar.addfile(tarfile.TarInfo("a/1.jpg"))
    assert [m.name for m in walk(out.getvalue())] == ["a/1.jpg"]


def test_a_tar_in_a_tar_is_a_range() -> None:
    inner = make_tar(FILES)
    outer = make_tar({"n01.tar": inner, "n02.tar": b""})
    held, _ = walk(outer)
    nested = walk(outer, held.offset, held.offset + held.size)
    assert [outer[m.offset : m.offset + m.size] for m in nested] == list(FILES.values())
    with pytest.raises(ValueError, match="cut off: byte 0 should begin a header"):
        walk(outer, held.offset, held.offset)


def test_a_size_beyond_eight_gib_in_binary_and_in_pax() -> None:
    out = io.BytesIO()
    info = tarfile.TarInfo("big")
    info.size = 9 << 30
    for form, claim in ((tarfile.GNU_FORMAT, "big"), (tarfile.PAX_FORMAT, "big")):
        data = info.tobuf(form) + bytes(1024)
        with pytest.raises(ValueError, match=rf"\('{claim}'\) claims {9 << 30} bytes, only 1024 are left"):
            walk(data)
    assert not out.getvalue()


def resum(header: bytes) -> bytes:
    clean = header[:148] + b" " * 8 + header[156:512]
    return clean[:148] + b"%06o\0 " % sum(clean) + clean[156:]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: d[:1536] + b"?" + d[1537:], "a.tar: the header at byte 1536 is damaged or none"),
        (lambda d: d[:1536], "a.tar: cut off: byte 1536 should begin a header"),
        (lambda d: d[:900], "claims 700 bytes, only 388 are left"),
        (lambda d: d[:4096], None),
        (lambda d: d[:3072], "512 bytes follow an empty block"),
        (lambda d: resum(d[:124] + b"77777777777\0" + d[136:512]) + d[512:], "claims 8589934591 bytes"),
        (lambda d: resum(d[:124] + b"notanumber\0\0" + d[136:512]) + d[512:], "has no number for a size"),
        (lambda d: resum(d[:124] + b"\xff" * 12 + d[136:512]) + d[512:], "an impossible size"),
        (lambda d: resum(d[:156] + b"2" + d[157:512]) + d[512:], r"\('a'\) is a symbolic link"),
        (lambda d: resum(d[:156] + b"S" + d[157:512]) + d[512:], r"\('a'\) is a sparse file"),
        (lambda d: resum(d[:156] + b"3" + d[157:512]) + d[512:], r"\('a'\) is of type b'3'"),
        (lambda d: d + d, "several tars in one file"),
        (lambda d: d + bytes(2 << 20), "bytes follow an empty block"),
        (lambda d: b"", "cut off: byte 0"),
        (lambda d: b"<html>" * 200, "the header at byte 0 is damaged or none"),
    ],
)  # fmt: skip
def test_damage_is_an_error(damage: Callable[[bytes], bytes], message: str | None) -> None:
    whole = make_tar({"a": b"x" * 700, "b": b"y" * 10})
    assert len(whole) == 10240
    if message is None:  # without the padding to a record it is still a tar
        assert len(walk(damage(whole))) == 2
        return
    with pytest.raises(ValueError, match=message):
        walk(damage(whole))


def test_absurd_extended_headers_are_refused() -> None:
    info = tarfile.TarInfo("a")
    pax = tarfile.TarInfo("x")
    pax.type, pax.size = tarfile.XHDTYPE, 2 << 20
    with pytest.raises(ValueError, match="an extended one of 2097152 bytes, at most"):
        walk(pax.tobuf() + bytes(3 << 20))
    for text in (b"99 path=b\n", b"9 path=bc", b"x path=b\n", b"8 pathb\n"):
        pax.size = len(text)
        with pytest.raises(ValueError, match="an extended one that is damaged"):
            walk(pax.tobuf() + text.ljust(512, b"\0") + info.tobuf() + bytes(1024))
    text = b"22 size=1000000000000\n"
    pax.size = len(text)
    with pytest.raises(ValueError, match="claims 1000000000000 bytes, only 1024 are left"):
        walk(pax.tobuf() + text.ljust(512, b"\0") + info.tobuf() + bytes(1024))
    text = b"16 size=1_000_0\n"
    pax.size = len(text)
    with pytest.raises(ValueError, match="no number for a size"):
        walk(pax.tobuf() + text.ljust(512, b"\0") + info.tobuf() + bytes(1024))


SAMPLE = make_tar({"a/" + "n" * 120: b"x" * 600, "b.cls": b"1"}, tarfile.PAX_FORMAT)[:5120]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, len(SAMPLE) - 1), st.integers(0, 255)), max_size=4),
    st.integers(0, 5120),
)
def test_damage_never_does_anything_else(flips: list[tuple[int, int]], size: int) -> None:
    data = bytearray(SAMPLE)
    for at, value in flips:
        data[at] = value
    del data[size:]
    try:
        found = walk(bytes(data))
    except ValueError:
        return
    assert all(0 <= m.offset <= m.offset + m.size <= len(data) for m in found)
    assert len(found) == 2 or flips


def test_a_file_that_shrinks_meanwhile_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(make_tar(FILES))
    fd = os.open(path, os.O_RDONLY)
    try:
        with pytest.raises(ValueError, match="cut off"):
            list(members(fd, 0, 1 << 30, "a.tar"))
    finally:
        os.close(fd)
