"""The architectures that a machine's own GPUs are compiled for."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def own_gpu(found: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """What cmake/own_gpu.cmake makes of what CMake found."""
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("cmake is not on the path")
    script = tmp_path / "ask.cmake"
    lines = [f"include({ROOT}/cmake/own_gpu.cmake)", f'vqsa_own_gpu("{found}" OUT)', 'message("[${OUT}]")']
    script.write_text("\n".join(lines))
    return subprocess.run([cmake, "-P", str(script)], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        ("90-real", "90a-real"),  # without the a Hopper's kernel would be left out
        ("100-real", "100-real"),
        ("120-real", "120-real"),
        ("80-real;90-real", "80-real;90a-real"),
        ("89-real", "89-real"),
    ],
)
def test_hopper_gets_its_own_instructions(found: str, wanted: str, tmp_path: Path) -> None:
    done = own_gpu(found, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == f"[{wanted}]"


@pytest.mark.parametrize("found", ["", "No CUDA devices found.-real"])
def test_no_gpu_to_ask(found: str, tmp_path: Path) -> None:
    done = own_gpu(found, tmp_path)
    assert done.returncode != 0
    assert "VQSA_CUDA_ARCHS=90a-real" in " ".join(done.stderr.split())
