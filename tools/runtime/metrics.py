"""What a run reports: one line per interval, the same numbers in metrics.jsonl and the trackers."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics.jsonl; a last line cut short by a crash is left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


class MetricsFile:
    """Appends records to metrics.jsonl; resuming first drops what came after the checkpoint's step.

    Args:
        path: the file.
        step: step the run continues from; records of later steps are removed. 0: it starts, and a file that stands
            there is kept as metrics.1.jsonl or the next number that is free.
        validated: whether the validation of that step was done; if not, its record is removed too.

    Raises:
        OSError: the file cannot be written; the one that stood there is as it was.
    """

    def __init__(self, path: Path, step: int, *, validated: bool = True) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # What was changed at this step is written again, if it still is.
        again = {"changed"} if validated else {"changed", "val_score_pct"}
        kept = [
            record
            for record in read_metrics(path)
            if record["step"] < step or (record["step"] == step and not again & record.keys())
        ]
        partial = path.with_suffix(".tmp")
        try:
            with partial.open("w") as file:
                file.writelines(json.dumps(record) + "\n" for record in kept)
                file.flush()
                os.fsync(file.fileno())
            if step == 0:
                _put_aside(path)
            partial.replace(path)
        except OSError as error:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise OSError(f"{path} could not be written ({error}); make room and start again") from None
        self._file = path.open("a")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record and flush it; a full disk costs the record, not the run. JSON has no NaN: null."""
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        try:
            self._file.write(json.dumps(plain) + "\n")
            self._file.flush()
        except OSError as error:
            log.error("metrics of step %s not written: %s", record.get("step"), error)

    def close(self) -> None:
        """Close the file; what a full disk does not take is lost."""
        try:
            self._file.close()
        except OSError as error:
            log.error("metrics not written to the end: %s", error)


def _put_aside(path: Path) -> None:
    """Rename the log of an earlier start, if it says anything."""
    if path.is_file() and path.stat().st_size:
        numbered = (path.with_suffix(f".{number}{path.suffix}") for number in itertools.count(1))
        path.rename(next(name for name in numbered if not name.exists()))


def forget_status(out: Path) -> None:
    """Delete the status.json of an earlier end, so that it is not taken for this run's."""
    try:
        (out / "status.json").unlink(missing_ok=True)
    except OSError as error:
        log.error("status.json of an earlier end not deleted: %s", error)


def write_status(out: Path, status: Mapping[str, Any]) -> None:
    """Write how the run ended to status.json, for schedulers that see a launcher's exit code instead of ours."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "status.json").write_text(json.dumps(status) + "\n")
    except OSError as error:
        log.error("status.json not written: %s", error)


def progress_line(record: Mapping[str, Any], total: int) -> str:
    """Return a training record as the line people watch."""
    parts = [f"step {record['step']}/{total}", f"loss {record['loss']:.3f}"]
    if "vq" in record:
        parts.append(f"(ce {record['ce']:.3f} vq {record['vq']:.4f} commit {record['commit']:.4f})")
    parts += [f"top1 {record['top1_pct']:.1f}%", f"{record['rate_img_s']:.0f} img/s"]
    parts.append(f"data wait {record['data_wait_pct']:.1f}%")
    if "codes_used_pct" in record:
        parts.append(f"codes used {record['codes_used_pct']:.0f}% (perplexity {record['perplexity']:.0f})")
    if "consistency" in record:
        parts.append(f"consistency {record['consistency']:.4f}")
    parts += [
        f"grad {record['gradient_norm']:.2f}",
        f"lr {record['lr']:.2e}",
        f"{record['memory_gib']:.1f} GiB",
        f"ETA {_clock(record['eta_s'])}",
    ]
    if record.get("skipped_steps"):
        parts.append(f"skipped steps {record['skipped_steps']}")
    if record.get("damaged"):
        parts.append(f"damaged samples {record['damaged']}")
    return "  ".join(parts)


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"
