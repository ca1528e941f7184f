"""What every measurement records beside its numbers: hardware, versions, commit, date, command."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import torch

from tools.runtime.checkpoint import code_version

_PACKAGES = (
    "torch",
    "torchvision",
    "nvidia-dali-cuda130",
    "accelerate",
    "numpy",
    "pillow",
    "imagecorruptions",
)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        return platform.processor()
    return platform.processor()


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "none"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]


def environment() -> dict[str, Any]:
    """Return the record that stands beside a measurement's numbers."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": code_version(),
        "command": " ".join(["python", *sys.argv]),
        "cpu": _cpu_name(),
        "cpu_cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "driver": _driver(),
        "python": platform.python_version(),
        "packages": {package: _version(package) for package in _PACKAGES},
    }


def percentiles(values: list[float]) -> dict[str, float]:
    """Return the 20th, 50th and 80th percentile of repeated measurements."""
    ordered = sorted(values)
    return {f"p{q}": ordered[round((len(ordered) - 1) * q / 100)] for q in (20, 50, 80)}
