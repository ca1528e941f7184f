"""What nvcc makes of the codebook kernels: registers, tensor core instructions, loads that do not wait for each other.

No GPU is needed; without nvcc, or without cuobjdump (beside nvcc, or in torch's Triton), the tests skip.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.codebook_shim import CSRC

REGISTERS = 65_536
"""32-bit registers of a multiprocessor, compute capability 8.0 to 10.0."""

ROW, WIDE = 128, 256
"""Threads of a block that works on a row, and of one that multiplies."""


class Expected(NamedTuple):
    threads: int
    blocks: int
    """Blocks that a multiprocessor has registers for."""

    loads: int = 0
    """Loads on their way before the first is used, at least."""

    words: int = 4
    """32-bit words of each."""

    products: str = ""
    """Instruction of the tensor cores."""

    count: int = 1
    """Kernels of that name: one for each tile, metric or type."""


KERNELS = {
    "norm_codes": Expected(ROW, 6, 4),
    "sum_codes": Expected(ROW, 4, 8),
    "centre_codes": Expected(ROW, 4, 8, words=2),
    "shadow_codesILb0E": Expected(ROW, 6, 4),
    "shadow_codesILb1E": Expected(ROW, 4, 4),
    "shadow_featuresILb0E": Expected(ROW, 6, 4),
    "shadow_featuresILb1E": Expected(ROW, 4, 4),
    "resolve_codesILb0E": Expected(ROW, 4, 8),
    "resolve_codesILb1E": Expected(ROW, 3, 4),
    "sum_runsINS0_5FloatE": Expected(ROW, 6, 16, words=1),
    "sum_runsINS0_4HalfE": Expected(ROW, 6, 16, words=1),
    "sum_runsINS0_6BfloatE": Expected(ROW, 6, 16, words=1),
    "sum_runsINS0_6DoubleE": Expected(ROW, 6, 8, words=2),
    "clear_rows": Expected(ROW, 8),
    "join_runs": Expected(ROW, 8, 8, words=2),
    "search_codesINS0_4TileILi256E": Expected(WIDE, 1, products="HMMA", count=2),
    "search_codesINS0_4TileILi64E": Expected(WIDE, 2, products="HMMA"),
    "convert_and_search_codesINS0_4TileILi256E": Expected(WIDE, 1, 4, products="HMMA", count=2),
    "convert_and_search_codesINS0_4TileILi64E": Expected(WIDE, 1, 4, products="HMMA"),
    "rescan_codes": Expected(WIDE, 1, 8, products="HMMA"),
    "multiplyINS0_4TileILi": Expected(WIDE, 1, products="HMMA", count=2),
    "search_codes_hopper": Expected(384, 1, products="HGMMA"),
    "multiply_hopper": Expected(384, 1, products="HGMMA"),
}
"""By their beginnings, as the compiler mangles them."""


def cuobjdump() -> str:
    found = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        found = shutil.which("cuobjdump", path=Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    if found is None:
        pytest.skip("no cuobjdump: the instructions of the CUDA build are not checked")
    return found


def kernel_of(mangled: str) -> str:
    """The entry of KERNELS that a function is."""
    name = re.sub(r"^_ZN4vqsa8codebook(?:\d+_GLOBAL__N_\w*?_cu_[0-9a-f]{8}(?:_\d+)?)?\d+", "", mangled)
    found = [start for start in KERNELS if name.startswith(start)]
    assert found, f"{mangled} is not in KERNELS"
    return max(found, key=len)


def loads_on_their_way(instructions: list[str], words: int) -> int:
    """Most loads from global memory of at least so many words before the first use of one of their results."""
    most, pending = 0, dict[int, int]()
    for place, instruction in enumerate(instructions):
        operation, _, operands = re.sub(r"^@!?U?P\w+ ", "", instruction).partition(" ")
        width = 4 if ".128" in operation else 2 if ".64" in operation else 1
        target, _, sources = operands.partition(",")
        if operation.startswith(("ST", "BRA")):
            sources = operands
        if any(int(number) in pending for number in re.findall(r"\bR(\d+)", sources)):
            most = max(most, len(set(pending.values())))
            pending.clear()
        first = re.match(r"R(\d+)", target)
        if operation.startswith("LDG") and width >= words and first is not None:
            pending |= dict.fromkeys(range(int(first[1]), int(first[1]) + width), place)
    return most


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90a", "100"])
def test_kernels_are_compiled_as_intended(arch: str, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc: registers and instructions of the CUDA build are not checked")
    cubin = tmp_path / "out.cubin"
    flags = ["-std=c++17", "-O3", "--fmad=false", "-Xptxas", "-v", "-cubin"]
    target = ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    built = subprocess.run(
        [nvcc, *flags, *target, str(CSRC / "codebook.cu"), "-o", str(cubin)], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr[-3000:]
    assert "warning" not in built.stderr, built.stderr[-3000:]
    assert "Performance Loss" not in built.stderr, "ptxas says of wgmma that it had to serialise it"

    said = re.split(r"Compiling entry function '(\w+)'", built.stderr)[1:]
    seen = dict.fromkeys(KERNELS, 0)
    for mangled, report in zip(said[::2], said[1::2], strict=True):
        kernel = kernel_of(mangled)
        seen[kernel] += 1
        assert "0 bytes spill stores, 0 bytes spill loads" in report, f"{kernel}: {report}"
        used = re.search(r"Used (\d+) registers", report)
        assert used is not None, report
        room = REGISTERS // (KERNELS[kernel].threads * KERNELS[kernel].blocks) // 8 * 8
        assert int(used[1]) <= room, f"{kernel}: {used[1]} registers, room for {room}"
    assert seen == {kernel: expected.count for kernel, expected in KERNELS.items()}

    dump = subprocess.run([cuobjdump(), "-sass", str(cubin)], capture_output=True, text=True, check=True)
    functions = re.split(r"Function : (\w+)", dump.stdout)[1:]
    assert len(functions) == len(said)
    for mangled, text in zip(functions[::2], functions[1::2], strict=True):
        kernel = kernel_of(mangled)
        expected = KERNELS[kernel]
        instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?) *;", text, re.MULTILINE)
        assert instructions, text[:500]
        products = {name for name in ("HGMMA", "HMMA") if re.search(rf"\b{name}\b", text)}
        elsewhere = expected.products == "HGMMA" and arch != "90a"  # nothing of Hopper is built for others
        assert products == ({expected.products} - {""} if not elsewhere else set()), kernel
        assert not re.search(r"\b(STL|LDL)\b", text), f"{kernel} keeps something in local memory"
        ahead = loads_on_their_way(instructions, expected.words)
        assert ahead >= expected.loads, f"{kernel}: {ahead} loads at once, wanted {expected.loads}"
