"""A record of what every step trained on: proof that no sample was lost, repeated or changed."""

from __future__ import annotations

import errno
import json
import logging
import os
from contextlib import suppress
from pathlib import Path

import xxhash
from torch import Tensor

from pipeline.loader import TrainingBatch

log = logging.getLogger(__name__)


class Audit:
    """Appends to audit_rank<R>.jsonl one line per micro-batch: step, stream positions, sample ids, kinds,
    severities, and the xxh3-64 of each image's normalised float32 pixels in HWC order.

    Steps that were repeated after a restart stand there twice, with the same values. What a full disk does not take is
    missing from then on, and said: the run goes on, as it does without a checkpoint.

    Args:
        folder: the run's folder.
        rank: global rank of this process.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"audit_rank{rank}.jsonl"
        self._file = self._path.open("ab", buffering=0)
        self._broken = False

    def note(self, step: int, batch: TrainingBatch) -> None:
        """Write down a micro-batch of optimiser step `step` (from 1)."""
        if self._broken:
            return
        record = {
            "step": step,
            "position": batch.position.tolist(),
            "sample_id": batch.sample_id.tolist(),
            "kind": batch.kind.tolist(),
            "severity": batch.severity.tolist(),
            "pixels": pixel_checksums(batch.images),
        }
        line = json.dumps(record).encode() + b"\n"
        try:
            whole_b = self._file.seek(0, os.SEEK_END)
            if self._file.write(line) != len(line):
                with suppress(OSError):
                    self._file.truncate(whole_b)  # to whole lines
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._broken = True
            log.error(
                "%s: %s; from step %d on nothing is noted there, and the run goes on. For an audit without a gap make "
                "room, and resume from a checkpoint before this step",
                self._path,
                error,
                step,
            )

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def pixel_checksums(image_BCHW: Tensor) -> list[str]:
    """Return the xxh3-64 of each image's values in HWC order, whatever its memory format."""
    images = image_BCHW.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return [xxhash.xxh3_64_hexdigest(image) for image in images]
