"""The codebook benchmark judges by the bounds that it says, and describes the search that it timed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import codebook as benchmark
from benchmarks.codebook_bounds import (
    CDIST,
    CHAIN,
    FEW,
    FORWARD,
    FORWARD_PREPARED,
    GEMM,
    MAIN,
    READ,
    SEARCH,
    floors_us,
    rates_of,
    told,
    verdicts,
)
from benchmarks.codebook_methods import methods
from model.codebook import kernels
from model.codebook.choice import VARIABLE
from model.codebook.kernels import TILE_ANY, TILE_AUTO, TILE_HOPPER, Kernels
from tests.hostile_codebooks import data, relu


def size(at: tuple[int, int, int], **ms: float) -> dict[str, Any]:
    names = {
        "forward": FORWARD, "prepared": FORWARD_PREPARED, "search": SEARCH, "gemm": GEMM, "chain": CHAIN,
        "cdist": CDIST, "read": READ,
    }  # fmt: skip
    rows: dict[str, Any] = {
        names[name]: {"ms": {"p20": 0, "p50": value, "p80": 9e9}} for name, value in ms.items()
    }
    if SEARCH in rows:
        rows[SEARCH]["wrong_pct"] = 0.0
    floors = floors_us(*at, rates_of("NVIDIA H100 80GB HBM3"))
    return {"n": at[0], "k": at[1], "d": at[2], "floors_us": floors, "methods": rows}


def test_verdicts_have_every_bound_and_what_was_not_measured() -> None:
    main = size(MAIN, forward=1.31, prepared=1.15, gemm=1.0, chain=1.2, cdist=10.5)
    few = size(FEW, search=0.2, prepared=0.3, chain=0.29, read=0.14)
    found = [
        (v["at"], v["what"].split(" / ")[-1], v["value"], v["holds"]) for v in verdicts([main, few], True)
    ]
    assert found == [
        (MAIN, GEMM, 1.15, True),
        (MAIN, GEMM, 1.31, False),
        (MAIN, CDIST.replace(CDIST, FORWARD), 8.015, True),
        (FEW, "floor: read_half_codes", 1.465, True),
        (FEW, READ, 1.429, True),
        (MAIN, CHAIN, 0.958, True),
        (FEW, CHAIN, 1.034, False),
        (MAIN, "wrong codes of ours, %", None, None),
        (FEW, "wrong codes of ours, %", 0.0, True),
    ]
    few["methods"][SEARCH]["wrong_pct"] = 0.2
    few["methods"][CHAIN] = {"failed": "out of memory"}
    lines = [told(verdict) for verdict in verdicts([few], True)]
    assert lines[-1] == "MISSED            0.2     <= 0  wrong codes of ours, % at 128 x 100000 x 2048"
    assert [line.split("  ")[0] for line in lines] == ["not measured"] * 3 + ["holds"] * 2 + [
        "not measured",
        "MISSED",
    ]
    assert told(verdicts([main], False)[0]).startswith("not judged")


@pytest.mark.parametrize(("name", "read_us"), [("NVIDIA H100 80GB HBM3", 136.5), ("NVIDIA H200", 95.3)])
def test_floors_are_of_the_device_at_hand(name: str, read_us: float) -> None:
    assert floors_us(*FEW, rates_of(name))["read_half_codes"] == read_us


def test_every_bound_is_of_methods_that_are_measured() -> None:
    measured = methods(*data(relu, 20, 30, 16))
    assert {SEARCH, FORWARD, FORWARD_PREPARED, GEMM, CHAIN, CDIST, READ} <= set(measured)
    assert set(benchmark.SIZES[:2]) == {MAIN, FEW}
    assert len(set(benchmark.SIZES)) == 13


@pytest.mark.parametrize(
    ("wish", "chosen"), [("mma", TILE_AUTO), ("hopper", TILE_HOPPER), ("auto", TILE_ANY)]
)
def test_effort_is_that_of_the_search_that_auto_makes(
    shim: Kernels, monkeypatch: pytest.MonkeyPatch, wish: str, chosen: int
) -> None:
    monkeypatch.setattr(kernels, "kernels", lambda: shim)
    monkeypatch.setattr("model.codebook.choice.Choice.shape", (140, 600, 137))
    monkeypatch.setenv(VARIABLE, wish)
    tiles: list[int] = []
    itself = shim.search

    def spy(*args: Any, **how: Any) -> Any:
        if "alarm_1" not in how:  # a trial's
            tiles.append(how["tile"])
        return itself(*args, **how)

    monkeypatch.setattr(shim, "search", spy)
    z_ND, codes_KD = data(relu, 140, 300, 40)
    found = benchmark.efforts(shim, z_ND, codes_KD)
    assert tiles == [chosen, TILE_AUTO, TILE_HOPPER]
    assert list(found) == ["auto", "mma.sync", "Hopper variant"]
    assert found["auto"]["candidates_per_feature"] >= 1


def test_share_of_wrong_codes() -> None:
    z_ND, codes_KD = torch.zeros(4, 2), torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    exact_N = torch.zeros(4, dtype=torch.int64)

    def share(index_N: Tensor) -> float:
        return benchmark.wrong_pct(index_N, exact_N, z_ND, codes_KD)

    assert share(torch.tensor([0, 2, 0, 0])) == 0
    assert share(torch.tensor([0, 1, 0, 2])) == 25
