"""The codebook search against what others do: time, memory, wrong answers, and the floors beside them.

    python benchmarks/codebook.py --out benchmarks/results/codebook.json       (on a GPU)
    python benchmarks/codebook.py --tiny --device cpu                          (small sizes, any machine)

The tests run first; on red there is no number. Each size is measured in one run: our search and whole forward
(codebook prepared before, or in the same call), forward + backward, and the codebook's gradient alone beside
index_add; (a) cuBLAS half GEMM with float32 output alone, (b) that + argmin, and + gather + losses, (c) float32 and
TF32 addmm + argmin, and cdist + argmin, (d) vector-quantize-pytorch, (e) faiss's flat index, the last two where
installed. A method that runs out of memory says so, and one of others that fails says how; where ours fails, the
benchmark ends. `wrong` is the share of 512 features whose code is farther than the nearest, by float64. `ratios` are
what the kernels are to be judged by; benchmarks/training.py has the training step beside the plain trunk's.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from benchmarks.codebook_methods import methods
from benchmarks.environment import environment, percentiles, write_result
from model.codebook import nearest_code
from model.codebook.kernels import kernels_for

# Shapes: N = features, K = codes, D = feature dimension.

ROOT = Path(__file__).resolve().parent.parent
SIZES = [(n, k, 2048) for k in (1000, 10_000, 100_000) for n in (128, 6272, 25_088)]
SIZES += [(6272, 10_000, d) for d in (512, 768, 1024, 1280)]
TINY = [(64, 500, 64), (300, 1000, 128)]
HALF_FLOP_S, FLOAT_FLOP_S, BYTES_S = (
    790e12,
    67e12,
    4.3e12,
)  # an H200, measured (half, bytes) and by its data sheet


class CodebookBenchmark(BaseModel):
    """Measure the codebook search."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    tiny: bool = False
    """Small sizes, to see that it runs."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where; "auto" is a GPU if there is one."""

    data: Literal["relu", "gaussian"] = "relu"
    """Features and codes: rectified Gaussian numbers, as a trunk's, or Gaussian ones."""

    repeats: int = Field(30, ge=3)
    """Most timed calls of each method; a slow one gets what fits into 2 s, but 3."""

    tests: bool = True
    """Run the tests of the search first."""

    out: Path | None = None
    """JSON file for the result."""


def floors_us(n: int, k: int, d: int) -> dict[str, float]:
    """Arithmetic and memory floors on an H200, in microseconds."""
    flop = 2.0 * n * k * d
    return {
        "half_product": round(1e6 * flop / HALF_FLOP_S, 1),
        "float_product": round(1e6 * flop / FLOAT_FLOP_S, 1),
        "read_half_codes": round(1e6 * 2 * k * d / BYTES_S, 1),
        "write_and_read_scores": round(1e6 * 8 * n * k / BYTES_S, 1),
    }


def vectors(kind: str, n: int, k: int, d: int, device: torch.device) -> tuple[Tensor, Tensor]:
    g = torch.Generator(device).manual_seed(n + k + d)
    z_ND, codes_KD = (torch.randn(rows, d, generator=g, device=device) for rows in (n, k))
    return (z_ND.relu_(), codes_KD.relu_()) if kind == "relu" else (z_ND, codes_KD)


def milliseconds(work: Callable[[], object], repeats: int, device: torch.device) -> dict[str, float]:
    """Percentiles of the time of a call, by CUDA events where there is a GPU, after a warm-up."""

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(2):
        finish()
        began_s = time.perf_counter()
        work()
        finish()
    repeats = max(3, min(repeats, int(2 / (time.perf_counter() - began_s))))
    for _ in range(repeats // 6):
        work()
    times = []
    if device.type == "cuda":
        marks = [
            [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            for _ in range(repeats)
        ]  # fmt: skip
        for begin, end in marks:
            begin.record()
            work()
            end.record()
        torch.cuda.synchronize()
        times = [begin.elapsed_time(end) for begin, end in marks]
    else:
        for _ in range(repeats):
            began_s = time.perf_counter()
            work()
            times.append(1e3 * (time.perf_counter() - began_s))
    return {name: round(value, 4) for name, value in percentiles(times).items()}


def peak_mb(work: Callable[[], object], device: torch.device) -> float | None:
    """Most device memory that the call took beyond what was there, its outputs included."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)


def ratios(rows: dict[str, Any], floors: dict[str, float]) -> dict[str, float]:
    """Medians of our forward pass against those of others, and of the search against reading the codes once."""

    def median_ms(name: str) -> float | None:
        return rows[name]["ms"]["p50"] if "ms" in rows.get(name, {}) else None

    forward, prepared = "ours: forward", "ours: forward, codebook prepared"
    wanted = {
        "forward, codebook prepared / half GEMM": (prepared, "half GEMM"),
        "forward / half GEMM": (forward, "half GEMM"),
        "forward / half GEMM + argmin + gather + losses": (forward, "half GEMM + argmin + gather + losses"),
        "float32 cdist + argmin / forward": ("float32 cdist + argmin", forward),
    }
    found = {}
    for name, (above, below) in wanted.items():
        a, b = median_ms(above), median_ms(below)
        if a is not None and b is not None:
            found[name] = round(a / b, 3)
    search, floor_us = median_ms("ours: search, codebook prepared"), floors["read_half_codes"]
    if search is not None and floor_us > 0:
        found["search / reading the half codes on an H200"] = round(1e3 * search / floor_us, 3)
    return found


def wrong_pct(index_N: Tensor, z_ND: Tensor, codes_KD: Tensor) -> float:
    """Percentage of (the first 512) features whose code is farther than the nearest one."""
    z_ND, index_N = z_ND[:512].double(), index_N[:512]
    exact_N = nearest_code(z_ND.float(), codes_KD, impl="torch")[0]
    found_N, least_N = ((z_ND - codes_KD[i].double()).square().sum(1) for i in (index_N, exact_N))
    return round(100 * (found_N > least_N * (1 + 1e-12)).double().mean().item(), 3)


def measure(
    command: CodebookBenchmark,
    n: int,
    k: int,
    d: int,
    device: torch.device,
    keep: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Measure all methods at one size; where ours fails, `keep` gets the rows so far before the error goes on."""
    z_ND, codes_KD = vectors(command.data, n, k, d, device)
    rows: dict[str, Any] = {}
    for name, work in methods(z_ND, codes_KD).items():
        try:
            result = work()
            row: dict[str, Any] = {
                "ms": milliseconds(work, command.repeats, device),
                "peak_mb": peak_mb(work, device),
            }
            if isinstance(result, tuple) and result[0].dtype in (torch.int64, torch.int32):
                row["wrong_pct"] = wrong_pct(result[0], z_ND, codes_KD)
        except torch.OutOfMemoryError as error:
            row = {"failed": f"out of memory: {error}"[:120]}
        except Exception as error:
            if name.startswith("ours"):
                rows[name] = {"failed": f"{type(error).__name__}: {error}"}
                keep(rows)
                raise
            row = {"failed": f"{type(error).__name__}: {error}"[:300]}
        rows[name] = row
        print(f"  {name:40s} {row}", flush=True)
    effort = {}
    fused = kernels_for(z_ND, "auto")
    if fused is not None:
        effort_2 = torch.zeros(2, dtype=torch.int64, device=device)
        fused.search(z_ND, codes_KD, False, fused.prepare(codes_KD, False), effort_2=effort_2)
        candidates, scanned = effort_2.tolist()
        effort = {
            "candidates_per_feature": round(candidates / n, 3),
            "scanned_again_pct": round(100 * scanned / n, 3),
        }
        print(f"  {effort}")
    floors = floors_us(n, k, d)
    compared = ratios(rows, floors)
    print(f"  {compared}")
    return {
        "n": n, "k": k, "d": d, "floors_us_h200": floors, "effort": effort, "ratios": compared, "methods": rows,
    }  # fmt: skip


def main() -> None:
    """Run the tests, then the benchmark."""
    command = tyro.cli(CodebookBenchmark, description=CodebookBenchmark.__doc__)
    if command.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda needs a GPU, and torch sees none; leave it out, or say --device cpu")
    device = torch.device("cpu" if command.device == "cpu" or not torch.cuda.is_available() else "cuda")
    if command.tests:
        chosen = [f"tests/test_{name}.py" for name in ("model_search", "model_quantize", "codebook_gpu")]
        marks = ["-m", "gpu"] if device.type == "cuda" else ["-m", "not gpu and not slow"]
        code = subprocess.run([sys.executable, "-m", "pytest", "-q", *chosen, *marks], cwd=ROOT).returncode
        if code:
            sys.exit(f"no benchmark: the tests of the search failed (pytest exit code {code})")
    sizes: list[dict[str, Any]] = []
    record = {**environment(), "data": command.data, "repeats": command.repeats, "sizes": sizes}

    def write() -> None:
        if command.out:
            write_result(command.out, record)

    for n, k, d in TINY if command.tiny else SIZES:
        print(f"N {n}, K {k}, D {d}: floors on an H200 in µs {floors_us(n, k, d)}", flush=True)

        def keep(rows: dict[str, Any], n: int = n, k: int = k, d: int = d) -> None:
            sizes.append({"n": n, "k": k, "d": d, "methods": rows})
            write()

        sizes.append(measure(command, n, k, d, device, keep))
        write()


if __name__ == "__main__":
    main()
