"""The codebook search against what others do: time, memory, wrong answers, and the floors beside them.

    python benchmarks/codebook.py --out benchmarks/results/codebook.json       (on a GPU)
    python benchmarks/codebook.py --tiny --device cpu                          (small sizes, any machine)

The tests run first; on red there is no number. Each size is measured in one run: our search and whole forward
(codebook prepared before, or in the same call), forward + backward, and the codebook's gradient alone beside
index_add; (a) cuBLAS half GEMM with float32 output alone, (b) that + argmin, and + gather + losses, (c) float32 and
TF32 addmm + argmin, and cdist + argmin, (d) vector-quantize-pytorch, (e) faiss's flat index, the last two where
installed. A method that runs out of memory says so, and one of others that fails says how; where ours fails, the
benchmark ends. `wrong_pct` is the share of 512 features whose code is farther than the nearest, by float64. `ms` is the
device's time, with the work queued before it begins; `called_ms` that of a call on an idle device. `verdicts`, printed
last, have every bound that the kernels are to be judged by (codebook_bounds.py); sizes that have one of their own come
first. benchmarks/training.py has the training step beside the plain trunk's.
"""

from __future__ import annotations

import re
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

from benchmarks.codebook_bounds import FEW, FORWARD, MAIN, Rates, floors_us, rates_of, told, verdicts
from benchmarks.codebook_methods import methods
from benchmarks.environment import environment, percentiles, write_result
from model.codebook import nearest_code
from model.codebook.choice import variant_for
from model.codebook.kernels import TILE_ANY, TILE_AUTO, TILE_HOPPER, Kernels, kernels_for

# Shapes: N = features, K = codes, D = feature dimension.

ROOT = Path(__file__).resolve().parent.parent
SIZES = [MAIN, FEW]  # first, for where there is little time
SIZES += [
    at for k in (1000, 10_000, 100_000) for n in (128, 6272, 25_088) if (at := (n, k, 2048)) not in SIZES
]
SIZES += [(6272, 10_000, d) for d in (512, 768, 1024, 1280)]
TINY = [(64, 500, 64), (300, 1000, 128)]


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

    budget_s: float | None = Field(None, gt=0)
    """No size is begun once so many seconds have passed since the first; the ones with bounds come first."""

    tests: bool = True
    """Run the tests of the search first."""

    out: Path | None = None
    """JSON file for the result."""


def vectors(kind: str, n: int, k: int, d: int, device: torch.device) -> tuple[Tensor, Tensor]:
    g = torch.Generator(device).manual_seed(n + k + d)
    z_ND, codes_KD = (torch.randn(rows, d, generator=g, device=device) for rows in (n, k))
    return (z_ND.relu_(), codes_KD.relu_()) if kind == "relu" else (z_ND, codes_KD)


def milliseconds(
    work: Callable[[], object], repeats: int, device: torch.device
) -> dict[str, dict[str, float]]:
    """Percentiles of the time of a call after a warm-up, by CUDA events where there is a GPU.

    Returns:
        "ms", and on a GPU "called_ms". For "ms" the device is kept busy until the call has queued its work, as it is
        in a training step: the device's own time. "called_ms" is that of a call on an idle device, which for a
        small size is the time that Python takes.
    """
    for _ in range(2):
        _finish(device)
        began_s = time.perf_counter()
        work()
        queued_s = time.perf_counter() - began_s
        _finish(device)
        spent_s = time.perf_counter() - began_s
    repeats = max(3, min(repeats, int(2 / spent_s)))
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            began_s = time.perf_counter()
            work()
            times.append(1e3 * (time.perf_counter() - began_s))
        return {"ms": _rounded(times)}
    # Half as long again as it took to queue, at 2 GHz; a call that waits for the device gains nothing.
    busy_cycles = int(min(1.5 * queued_s, 5e-3) * 2e9)
    return {
        "ms": _rounded(_device_times(work, repeats, busy_cycles)),
        "called_ms": _rounded(_device_times(work, max(3, repeats // 3), 0)),
    }


def _device_times(work: Callable[[], object], repeats: int, busy_cycles: int) -> list[float]:
    for _ in range(repeats // 6):
        work()
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in marks:
        if busy_cycles:
            torch.cuda._sleep(busy_cycles)
        else:
            torch.cuda.synchronize()
        begin.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in marks]


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _rounded(times: list[float]) -> dict[str, float]:
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


def wrong_pct(index_N: Tensor, exact_N: Tensor, z_ND: Tensor, codes_KD: Tensor) -> float:
    """Percentage of (the first 512) features whose code is farther than the nearest one."""
    z_ND, index_N = z_ND[:512].double(), index_N[:512]
    found_N, least_N = ((z_ND - codes_KD[i].double()).square().sum(1) for i in (index_N, exact_N))
    return round(100 * (found_N > least_N * (1 + 1e-12)).double().mean().item(), 3)


def efforts(fused: Kernels, z_ND: Tensor, codes_KD: Tensor) -> dict[str, dict[str, Any]]:
    """What the search that "auto" makes leaves to the later stages, and where there are both, either kernel."""
    device = z_ND.device
    variant = variant_for(fused, device)
    _finish(device)  # the outcome of the Hopper kernel's trial, if this was the first search
    variant = variant_for(fused, device)
    tiles = {"auto": variant.tile}
    if fused.capability(device) == 90:
        tiles |= {"mma.sync": TILE_AUTO, "Hopper variant": TILE_HOPPER}
    ready = fused.prepare(codes_KD, False)
    found = {}
    for name, tile in tiles.items():
        effort_2 = torch.zeros(2, dtype=torch.int64, device=device)
        fused.search(z_ND, codes_KD, False, ready, tile=tile, effort_2=effort_2)
        candidates, scanned = effort_2.tolist()
        found[name] = {
            "kernels": _KERNELS[tile],
            "candidates_per_feature": round(candidates / len(z_ND), 3),
            "scanned_again_pct": round(100 * scanned / len(z_ND), 3),
        }
    return found


_KERNELS = {TILE_AUTO: "mma.sync", TILE_HOPPER: "Hopper variant", TILE_ANY: "either, by size"}


def stages_us(work: Callable[[], object]) -> dict[str, Any]:
    """Mean time of each kernel of a call on a GPU, by torch's profiler; what it says where that cannot measure."""
    calls = 5
    try:
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True
        ) as seen:
            for _ in range(calls):
                work()
            torch.cuda.synchronize()
        stages: dict[str, float] = {}
        for event in seen.key_averages():
            ours = re.search(r"codebook::(?:\(anonymous namespace\)::)?(\w+)", event.key)
            name = ours[1] if ours else event.key[:60]
            stages[name] = round(stages.get(name, 0.0) + event.self_device_time_total / calls, 1)
        return stages or {"not measured": "the profiler saw no kernel"}
    except RuntimeError as error:
        return {"not measured": str(error)[:200]}


def measure(
    command: CodebookBenchmark,
    n: int,
    k: int,
    d: int,
    device: torch.device,
    rates: Rates,
    keep: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Measure all methods at one size; where ours fails, `keep` gets the rows so far before the error goes on."""
    z_ND, codes_KD = vectors(command.data, n, k, d, device)
    exact_N = nearest_code(z_ND[:512], codes_KD, impl="torch")[0]
    rows: dict[str, Any] = {}
    ways = methods(z_ND, codes_KD)
    for name, work in ways.items():
        try:
            result = work()
            row: dict[str, Any] = {
                **milliseconds(work, command.repeats, device),
                "peak_mb": peak_mb(work, device),
            }
            if isinstance(result, tuple) and result[0].dtype in (torch.int64, torch.int32):
                row["wrong_pct"] = wrong_pct(result[0], exact_N, z_ND, codes_KD)
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
    fused = kernels_for(z_ND, "auto")
    effort = {} if fused is None else efforts(fused, z_ND, codes_KD)
    stages = stages_us(ways[FORWARD]) if device.type == "cuda" else {}
    print(f"  effort {effort}\n  stages of a forward pass in us {stages}", flush=True)
    return {
        "n": n, "k": k, "d": d, "floors_us": floors_us(n, k, d, rates), "effort": effort, "stages_us": stages,
        "methods": rows,
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
    rates = rates_of(torch.cuda.get_device_name() if device.type == "cuda" else "")
    sizes: list[dict[str, Any]] = []
    record = {
        **environment(), "data": command.data, "repeats": command.repeats, "floors_of": rates._asdict(),
        "sizes": sizes,
    }  # fmt: skip

    def write() -> None:
        record["verdicts"] = verdicts(sizes, device.type == "cuda")
        if command.out:
            write_result(command.out, record)

    began_s = time.perf_counter()
    for n, k, d in TINY if command.tiny else SIZES:
        if command.budget_s is not None and time.perf_counter() - began_s > command.budget_s:
            print(f"N {n}, K {k}, D {d}: left out, {command.budget_s:g} s have passed", flush=True)
            continue
        floors = floors_us(n, k, d, rates)
        print(f"N {n}, K {k}, D {d}: floors of an {rates.device} in us {floors}", flush=True)

        def keep(rows: dict[str, Any], at: tuple[int, int, int] = (n, k, d)) -> None:
            n, k, d = at
            sizes.append({"n": n, "k": k, "d": d, "floors_us": floors_us(*at, rates), "methods": rows})
            write()

        sizes.append(measure(command, n, k, d, device, rates, keep))
        write()
    for verdict in verdicts(sizes, device.type == "cuda"):
        print(told(verdict))


if __name__ == "__main__":
    main()
