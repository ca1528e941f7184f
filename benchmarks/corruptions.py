"""Images/s of the corruptions, per kind and severity and for the 16 x 5 mix, at 224 px.

    python benchmarks/corruptions.py --out benchmarks/results/corruptions.json

CPU: one thread, process CPU time, against PyPI imagecorruptions on the same photographs in the same
run where it is installed. "As installed" is the package as pip gives it; "fair" compiles the pure
Python loop of its glass blur with numba and draws its offsets in one call, which gives the same pixels.
CUDA, where there is a device: CUDA events, p20/p50/p80, batches of 32, 128 and 256, beside the floor
that the bytes moved set (benchmarks/traffic.py) at the rate a copy reaches on that device.

The parity tests run first; on red there is no number. The file is written anew after every part.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.environment import environment, write_result
from benchmarks.reference import glass_blur_by_numba, reference
from benchmarks.traffic import least_bytes, mix_bytes, stage_bytes
from pipeline.corruptions import (
    HELD_OUT_KINDS,
    TRAINING_KINDS,
    available_kinds,
    core,
    corrupt,
    frost,
)

ROOT = Path(__file__).resolve().parent.parent
SIDE = 224


def photographs(folder: Path | None, count: int) -> torch.Tensor:
    """Return (count, 224, 224, 3) uint8: photographs of a folder, else scikit-image's astronaut."""
    names = folder.rglob("*") if folder else ()
    files = sorted(file for file in names if file.suffix.lower() in (".jpeg", ".jpg"))
    if files:
        pictures = [Image.open(f).convert("RGB") for f in files[:: max(1, len(files) // count)][:count]]
    else:
        from skimage import data

        pictures = [
            Image.fromarray(data.astronaut()),
            Image.fromarray(data.chelsea()),
            Image.fromarray(data.coffee()),
        ]
    arrays = [np.asarray(p.resize((SIDE, SIDE), Image.Resampling.BILINEAR)) for p in pictures]
    return torch.from_numpy(np.stack([arrays[i % len(arrays)] for i in range(count)]))


def cpu_ms(work: Callable[[], object], images: int, least_s: float = 0.05, repeats: int = 3) -> float:
    """Return the least process CPU time per image in ms over repeats of at least `least_s` each."""
    best = float("inf")
    for _ in range(repeats):
        calls, start, spent_s = 0, time.process_time(), 0.0
        while calls == 0 or spent_s < least_s:
            work()
            calls += 1
            spent_s = time.process_time() - start
        best = min(best, spent_s / (calls * images) * 1e3)
    return best


def reference_ms(module: Any, kind: str, severity: int, image: torch.Tensor) -> dict[str, float]:
    """Return the reference's time for one image, as installed and (glass_blur) compiled by numba."""
    picture = Image.fromarray(image.numpy())
    installed: Callable[[Any, int], Any] = getattr(module, kind)
    once = (0.0, 1) if kind == "glass_blur" else (0.03, 3)  # half a second each
    out = {"reference_ms": round(cpu_ms(lambda: np.uint8(installed(picture, severity)), 1, *once), 3)}
    if kind == "glass_blur":
        glass_blur_by_numba(picture, severity)  # compiles
        fair = cpu_ms(lambda: np.uint8(glass_blur_by_numba(picture, severity)), 1, 0.03)
        out["reference_numba_ms"] = round(fair, 3)
    return out


def measure_cpu(images: torch.Tensor, with_reference: bool) -> dict[str, Any]:
    torch.set_num_threads(1)
    module = reference() if with_reference else None
    cells: dict[str, Any] = {}
    count = len(images)
    for kind in (*TRAINING_KINDS, *HELD_OUT_KINDS):
        if kind not in available_kinds() or (kind == "frost" and not frost.found()):
            continue
        for severity in range(1, 6):
            ours = cpu_ms(
                lambda k=kind, s=severity: corrupt(images, k, s, range_keys(count), flavour="bethge"), count
            )
            cell: dict[str, float] = {"ms": round(ours, 4)}
            if module is not None:
                cell |= reference_ms(module, kind, severity, images[0])
                cell["times_faster"] = round(cell["reference_ms"] / ours, 1)
                if "reference_numba_ms" in cell:
                    cell["times_faster_numba"] = round(cell["reference_numba_ms"] / ours, 1)
            cells[f"{kind} {severity}"] = cell
            print(f"{kind:20s} {severity}  {cell}", flush=True)
    grid = [cells[f"{k} {s}"] for k in TRAINING_KINDS for s in range(1, 6) if f"{k} {s}" in cells]
    summary: dict[str, Any] = {"mean_ms_15x5": round(float(np.mean([c["ms"] for c in grid])), 4)}
    if module is not None:
        installed = float(np.mean([c["reference_ms"] for c in grid]))
        fair = float(np.mean([c.get("reference_numba_ms", c["reference_ms"]) for c in grid]))
        fastest = {name: c.get("times_faster_numba", c["times_faster"]) for name, c in cells.items()}
        closest = min(fastest, key=lambda name: fastest[name])
        summary |= {
            "reference_mean_ms_as_installed": round(installed, 2),
            "reference_mean_ms_fair": round(fair, 2),
            "times_faster_as_installed": round(installed / summary["mean_ms_15x5"], 1),
            "times_faster_fair": round(fair / summary["mean_ms_15x5"], 1),
            "least_times_faster": [closest, fastest[closest]],
        }
    batch, kinds, severities = mix(images, 160)
    summary["mix_16x5_img_s_1_thread"] = round(
        1e3 / cpu_ms(lambda: corrupt(batch, kinds, severities, range_keys(160)), 160), 1
    )

    def wall_s(threads: int) -> float:
        torch.set_num_threads(threads)
        corrupt(batch, kinds, severities, range_keys(160))
        times = []
        for _ in range(5):
            start = time.perf_counter()
            corrupt(batch, kinds, severities, range_keys(160))
            times.append(time.perf_counter() - start)
        return min(times)

    summary["two_threads_speedup"] = round(wall_s(1) / wall_s(2), 2)
    return {"cells": cells, "summary": summary, "isa": core.cpu_isa()}


def cpu_table(cells: dict[str, dict[str, float]]) -> str:
    """Return the CPU times as Markdown, as docs/corruptions.md shows them: means over severities."""
    lines = ["| kind | ms | reference ms | times faster, by severity |", "|---|---|---|---|"]
    for kind in (*TRAINING_KINDS, *HELD_OUT_KINDS):
        rows = [cells[f"{kind} {s}"] for s in range(1, 6) if f"{kind} {s}" in cells]
        if not rows or "reference_ms" not in rows[0]:
            continue
        names = [("reference_ms", "times_faster", kind)]
        if "reference_numba_ms" in rows[0]:
            names.append(("reference_numba_ms", "times_faster_numba", f"{kind}, numba"))
        for milliseconds, times, label in names:
            theirs = np.mean([row[milliseconds] for row in rows])
            span = f"{min(row[times] for row in rows)}–{max(row[times] for row in rows)}"
            lines.append(f"| {label} | {np.mean([row['ms'] for row in rows]):.2f} | {theirs:.2f} | {span} |")
    return "\n".join(lines)


def range_keys(count: int) -> list[int]:
    return list(range(count))


def mix(images: torch.Tensor, count: int) -> tuple[torch.Tensor, list[str], list[int]]:
    """Return a batch with identity and the 15 training kinds, all severities, equally often."""
    kinds = [k for k in ("identity", *TRAINING_KINDS) if k != "frost" or frost.found()]
    cells = [(k, s) for k in kinds for s in range(1, 6)]
    batch = images.repeat(count // len(images) + 1, 1, 1, 1)[:count].contiguous()
    return (
        batch,
        [cells[i % len(cells)][0] for i in range(count)],
        [cells[i % len(cells)][1] for i in range(count)],
    )


def cuda_percentiles_ms(work: Callable[[], object], repeats: int = 30) -> list[float]:
    for _ in range(5):
        work()
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)
    ]
    for start, end in events:
        start.record()
        work()
        end.record()
    torch.cuda.synchronize()
    times = [start.elapsed_time(end) for start, end in events]
    return [float(np.percentile(times, p)) for p in (20, 50, 80)]


def measure_cuda(images: torch.Tensor, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Measure mixes and kinds on the GPU; `keep` gets all that is known after each mix and each kind."""
    # Device to device copy reads and writes each byte once: the rate that the floors are taken at.
    probe = torch.empty(256 * 1024 * 1024, dtype=torch.uint8, device="cuda")
    copy_ms = cuda_percentiles_ms(lambda: probe.clone())[1]
    bytes_per_s = 2 * probe.numel() / copy_ms * 1e3
    out: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "copy_tb_s": round(bytes_per_s / 1e12, 2),
        "cells": {},
        "mix": {},
    }
    if not frost.found():
        out["not_covered"] = "frost: its textures are not here; neither a number of its own, nor in the mix"
        print(f"NOT COVERED: {out['not_covered']}", flush=True)

    def timed(times_ms: list[float], batch_size: int, kind_bytes: float, least: float) -> dict[str, Any]:
        rate = batch_size / times_ms[1] * 1e3
        return {
            "ms_p20_p50_p80": [round(t, 4) for t in times_ms],
            "img_s": round(rate),
            "times_stages_floor": round(bytes_per_s / kind_bytes / rate, 1),
            "times_least_floor": round(bytes_per_s / least / rate, 1),
        }

    for batch_size in (32, 128, 256):
        batch, kinds, severities = mix(images, batch_size)
        on_device = batch.cuda()
        times = cuda_percentiles_ms(
            lambda b=on_device, k=kinds, s=severities, n=batch_size: corrupt(b, k, s, range_keys(n))
        )
        out["mix"][batch_size] = timed(times, batch_size, mix_bytes(), 6 * SIDE * SIDE)
        print("mix", batch_size, out["mix"][batch_size], flush=True)
        keep(out)
    batch = images.repeat(256 // len(images) + 1, 1, 1, 1)[:256].contiguous().cuda()
    for kind in (*TRAINING_KINDS, *HELD_OUT_KINDS):
        if kind not in available_kinds() or (kind == "frost" and not frost.found()):
            continue
        for severity in range(1, 6):
            times = cuda_percentiles_ms(lambda k=kind, s=severity: corrupt(batch, k, s, range_keys(256)), 15)
            floor = stage_bytes(kind, severity), least_bytes(kind)
            out["cells"][f"{kind} {severity}"] = timed(times, 256, *floor)
            print(kind, severity, out["cells"][f"{kind} {severity}"], flush=True)
        keep(out)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=Path, help="folder of JPEG photographs (default: scikit-image's)")
    parser.add_argument("--count", type=int, default=16, help="photographs to use")
    parser.add_argument("--no-reference", action="store_true", help="do not time imagecorruptions")
    parser.add_argument("--no-cpu", action="store_true", help="CUDA only")
    parser.add_argument("--no-tests", action="store_true", help="do not run the parity tests first")
    parser.add_argument("--out", type=Path, help="write the numbers here as JSON")
    options = parser.parse_args()
    if not options.no_tests:
        tests = [str(p) for p in sorted((ROOT / "tests").glob("test_corruptions_*.py"))]
        done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "not slow", *tests], cwd=ROOT)
        if done.returncode != 0:
            sys.exit("the corruption tests fail: no numbers on red")
    images = photographs(options.photos, options.count)
    result: dict[str, Any] = {**environment(), "shape": [SIDE, SIDE, 3]}

    def keep(part: str, found: Any) -> None:
        result[part] = found
        if options.out:
            write_result(options.out, result)

    if not options.no_cpu:
        keep("on_cpu", measure_cpu(images, not options.no_reference))
        print(cpu_table(result["on_cpu"]["cells"]))
        print(json.dumps(result["on_cpu"]["summary"], indent=1))
    if torch.cuda.is_available() and core.has_cuda():
        keep("on_cuda", measure_cuda(images, lambda found: keep("on_cuda", found)))
    else:
        keep("on_cuda", "not measured: no CUDA device")


if __name__ == "__main__":
    main()
