"""The real ffcv reads our .beton files, and we read what its DatasetWriter writes.

ffcv lives in an environment of its own: tests/install_ffcv.sh makes it, VQSA_FFCV_PYTHON may name another.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import shards
from shards.build import BuildOptions, build
from shards.verify import verify

PEER = Path(__file__).with_name("ffcv_peer.py")
SIDE = 48
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ffcv_results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what ffcv read of ours and wrote itself; one process, since importing ffcv takes seconds."""
    python = os.environ.get("VQSA_FFCV_PYTHON") or str(ROOT / ".venv-ffcv" / "bin" / "python")
    if not Path(python).exists():
        pytest.skip("ffcv is not here: tests/install_ffcv.sh installs it")
    root = tmp_path_factory.mktemp("ffcv")
    write_sources(root / "images", 40, padding=600_000)
    build(
        BuildOptions(root / "images", root / "set", "ours", target="beton", seed=3, workers=2), progress=False
    )
    write_noise(root / "noise", 30)
    write_noise(root / "few", 3)
    jobs = [
        ["read", str(root / "set" / "ours.beton"), str(root / "ours.npz"), SIDE],
        ["write", str(root / "noise"), str(root / "theirs.beton"), "jpg", 2, 1 << 21],
        ["read", str(root / "theirs.beton"), str(root / "theirs.npz"), 0],
        ["write", str(root / "few"), str(root / "raw.beton"), "raw", 1, 1 << 21],
    ]
    ran = subprocess.run(
        [python, str(PEER), json.dumps(jobs)],
        capture_output=True,
        text=True,
        timeout=400,  # ffcv's writer hangs for ever where a sample raises
        cwd=PEER.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr[-3000:]
    return root


def write_sources(root: Path, count: int, *, padding: int) -> None:
    """JPEGs of one size (ffcv's Loader then gives their pixels as decoded) in class folders."""
    rng = np.random.default_rng(0)
    for i in range(count):
        smooth = rng.integers(0, 256, (7, 7, 3), dtype=np.uint8)
        out = io.BytesIO()
        Image.fromarray(smooth).resize((SIDE, SIDE)).convert("L" if i % 7 == 3 else "RGB").save(out, "JPEG")
        path = root / f"class{i % 4}" / f"{i:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        # Bytes after the end marker are part of the file; they make pages fill up with few samples.
        path.write_bytes(out.getvalue() + bytes(padding))


def write_noise(folder: Path, count: int) -> None:
    """PNGs `<label>_<number>` that are large as JPEGs, so that a page of 2 MiB holds a few."""
    folder.mkdir()
    rng = np.random.default_rng(1)
    for i in range(count):
        noise = rng.integers(0, 256, (240 + i, 250, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{rng.integers(5)}_{i:03d}.png")


def pixels_of(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def test_ffcv_reads_ours(ffcv_results: Path) -> None:
    path = ffcv_results / "set" / "ours.beton"
    assert path.stat().st_size > 3 * (8 << 20), "several pages"
    found = np.load(ffcv_results / "ours.npz")
    store = shards.open(path)
    names = [store.key(i).partition("_") for i in range(len(store))]
    wanted = [(ffcv_results / "images" / name[0] / f"{name[2]}.jpg").read_bytes() for name in names]
    assert len(wanted) == 40
    assert found["length"].tolist() == [len(data) for data in wanted]
    assert found["data"].tobytes() == b"".join(wanted)
    assert [store.read(i).tobytes() for i in range(40)] == wanted
    for column in ("stored_label", "os_label", "process_label"):
        assert found[column].tolist() == store.label.tolist()
        assert [f"class{label}" for label in found[column]] == [name[0] for name in names]
    for cache in ("os", "process"):
        for pixels, data in zip(found[f"{cache}_pixels"], wanted, strict=True):
            # Another build of libjpeg-turbo, with the fast transform; neighbouring images differ by far more.
            assert np.abs(pixels.astype(int) - pixels_of(data)).mean() < 3


def test_we_read_ffcvs(ffcv_results: Path, tmp_path: Path) -> None:
    path = ffcv_results / "theirs.beton"
    found = np.load(ffcv_results / "theirs.npz")
    sources = sorted((ffcv_results / "noise").iterdir())  # ffcv's order here
    store = shards.open(path)
    assert store.label.tolist() == found["stored_label"].tolist() == [int(p.name[0]) for p in sources]
    records = store.fetch(range(30))
    assert not records.fault.any()
    assert b"".join(data.tobytes() for data in records.data) == found["data"].tobytes()
    for i, source in enumerate(sources):
        with Image.open(source) as image:
            assert image.size == (store.width[i], store.height[i])
            seen = pixels_of(records.data[i].tobytes()).mean(2).ravel()
            assert np.corrcoef(np.asarray(image).mean(2).ravel(), seen)[0, 1] > 0.8, "another picture"
    assert not verify(path, decode=True).faults

    converted = tmp_path / "converted"
    build(BuildOptions(path, converted, "again", samples_per_shard=11, workers=1), progress=False)
    tars = shards.open(converted)
    assert [tars.read(i).tobytes() for i in range(30)] == [d.tobytes() for d in records.data]
    assert tars.label.tolist() == store.label.tolist()


def test_raw_pixels_are_refused_by_name(ffcv_results: Path) -> None:
    with pytest.raises(ValueError, match=r"3 of 3 samples hold raw pixels .*write_mode='jpg'"):
        shards.open(ffcv_results / "raw.beton")
