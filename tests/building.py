"""What the tests of the builder share: pictures, folders of them, and a build to compare."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import shards
from shards.build import BuildOptions, BuildReport, build


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


GOOD = encoded(width=90, height=70)
DAMAGED: dict[str, tuple[bytes, str]] = {
    "truncated.JPEG": (GOOD[: len(GOOD) // 2], "truncated"),
    "zero.JPEG": (b"", "zero bytes"),
    "text.jpg": (b"404 not found", "neither JPEG nor PNG"),
    "image.gif": (b"GIF89a" + bytes(20), "neither JPEG nor PNG"),
}
