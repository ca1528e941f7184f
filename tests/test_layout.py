"""The arrows between the rooms: who may import whom."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = {"shards", "pipeline", "model", "tools", "train", "benchmarks", "tests"}
ALLOWED = {
    "shards": {"shards"},
    "model": {"model"},
    "pipeline": {"pipeline", "shards"},
    "tools": {"tools", "model", "pipeline", "shards", "train"},
}
HEAVY = {"shards": {"torch", "nvidia", "torchvision", "accelerate"}, "model": {"nvidia", "accelerate"}}


def imports(path: Path) -> set[str]:
    """Top-level names of every module a file imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


def files(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_point_one_way(room: str) -> None:
    assert files(room)
    wrong = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files(room)
        for name in imports(path) & OURS - ALLOWED[room]
    }
    assert not wrong


@pytest.mark.parametrize("room", HEAVY)
def test_rooms_stay_light(room: str) -> None:
    wrong = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files(room)
        for name in imports(path) & HEAVY[room]
    }
    assert not wrong


def test_helpers_of_the_loop_know_no_rooms_internals() -> None:
    """tools/runtime is used by the commands, and uses none of them."""
    for path in (ROOT / "tools" / "runtime").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("tools."):
                assert node.module.startswith("tools.runtime"), path
