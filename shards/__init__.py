"""Records on disk: build, index, open. Knows nothing of training; needs neither torch nor DALI.

store = shards.open("/data/imagenet-train")
store.read(17), store.label[17], store.key(17)
"""

from shards.opening import open
from shards.scan import FAULTS, Scan, scan
from shards.store import Records, Store

__all__ = ["FAULTS", "Records", "Scan", "Store", "open", "scan"]
