"""Runs ffcv itself, in ffcv's own environment, for tests/test_shards_ffcv.py and benchmarks/shard_sets.py.

ffcv_peer.py '[["read", FILE.beton, OUT.npz, SIDE], ["write", FOLDER, FILE.beton, MODE, WORKERS, PAGE_SIZE], ...]'

read: every sample through ffcv's reader, and its Loader if SIDE; write: FOLDER/<label>_*.* with its DatasetWriter.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import sys
from pathlib import Path

import numpy as np
from ffcv.fields import IntField, RGBImageField
from ffcv.fields.decoders import CenterCropRGBImageDecoder, IntDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.memory_managers import OSCacheManager
from ffcv.reader import Reader
from ffcv.writer import DatasetWriter
from PIL import Image


class Folder:
    def __init__(self, root: Path) -> None:
        self.files = sorted(root.iterdir())

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path = self.files[index]
        return Image.open(path).convert("RGB"), int(path.name.partition("_")[0])


def read(path: str, out: str, side: int) -> None:
    reader = Reader(path)
    manager = OSCacheManager(reader)
    image_field, label_field = reader.metadata.dtype.names
    with manager.schedule_epoch([]) as context:
        memory, pointers, sizes = context.state
        records = []
        for pointer in reader.metadata[image_field]["data_ptr"]:
            size = int(sizes[np.searchsorted(pointers, pointer)])
            records.append(np.array(memory[int(pointer) : int(pointer) + size]))
    found = {
        "data": np.concatenate([*records, np.empty(0, np.uint8)]),
        "length": np.array([len(record) for record in records]),
        "stored_label": reader.metadata[label_field],
    }
    for cache in ("os", "process") if side else ():
        loader = Loader(
            path,
            batch_size=8,
            num_workers=1,
            os_cache=cache == "os",
            order=OrderOption.SEQUENTIAL,
            drop_last=False,
            pipelines={"image": [CenterCropRGBImageDecoder((side, side), 1.0)], "label": [IntDecoder()]},
        )
        pixels, labels = [], []
        for image_BHWC, label_B1 in loader:
            pixels.append(image_BHWC.copy())
            labels.append(label_B1.copy().ravel())
        found[f"{cache}_pixels"] = np.concatenate(pixels)
        found[f"{cache}_label"] = np.concatenate(labels)
    np.savez(out, **found)


def write(root: str, path: str, mode: str, workers: int, page_size: int) -> None:
    dataset = Folder(Path(root))
    fields = {"image": RGBImageField(write_mode=mode), "label": IntField()}
    DatasetWriter(path, fields, page_size=page_size, num_workers=workers).from_indexed_dataset(
        dataset, chunksize=3
    )
    for process in multiprocessing.active_children():
        process.join()
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print("writers' CPU seconds:", used[1].ru_utime + used[1].ru_stime)


if __name__ == "__main__":
    for command, *arguments in json.loads(sys.argv[1]):
        {"read": read, "write": write}[command](*arguments)
