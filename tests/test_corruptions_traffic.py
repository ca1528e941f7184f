"""The table of bytes moved names the stages that the core runs; the measured speed is complete."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.traffic import least_bytes, mix_bytes, stage_bytes, stages
from pipeline.corruptions import HELD_OUT_KINDS, KINDS, TRAINING_KINDS

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "pipeline" / "corruptions" / "csrc"
SMALL = {"Clear", "ElasticFilter", "PixelateMap"}  # tables and accumulators of a few kB


def planned(kind: str) -> set[str]:
    """The stages that plan.cpp lists for a kind, by the names of their structs."""
    types = dict(re.findall(r"X\((kStage\w+), (\w+)", (CSRC / "stages.h").read_text()))
    camel = "".join(part.capitalize() for part in kind.split("_"))
    plan = (CSRC / "plan.cpp").read_text()
    fused = re.findall(rf"case k{camel}: \*out = {{(kStage\w+),", plan)
    body = plan[plan.index("std::vector<Step> plan_steps") :]
    listed = re.search(rf"case k{camel}:.*?break;", body, re.DOTALL)
    return {types[name] for name in fused or re.findall(r"kStage\w+", listed.group() if listed else "")}


@pytest.mark.parametrize("kind", [*TRAINING_KINDS, *HELD_OUT_KINDS])
def test_counts_the_stages_of_the_core(kind: str) -> None:
    counted = {one.stage for severity in range(1, 6) for one in stages(kind, severity)}
    assert counted == planned(kind) - SMALL
    for severity in range(1, 6):
        assert stage_bytes(kind, severity) >= least_bytes(kind)


def test_by_hand() -> None:
    pixels = 224 * 224
    assert stage_bytes("brightness", 1) == 6 * pixels
    assert stage_bytes("contrast", 1) == 9 * pixels
    # Severity 2: offsets written and read once, three passes of the image.
    assert stage_bytes("glass_blur", 2) == 2 * 4 * pixels + 3 * 6 * pixels
    assert 6 * pixels < mix_bytes() < max(stage_bytes(k, s) for k in TRAINING_KINDS for s in range(1, 6))


def test_identity_is_no_kind_of_the_table() -> None:
    with pytest.raises(ValueError, match="no bytes are counted for 'identity'"):
        stages(KINDS[0], 1)


def test_the_measured_speed_names_its_machine_and_has_every_cell() -> None:
    result = json.loads(
        sorted((ROOT / "benchmarks" / "results").glob("*-cpu-corruptions.json"))[-1].read_text()
    )
    for key in ("cpu", "commit", "command"):
        assert isinstance(result[key], str), key
    assert not result["commit"].endswith("+dirty")
    cells = {f"{kind} {severity}" for kind in (*TRAINING_KINDS, *HELD_OUT_KINDS) for severity in range(1, 6)}
    assert set(result["on_cpu"]["cells"]) == cells
    assert all(cell["times_faster"] > 1 for cell in result["on_cpu"]["cells"].values())
