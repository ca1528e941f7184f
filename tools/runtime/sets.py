"""Opens the shard sets of a run: those to train on as one, and the one to validate on."""

from __future__ import annotations

import shards
from pipeline.joined import join
from tools.runtime.config import RunConfig


def open_sets(config: RunConfig) -> tuple[shards.Store, shards.Store | None]:
    """Return what a run trains on, `data` and `extra` together, and what it validates on, if it does.

    Raises:
        FileNotFoundError: there is no set at a path.
        ValueError: their classes differ.
    """
    store = join([shards.open(path) for path in (config.data, *config.extra)])
    val_store = shards.open(config.val) if config.val is not None else None
    if val_store is not None and val_store.classes != store.classes:
        raise ValueError(
            f"{config.val} and {config.data} have different class lists; build both from the same classes"
        )
    return store, val_store
