"""Lists of a set's shards that other readers look for beside the tars; they follow from the manifest."""

from __future__ import annotations

import json

from shards.manifest import Header

INFO_NAME = "_info.json"
SIZES_NAME = "sizes.json"


def side_files(header: Header) -> dict[str, bytes]:
    """Name and content of each side file of a set; a set of `.beton` files has none.

    `_info.json` is what timm and Hugging Face's ImageNet sets have, with one split of the set's name;
    `sizes.json` (shard name to count) is OpenCLIP's.
    """
    if header.storage != "webdataset":
        return {}
    split = {
        "name": header.name,
        "num_samples": header.samples,
        "filenames": [shard.name for shard in header.shards],
        "shard_lengths": [shard.samples for shard in header.shards],
        "alt_label": "",
    }
    contents = {
        INFO_NAME: {"splits": {header.name: split}},
        SIZES_NAME: {shard.name: shard.samples for shard in header.shards},
    }
    return {name: json.dumps(content, indent=1).encode() + b"\n" for name, content in contents.items()}
