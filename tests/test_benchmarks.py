"""How the benchmarks count and keep: nothing that was ready is measured, nothing that was measured is lost."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import codebook, codebook_methods, corruptions, evaluation, loader
from benchmarks.codebook_bounds import RATES
from benchmarks.reference import reference
from model.codebook import nearest_code


def test_batches_that_were_ready_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A queue of six that fills whenever nobody looks; a batch takes a second of a pretended clock."""
    now_s, calls = 0.0, 0

    def step() -> int:
        nonlocal now_s, calls
        now_s += 0.0 if calls % 17 < 6 else 1.0
        calls += 1
        return 4

    monkeypatch.setattr(loader.time, "perf_counter", lambda: now_s)
    monkeypatch.setattr(loader, "_cpu_s", lambda: now_s)
    found = loader._measure(step, 10, 3, ready=6)
    assert calls == 3 * 17
    assert set(found["img_per_s"].values()) == {4.0}


def test_dalis_own_reader_decodes_as_the_loader_does() -> None:
    """Exact against exact; DALI's defaults are what decode = "fast" sets."""
    backend = pytest.importorskip("nvidia.dali").backend
    schema = backend.GetSchema("decoders__ImageRandomCrop")
    exact = loader.decoder_settings(0, "exact")
    assert exact == {"hw_decoder_load": 0.0, "jpeg_fancy_upsampling": True}
    assert all(schema.HasArgument(name) for name in exact)
    assert loader.decoder_settings(0, "fast") == {}
    assert float(schema.GetArgumentDefaultValueString("hw_decoder_load")) == pytest.approx(0.65)
    assert schema.GetArgumentDefaultValueString("jpeg_fancy_upsampling") == "False"


def test_the_hardware_decoder_is_compared_with_the_hardware_decoder() -> None:
    ours = "loader, 15 kinds + clean"
    rates = {ours: 8.0, loader._NATIVE: 10.0, ours + loader._FAST: 30.0, loader._NATIVE + loader._FAST: 40.0}
    rows = {name: {"img_per_s": {"p50": rate}} for name, rate in rates.items()}
    found = loader.ratios(rows, ours)
    assert found == {loader._NATIVE: {"img_per_s": 0.8}, loader._NATIVE + loader._FAST: {"img_per_s": 0.75}}


def failing(message: str) -> Any:
    def work() -> None:
        raise RuntimeError(message)

    return work


def measured(methods: dict[str, Any], kept: list[Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(codebook, "methods", lambda z_ND, codes_KD: methods)
    command = codebook.CodebookBenchmark(repeats=3)
    return codebook.measure(command, 8, 5, 4, torch.device("cpu"), RATES[0], kept.append)


def test_a_method_of_others_that_fails_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    z_ND, codes_KD = codebook.vectors("relu", 8, 5, 4, torch.device("cpu"))
    ours = {"ours: forward": lambda: nearest_code(z_ND, codes_KD)}
    kept: list[Any] = []
    found = measured({"half GEMM": failing("CUDA error: invalid argument"), **ours}, kept, monkeypatch)
    assert found["methods"]["half GEMM"] == {"failed": "RuntimeError: CUDA error: invalid argument"}
    assert found["methods"]["ours: forward"]["wrong_pct"] == 0
    assert kept == []


def test_where_ours_fails_what_was_measured_is_kept_first(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    with pytest.raises(RuntimeError, match="illegal address"):
        measured({"half GEMM": lambda: None, "ours: forward": failing("illegal address")}, kept, monkeypatch)
    (rows,) = kept
    assert "ms" in rows["half GEMM"]
    assert rows["ours: forward"] == {"failed": "RuntimeError: illegal address"}


def test_a_library_that_cannot_be_set_up_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(z_ND: torch.Tensor, codes_KD: torch.Tensor) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr(codebook_methods, "faiss_flat", no_room)
    found = codebook_methods.installed_methods(torch.zeros(2, 3), torch.zeros(4, 3))
    with pytest.raises(RuntimeError, match="no room"):
        found["faiss flat L2"]()


def test_corruptions_are_written_part_by_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "corruptions.json"

    def cut_off(images: torch.Tensor, keep: Any) -> dict[str, Any]:
        keep({"mix": {32: 1}})
        raise KeyboardInterrupt

    monkeypatch.setattr(corruptions, "measure_cuda", cut_off)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")
    monkeypatch.setattr(corruptions.core, "has_cuda", lambda: True)
    monkeypatch.setattr(corruptions, "photographs", lambda folder, count: torch.zeros(1, 224, 224, 3))
    monkeypatch.setattr(sys, "argv", ["corruptions.py", "--no-tests", "--no-cpu", "--out", str(out)])
    with pytest.raises(KeyboardInterrupt):
        corruptions.main()
    assert json.loads(out.read_text())["on_cuda"] == {"mix": {"32": 1}}


@pytest.mark.parametrize("suffix", ["jpg", "JPEG"])
def test_photographs_are_found_by_either_ending(tmp_path: Path, suffix: str) -> None:
    from PIL import Image

    (tmp_path / "class0").mkdir()
    Image.new("RGB", (300, 260), (200, 10, 10)).save(tmp_path / "class0" / f"a.{suffix}", format="jpeg")
    found = corruptions.photographs(tmp_path, 2)
    assert found.shape == (2, 224, 224, 3)
    assert (found[..., 0] > 190).all()


def test_evaluation_ratios_use_medians() -> None:
    ms = {name: {"p20": t, "p50": t, "p80": t} for name, t in (("ours", 1.2), ("forward", 1.0))}
    found = evaluation.compared(ms)
    assert found == {"ms": ms, "over_forward": 1.2}
    ms["per cell"] = {"p20": 5.0, "p50": 6.0, "p80": 7.0}
    found = evaluation.compared(ms)
    assert found["per_cell_over_ours"] == pytest.approx(5)
    assert found["without_model"] == pytest.approx(25)
    assert "ours costs 1.20 x the forward passes, over 96 cells (cpu)" in evaluation.in_words(
        found, 96, "cpu"
    )
    ms["ours"]["p80"] = 2.0
    assert evaluation.compared(ms)["without_model"] is None


def test_the_reference_leaves_no_stand_in_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unfinished `pkg_resources` breaks whoever looks for it later in the process, torch's compiler for one."""
    if importlib.util.find_spec("imagecorruptions") is None:
        pytest.skip("imagecorruptions is not installed")
    monkeypatch.delitem(sys.modules, "pkg_resources", raising=False)
    reference()
    assert "pkg_resources" not in sys.modules
