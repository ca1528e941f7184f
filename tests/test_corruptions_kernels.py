"""The CUDA kernels, compiled for every architecture that is supported: registers and spills."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parent.parent / "pipeline" / "corruptions" / "csrc"
MOST_REGISTERS = 64  # of 65,536 for four blocks of 256 threads

KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["80", "90a", "100"])
def test_kernels_compile_without_spills(architecture: str, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc: registers and spills of the CUDA kernels are not checked here")
    flags = ["-std=c++17", "-O3", "--fmad=false", "--expt-relaxed-constexpr", "-Xcompiler=-ffp-contract=off"]
    target = f"arch=compute_{architecture},code=sm_{architecture}"
    files = ["-o", str(tmp_path / "kernels.cubin"), str(CSRC / "cuda_launch.cu")]
    command = [nvcc, *flags, "-gencode", target, "-Xptxas", "-v", "-cubin", *files]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = [found.groupdict() for found in KERNEL.finditer(done.stderr)]
    stages = re.findall(r"^  X\(kStage\w+,", (CSRC / "stages.h").read_text(), re.MULTILINE)
    assert len(kernels) == len(stages)
    spilling = [k["name"] for k in kernels if int(k["stores"]) or int(k["loads"])]
    assert not spilling, f"sm_{architecture}: kernels that spill registers: {spilling}"
    assert max(int(k["registers"]) for k in kernels) <= MOST_REGISTERS
