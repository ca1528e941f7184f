"""A record of what every step trained on: proof that no sample was lost, repeated or changed."""

from __future__ import annotations

import json
from pathlib import Path

import xxhash
from torch import Tensor

from pipeline.loader import TrainingBatch


class Audit:
    """Appends to audit_rank<R>.jsonl one line per micro-batch: step, stream positions, sample ids, kinds,
    severities, and the xxh3-64 of each image's normalised float32 pixels in HWC order.

    Steps that were repeated after a restart stand there twice, with the same values.

    Args:
        folder: the run's folder.
        rank: global rank of this process.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / f"audit_rank{rank}.jsonl").open("a")

    def note(self, step: int, batch: TrainingBatch) -> None:
        """Write down a micro-batch of optimiser step `step` (from 1)."""
        record = {
            "step": step,
            "position": batch.position.tolist(),
            "sample_id": batch.sample_id.tolist(),
            "kind": batch.kind.tolist(),
            "severity": batch.severity.tolist(),
            "pixels": pixel_checksums(batch.images),
        }
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def pixel_checksums(image_BCHW: Tensor) -> list[str]:
    """Return the xxh3-64 of each image's values in HWC order, whatever its memory format."""
    images = image_BCHW.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return [xxhash.xxh3_64_hexdigest(image) for image in images]
