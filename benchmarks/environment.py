"""What stands beside every benchmark's numbers; the profiler uses the same record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tools.runtime.environment import environment, percentiles

__all__ = ["environment", "percentiles", "write_result"]


def write_result(path: Path, record: dict[str, Any]) -> None:
    """Write a result as JSON; whatever ends the process, the file is whole, as it is now or as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(record, indent=1) + "\n")
    part.replace(path)
