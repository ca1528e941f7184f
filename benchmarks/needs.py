"""What is missing here to run a set of files: packages that cannot be imported, native parts that were not built.

Imports are followed through the project's own files, those inside functions and `try` left out: they are optional.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Where the package's name is not the module's.
_PACKAGES = {"PIL": "pillow", "nvidia.dali": "nvidia-dali-cuda130", "skimage": "scikit-image"}
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.Try)


def _own_files(module: str, root: Path) -> list[Path]:
    """The project's files that importing a module loads; none for a module that is not the project's."""
    parts = module.split(".")
    for base in (root, root / "tests"):  # pytest puts the folder of a test on the path
        found = []
        for depth in range(1, len(parts) + 1):
            place = base.joinpath(*parts[:depth])
            found += [file for file in (place / "__init__.py", place.with_suffix(".py")) if file.is_file()]
        if found:
            return found
    return []


def _imports(node: ast.AST) -> Iterator[tuple[str, list[str]]]:
    """Modules that a file imports as it is loaded, each with the submodules that may be meant."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, []) for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.module:
            yield child.module, [f"{child.module}.{alias.name}" for alias in child.names]
        elif not isinstance(child, _FUNCTIONS):
            yield from _imports(child)


def third_party(entries: Iterable[Path], root: Path = ROOT) -> set[str]:
    """Return the modules of others that these files and the project's files behind them import."""
    waiting, seen, found = list(entries), set(), set()
    while waiting:
        file = waiting.pop()
        if file in seen:
            continue
        seen.add(file)
        for module, parts in _imports(ast.parse(file.read_text())):
            if module.split(".")[0] in sys.stdlib_module_names:
                continue
            own = [path for name in (module, *parts) for path in _own_files(name, root)]
            waiting += own
            if not own:
                found.add(module)
    return found


def missing_packages(modules: Iterable[str]) -> list[str]:
    """Import them; return what fails, by the package's name and, where it is there but broken, the reason."""
    missing = []
    for module in sorted(set(modules)):
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            absent = error.name or module
            name = absent if not module.startswith(f"{absent}.") else module
            missing.append(_PACKAGES.get(name, name.split(".")[0]))
        except Exception as error:  # whatever keeps it from loading is worth a line
            missing.append(f"{module} ({error})")
    return sorted(set(missing))


def missing_native_parts(with_dali: bool, root: Path = ROOT) -> list[str]:
    """Return the native parts that are not built, or are built without CUDA."""
    parts = ["shards/libvqsa_records.so", "model/codebook/libvqsa_codebook.so"]
    parts += ["pipeline/corruptions/libvqsa_corrupt.so"]
    parts += ["pipeline/corruptions/libvqsa_dali.so"] if with_dali else []
    missing = [part for part in parts if not (root / part).is_file()]
    if not missing:
        from pipeline.corruptions import core

        if not core.has_cuda():
            missing.append("the CUDA side of pipeline/corruptions/libvqsa_corrupt.so")
    return missing
