"""tools/check_results.py: published numbers, missing cells, and pairs that do not fit."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, data_root

from pipeline.corruptions import HELD_OUT_KINDS, TRAINING_KINDS
from tools.check_results import CheckCommand, check, pair_flags, text
from tools.runtime.alexnet import ALEXNET_CLEAN_ERROR, ALEXNET_ERROR
from tools.runtime.results import C_BAR_KINDS

# Per-cell accuracies of published models (RobustBench) and their mCE with AlexNet's errors to four decimals.
PUBLISHED = {
    "AlexNet": 99.97,
    "Standard_R50": 76.37,
    "Hendrycks2020AugMix": 64.17,
    "Tian2022Deeper_DeiT-S": 47.62,
    "Erichson2022NoisyMix_new": 59.43,
}


def table(path: Path, rows: list[tuple[object, ...]], header: str = "model,corruption,severity,top1") -> Path:
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


def cells(top1: dict[str, float], model: str = "m") -> list[tuple[object, ...]]:
    return [(model, kind, s, value) for kind, value in top1.items() for s in range(1, 6)]


@pytest.fixture
def oracle() -> Path:
    root = data_root()
    path = root / "oracles" / "imagenet_c_cells.csv" if root else None
    if path is None or not path.is_file():
        pytest.skip("oracles/imagenet_c_cells.csv is not there: set VQSA_DATA to the folder that holds it")
    return path


def test_mce_of_published_models(oracle: Path) -> None:
    found = check(CheckCommand(cells=oracle))
    assert {model: round(f["mce"], 2) for model, f in found.items()} == PUBLISHED
    assert found["Standard_R50"]["known"] == pytest.approx(0.3948, abs=5e-5)
    assert not any(f["missing_cells"] or f["flags"] for f in found.values())


def test_the_released_mistake_only_when_asked_for(oracle: Path, tmp_path: Path) -> None:
    """Its mCE as computed from the published list operations, with torchvision's clean accuracies."""
    rows = [*csv.reader(oracle.open())][1:]
    clean = {"AlexNet": 0.56522, "Standard_R50": 0.7613}
    rows = [row for row in rows if row[0] in clean] + [[m, "clean", 0, a] for m, a in clean.items()]
    path = table(tmp_path / "cells.csv", [tuple(row) for row in rows])
    assert check(CheckCommand(cells=path))["Standard_R50"]["mce"] == pytest.approx(76.37, abs=0.005)
    wrong = check(CheckCommand(cells=path, released_mce_bug=True))
    assert wrong["Standard_R50"]["mce"] == pytest.approx(72.96, abs=0.05)
    assert wrong["AlexNet"]["mce"] == pytest.approx(96.63, abs=0.05)
    without = table(tmp_path / "no_clean.csv", cells(dict.fromkeys(TRAINING_KINDS, 0.5)))
    with pytest.raises(ValueError, match="needs the clean cell and all 15"):
        check(CheckCommand(cells=without, released_mce_bug=True))


def test_alexnet_against_itself() -> None:
    assert {*TRAINING_KINDS, *HELD_OUT_KINDS} == ALEXNET_ERROR.keys()


def test_relative_mce(tmp_path: Path) -> None:
    """AlexNet's own is 100; a model that loses nothing has 0."""
    alexnet = [
        *cells({k: 1 - e for k, e in ALEXNET_ERROR.items()}),
        ("m", "clean", 0, 1 - ALEXNET_CLEAN_ERROR),
    ]
    found = check(CheckCommand(cells=table(tmp_path / "a.csv", alexnet)))["m"]
    assert (found["mce"], found["relative_mce"]) == (pytest.approx(100), pytest.approx(100))
    steady = [*cells(dict.fromkeys(TRAINING_KINDS, 0.7)), ("m", "clean", "", 0.7)]
    assert check(CheckCommand(cells=table(tmp_path / "b.csv", steady)))["m"]["relative_mce"] == pytest.approx(
        0
    )


@pytest.mark.parametrize(
    ("held_out", "mean"),
    [
        ((35.5, 49.2, 41.9, 60.2), 46.70),  # vanilla; table 3 prints 46.7
        ((68.4, 54.1, 55.7, 62.8), 60.25),  # VQSA; table 3 prints 60.2
        ((63.1, 50.5, 54.0, 62.3), 57.48),  # QualNet; table 3 prints 58.1, which its own cells do not give
    ],
)
def test_held_out_averages_of_table_4(tmp_path: Path, held_out: tuple[float, ...], mean: float) -> None:
    rows = cells({k: v / 100 for k, v in zip(HELD_OUT_KINDS, held_out, strict=True)})
    found = check(CheckCommand(cells=table(tmp_path / "t4.csv", rows)))["m"]
    assert 100 * found["unknown"] == pytest.approx(mean, abs=0.006)
    assert (found["known"], found["mce"], found["missing_cells"]) == (None, None, [])


def test_missing_cells_are_named_and_no_mce_given(tmp_path: Path) -> None:
    rows = [
        row for row in cells(dict.fromkeys(TRAINING_KINDS, 0.5)) if row[1:3] not in {("fog", 3), ("fog", 4)}
    ]
    path = table(tmp_path / "cells.csv", rows)
    found = check(CheckCommand(cells=path))["m"]
    assert (found["missing_cells"], found["mce"], found["known"]) == (["fog 3", "fog 4"], None, None)
    partly = check(CheckCommand(cells=path, partial=True))["m"]
    assert partly["mce_kinds"] == 14
    assert partly["mce"] is not None
    run = subprocess.run(
        [sys.executable, "tools/check_results.py", str(path), "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert "m: missing fog 3, fog 4" in run.stderr
    assert json.loads(run.stdout)["m"]["mce"] is None


def test_pairs_outside_the_band_are_flagged(tmp_path: Path) -> None:
    """Pairs of the paper's table 3: DDP's and URIE's are not of one evaluation, VQSA's may be."""
    path = table(
        tmp_path / "printed.csv",
        [("DDP", 0.482, 62.78), ("URIE", 0.551, 55.7), ("VQSA", 0.656, 43.1)],
        "model,known,mce",
    )
    found = check(CheckCommand(cells=path))
    assert [bool(f["flags"]) for f in found.values()] == [True, True, False]
    assert "ratio mCE / mean error 1.212 is outside 1.252-1.285" in found["DDP"]["flags"][0]
    assert pair_flags(1.5, 40) == ["known 1.5 is no fraction below 1"]


def test_better_than_clean_is_flagged(tmp_path: Path) -> None:
    rows = [*cells({**dict.fromkeys(TRAINING_KINDS, 0.5), "fog": 0.9}), ("m", "clean", 0, 0.7)]
    (flag, *_) = [
        f for f in check(CheckCommand(cells=table(tmp_path / "c.csv", rows)))["m"]["flags"] if "fog" in f
    ]
    assert "fog: 90.00 % is above clean accuracy (70.00 %)" in flag


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("m", "fog", 1, 55)], r"line 2: top1 55 is outside 0\.\.1; it is a fraction, not a percentage"),
        ([("m", "fog", 6, 0.5)], r"severity '6' is outside 0\.\.5"),
        ([("m", "fog", 1, "x")], "top1 'x' is no number"),
        ([("m", "fog", 1, "")], "top1 is empty"),
        ([("m", "fgo", 1, 0.5)], "unknown corruption 'fgo'; did you mean 'fog'"),
        ([("m", "fog", 1, 0.5), ("m", "fog", 1, 0.6)], "m: fog severity 1 stands twice"),
        ([], "no rows"),
    ],
)
def test_impossible_tables_are_refused(tmp_path: Path, rows: list[tuple[object, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(CheckCommand(cells=table(tmp_path / "cells.csv", rows)))


def test_metrics_can_be_chosen(oracle: Path) -> None:
    found = check(CheckCommand(cells=oracle, metrics=("mce", "known")))
    assert set(found["AlexNet"]) == {"mce", "known", "missing_cells", "flags"}
    assert "76.37" in text(found)
    with pytest.raises(ValueError, match="unknown metric 'mec'; did you mean 'mce'"):
        check(CheckCommand(cells=oracle, metrics=("mec",)))


def test_every_metric_can_be_read_without_json(tmp_path: Path) -> None:
    rows = [*cells(dict.fromkeys((*TRAINING_KINDS, *C_BAR_KINDS), 0.5)), ("m", "clean", 0, 0.75)]
    path = table(tmp_path / "cells.csv", rows)

    def printed(*metrics: str) -> list[str]:
        return text(check(CheckCommand(cells=path, metrics=metrics)), metrics).splitlines()

    assert printed("families")[0] == "m: families: noise 50.00, blur 50.00, weather 50.00, digital 50.00"
    assert printed("top1")[0].startswith("m: top1: gaussian_noise 50.00, shot_noise 50.00")
    assert [line.split() for line in printed("c_bar", "mean_error", "mce_kinds")[:2]] == [
        ["model", "c_bar", "mean_error", "mce_kinds"],
        ["m", "50.00", "50.00", "15.00"],
    ]
    assert [line.split() for line in printed("clean", "sets")[:3]] == [
        ["model", "clean"],
        ["m", "75.00"],
        ["m:", "sets:", "-"],
    ]


def test_the_band_is_for_whole_benchmarks(tmp_path: Path) -> None:
    """AlexNet's error on one kind alone says nothing of an average over fifteen."""
    path = table(tmp_path / "cells.csv", cells({"brightness": 0.5}))
    found = check(CheckCommand(cells=path, partial=True))["m"]
    assert found["mce"] / (100 * found["mean_error"]) > 1.5
    assert (found["flags"], found["mce_over_mean_error"]) == ([], None)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no column corruption, severity; wanted model"):
        check(CheckCommand(cells=table(tmp_path / "x.csv", [("m", 1)], "model,top1")))
    with pytest.raises(FileNotFoundError, match="no such file"):
        check(CheckCommand(cells=tmp_path / "absent.csv"))
