"""The throughput profiler's parts: measure each stage, say what limits the run, compare, show."""
