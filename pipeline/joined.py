"""Several shard sets as one: a data set and its augmented copies, such as DeepAugment's folders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from shards import Records, Store
from shards.store import owning


class JoinedStore(Store):
    """The samples of the first store, then those of the second, and so on, under one numbering.

    Offers what training needs of a store: sizes, labels, `fetch` and `location`.

    Args:
        stores: one at least; their class lists must be equal.

    Raises:
        ValueError: other classes; both sets are named.
    """

    def __init__(self, stores: Sequence[Store]) -> None:
        first = stores[0]
        for store in stores[1:]:
            if store.classes != first.classes:
                raise ValueError(
                    f"{store.name} ({store.path}) has other classes than {first.name} ({first.path}); sets that are "
                    "trained on together need the same class list: build them with the same class folders"
                )
        self.stores = list(stores)
        self.name = " + ".join(store.name for store in stores)
        self.path = first.path
        self.classes = first.classes
        self.label = np.concatenate([store.label for store in stores])
        self.width = np.concatenate([store.width for store in stores])
        self.height = np.concatenate([store.height for store in stores])
        self.length = np.concatenate([store.length for store in stores])
        self._ends = np.cumsum([len(store) for store in stores])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __repr__(self) -> str:
        return f"<JoinedStore {self.name}: {len(self)} samples>"

    def _owner(self, index: int) -> tuple[Store, int]:
        which = int(np.searchsorted(self._ends, index, side="right"))
        return self.stores[which], index - int(self._ends[which] - len(self.stores[which]))

    def fetch(self, ids: Sequence[int] | npt.NDArray[Any], check: bool = True, copy: bool = False) -> Records:
        """As `Store.fetch`."""
        index_B = np.asarray(ids, np.int64)
        which_B = np.searchsorted(self._ends, index_B, side="right")
        span_B2 = np.zeros((len(index_B), 2), np.int64)
        owners: list[object] = []
        fault_B, errno_B = np.zeros(len(index_B), np.uint8), np.zeros(len(index_B), np.int32)
        for which in np.unique(which_B):
            place = np.flatnonzero(which_B == which)
            store = self.stores[which]
            records = store.fetch(index_B[place] - int(self._ends[which] - len(store)), check, copy)
            fault_B[place], errno_B[place] = records.fault, records.errno
            span_B2[place] = records.span
            owners.append(records.span)
        return Records(owning(span_B2, *owners), fault_B, errno_B)

    def location(self, index: int) -> str:
        """As `Store.location`, with the set's name where there are several."""
        store, own = self._owner(index)
        return f"{store.name}: {store.location(own)}"

    def close(self) -> None:
        """Close all stores."""
        for store in self.stores:
            store.close()


def join(stores: Sequence[Store]) -> Store:
    """Return the stores as one; a single one is returned as it is."""
    return stores[0] if len(stores) == 1 else JoinedStore(stores)
