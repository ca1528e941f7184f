"""What stands beside every benchmark's numbers; the profiler uses the same record."""

from __future__ import annotations

from tools.runtime.environment import environment, percentiles

__all__ = ["environment", "percentiles"]
