"""The CUDA kernels of the codebook built for the CPU: csrc/shim/ gives every thread of a block a fiber."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from model.codebook.kernels import Kernels

CSRC = Path(__file__).resolve().parent.parent / "model" / "codebook" / "csrc"
FLAGS = ["-std=c++17", "-ffp-contract=off", "-DVQSA_HOST_SHIM", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]


def compiler() -> str:
    found = shutil.which("g++")
    if found is None or platform.machine() != "x86_64":
        pytest.skip("the host shim needs g++ and an x86-64 processor")
    return found


def build_shim(folder: Path) -> Kernels:
    """The same source that nvcc compiles, for CPU tensors."""
    out = folder / "libshim.so"
    command = [compiler(), *FLAGS, "-O2", "-Werror", "-shared", "-fPIC", "-x", "c++"]
    built = subprocess.run(
        [*command, str(CSRC / "codebook.cu"), "-o", str(out)], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr[-3000:]
    return Kernels(out, device_type="cpu")
