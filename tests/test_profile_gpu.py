"""The profiler on a GPU: CUDA events, GPU utilisation, the graph's stages."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from tools.profiling.measure import run
from tools.profiling.session import Session
from tools.runtime.config import RunConfig, read_recipe, validated

TINY = Path(__file__).resolve().parent / "tiny.toml"


@pytest.mark.gpu
def test_a_profile_on_a_gpu(picture_shards: Path, tmp_path: Path) -> None:
    config = validated(RunConfig, {**read_recipe(TINY), "data": picture_shards, "out": tmp_path}, "test")
    # An earlier test's precision would be this one's: Accelerate keeps one state for the process.
    AcceleratorState._reset_state(reset_partial_state=True)  # type: ignore[no-untyped-call, unused-ignore]
    session = Session(config, Accelerator(), rounds=3, seconds=0.05, progress=lambda name: None)
    try:
        found = run(session)
    finally:
        session.close()
    assert found.machine.device == "cuda"
    assert {"fp32", "bf16", "fp16"} == found.machine.peak_tflops.keys()
    named = {stage.name: stage for stage in found.stages}
    for name in ("copy to GPU", "forward", "codebook search", "backward", "optimiser", "decode", "corrupt"):
        assert named[name].counts, name
        assert named[name].device_s is not None, name
    assert found.verdict.gpu_busy_pct is not None
    assert 0 < found.verdict.gpu_busy_pct <= 100
    assert found.verdict.limits
