"""gpu-check: what it chooses, what it needs, what it writes."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_check, needs
from benchmarks.environment import write_result
from benchmarks.steps import ROOT, Step
from tests.test_benchmark_steps import step


def test_a_result_is_gone_on_with_at_the_same_commit_only(tmp_path: Path) -> None:
    machine = {
        "date": "2026-11-21",
        "gpu": "NVIDIA H100 80GB",
        "driver": "1",
        "packages": {},
        "commit": "0123abc",
        "cpu": "a CPU",
        "cpu_cores": 16,
        "photographs": "imagenet-sample.tar",
    }
    file, done = gpu_check.open_result(tmp_path, machine)
    assert (file.name, done) == ("2026-11-21-nvidia-h100-80gb.json", {})
    write_result(file, {**machine, "steps": {"tests-codebook": {"ok": True}}})
    assert gpu_check.open_result(tmp_path, machine) == (file, {"tests-codebook": {"ok": True}})
    assert gpu_check.open_result(tmp_path, {**machine, "photographs": "generated"})[1] == {}
    for commit in ("4567abc", "0123abc+dirty", "unknown"):
        other, done = gpu_check.open_result(tmp_path, {**machine, "commit": commit})
        assert (other.name, done) == ("2026-11-21-nvidia-h100-80gb-2.json", {})
    file.write_text("{")
    assert gpu_check.open_result(tmp_path, machine)[0].name == "2026-11-21-nvidia-h100-80gb-2.json"
    assert file.read_text() == "{"


def names(only: list[str], done: dict[str, Any] | None = None, with_tests: bool = True) -> list[str]:
    every = gpu_check.all_steps(Path("/work"), Path("/photos"))
    return [step.name for step in gpu_check.chosen_steps(every, only, done or {}, with_tests)]


def test_choosing_steps() -> None:
    assert names(["codebook"]) == ["tests-codebook", "codebook"]
    assert names(["codebook"], {"tests-codebook": {"ok": True}}) == ["codebook"]
    assert names(["codebook"], {"tests-codebook": {"ok": False}}) == ["tests-codebook", "codebook"]
    assert names(["training"], with_tests=False) == ["shards", "training"]
    assert names(["evaluation", "loader"]) == ["tests-loader", "loader", "tests-evaluation", "evaluation"]
    assert all(name.startswith("tests-") for name in names(["tests"]))
    assert names([])[-4:] == names(["sanitizers"])
    assert set(names(["tests", "benchmarks", "sanitizers"])) == set(names([]))


def test_the_whole_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With pretended steps: the result file, what is printed, the exit code."""
    out = tmp_path / "results"

    def pretended(work: Path, source: Path) -> list[Step]:
        file = work / "bench.json"
        code = f"import json; json.dump({{'source': {str(source)!r}}}, open({str(file)!r}, 'w'))"
        return [
            step("tests-room"),
            step("bench", code, tests=("tests-room",), result=file),
            step("bad", "1 / 0"),
        ]

    monkeypatch.setattr(gpu_check, "all_steps", pretended)
    monkeypatch.setattr(gpu_check, "stop_on_signals", lambda: None)
    monkeypatch.setattr(gpu_check, "require", lambda chosen: None)
    monkeypatch.setattr(gpu_check, "photographs", lambda work: (Path("/photos"), "photos.tar"))
    environment = importlib.import_module("benchmarks.environment")
    monkeypatch.setattr(environment, "environment", lambda: {"date": "d", "gpu": "G 1", "commit": "unknown"})
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--out", str(out), "--only", "bench", "--commit", "abc"])
    with pytest.raises(SystemExit) as ended:
        gpu_check.main()
    assert ended.value.code == 0
    assert capsys.readouterr().out.endswith("all steps passed\n")
    (file,) = out.iterdir()
    found = json.loads(file.read_text())
    assert list(found["steps"]) == ["tests-room", "bench"]
    assert found["steps"]["bench"]["result"] == {"source": "/photos"}
    assert found["photographs"] == "photos.tar"
    assert (file.name, found["commit"], found["tests_failed"]) == ("d-g-1.json", "abc", {})
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--out", str(tmp_path / "again")])
    with pytest.raises(SystemExit) as ended:
        gpu_check.main()
    assert ended.value.code == 1
    assert "FAILED or not run: bad\n" in capsys.readouterr().out


def test_an_unknown_step_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    every = gpu_check.all_steps(Path("/work"), Path("/photos"))
    with pytest.raises(SystemExit):
        gpu_check.parse(every, ["--only", "codebok"])
    assert "invalid choice: 'codebok' (choose from" in capsys.readouterr().err


def test_every_file_with_gpu_tests_has_its_room() -> None:
    """And every step can be run: programs, files and options exist."""
    every = gpu_check.all_steps(Path("/work"), Path("/photos"))
    with_gpu = {
        f"tests/{path.name}"
        for path in (ROOT / "tests").glob("test_*.py")
        if "pytest.mark.gpu" in path.read_text()
    }
    with_gpu.discard(f"tests/{Path(__file__).name}")
    assert with_gpu == {
        word for s in every for word in s.command if word.startswith("tests/") and "::" not in word
    }
    assert all((ROOT / entry).is_file() for s in every for entry in s.entries)
    assert all(s.about_s <= s.limit_s <= 540 for s in every)


@pytest.mark.slow
def test_what_the_sanitizers_and_rooms_choose_exists() -> None:
    """One collection for each, over the names: an expression that matches nothing would end a step without a test."""
    every = gpu_check.all_steps(Path("/work"), Path("/photos"))
    watched = [s for s in every if "pytest" in s.command and ("-k" in s.command)]
    assert {s.name.split("-")[0] for s in watched} == {"tests", "memcheck", "racecheck"}
    for s in {s.command[s.command.index("pytest") :]: s for s in watched}.values():
        words = s.command[s.command.index("pytest") + 1 :]
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:]
        if s.name.endswith("-codebook"):
            assert "test_hopper_variant_is_exact[163-1301-130-relu]" in done.stdout
        assert "test_cuda_runs_on_the_current_stream" not in done.stdout


def test_sanitizers_see_single_blocks_and_no_polling() -> None:
    for s in gpu_check.all_steps(Path("/work"), Path("/photos")):
        if s.command[0] == "compute-sanitizer":
            assert s.variables["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
            assert ("--report-api-errors" in s.command) == s.name.startswith("memcheck")
            assert "-x" not in s.command


def test_missing_packages_are_named_one_by_one(tmp_path: Path) -> None:
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "__init__.py").write_text("")
    (tmp_path / "ours" / "part.py").write_text(
        "import absent_one.deep\nfrom absent_two import x\nimport json\n"
    )
    (tmp_path / "ours" / "lazy.py").write_text(
        "def f():\n    import absent_three\n\ntry:\n    import absent_four\n"
    )
    with (tmp_path / "ours" / "lazy.py").open("a") as file:
        file.write("except ImportError:\n    pass\n")
    entry = tmp_path / "entry.py"
    entry.write_text("import numpy\nfrom ours import part\nimport ours.lazy\n")
    found = needs.third_party([entry], tmp_path)
    assert found == {"absent_one.deep", "absent_two", "numpy"}
    assert needs.missing_packages(found) == ["absent_one", "absent_two"]


def test_a_package_that_does_not_load_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_package.py").write_text("raise OSError('libcudart.so: no such file')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert needs.missing_packages(["broken_package"]) == ["broken_package (libcudart.so: no such file)"]
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert needs.missing_packages(["nvidia.dali"]) == ["nvidia-dali-cuda130"]


def test_missing_native_parts_are_named(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "libvqsa_records.so").touch()
    found = needs.missing_native_parts(True, tmp_path)
    assert found == [
        "model/codebook/libvqsa_codebook.so",
        "pipeline/corruptions/libvqsa_corrupt.so",
        "pipeline/corruptions/libvqsa_dali.so",
    ]
    assert needs.missing_native_parts(False, tmp_path) == found[:2]


def test_what_each_step_needs() -> None:
    """The kernels alone are measured without DALI, and without what builds shards."""

    def modules(name: str) -> set[str]:
        (found,) = (s for s in gpu_check.all_steps(Path("/work"), Path("/photos")) if s.name == name)
        return needs.third_party(ROOT / entry for entry in found.entries) | set(found.modules)

    for name in ("tests-codebook", "codebook", "tests-corruptions", "corruptions", "memcheck-codebook"):
        assert not {"nvidia.dali", "webdataset", "simplejpeg"} & modules(name), name
    assert {"pytest", "torch", "hypothesis"} & modules("tests-codebook") == {"pytest", "torch"}
    for name in ("tests-loader", "loader"):
        assert {"nvidia.dali", "webdataset", "simplejpeg"} <= modules(name), name
    assert "timm" in modules("evaluation")


def test_nothing_is_run_where_packages_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("torch").cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.setitem(sys.modules, "tyro", None)
    every = gpu_check.all_steps(Path("/work"), Path("/photos"))
    with pytest.raises(
        SystemExit, match="nothing was run, since these are missing here: nvidia-dali-cuda130, tyro"
    ):
        gpu_check.require(gpu_check.chosen_steps(every, ["loader"], {}))


def test_no_gpu_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("torch").cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a CUDA device and torch sees none"):
        gpu_check.require([])


def test_what_is_not_covered_is_said_at_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    frost = importlib.import_module("pipeline.corruptions.frost")
    monkeypatch.setattr(frost, "found", lambda: True)
    assert gpu_check.summary({})["not_covered"] == []
    monkeypatch.setattr(frost, "found", lambda: False)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    first, second = gpu_check.summary({})["not_covered"]
    assert first.startswith("frost: its textures are not here")
    assert second.startswith("the corruptions' DALI operator")


def test_results_are_whole_whenever_the_writer_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "deep" / "result.json"
    write_result(out, {"rows": [1]})

    def cut(self: Path, text: str) -> int:
        with self.open("w") as file:
            file.write(text[:5])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", cut)
    with pytest.raises(KeyboardInterrupt):
        write_result(out, {"rows": [1, 2]})
    assert json.loads(out.read_text()) == {"rows": [1]}
