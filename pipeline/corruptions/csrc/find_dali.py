"""Print, for CMake, DALI's version and folder and the folders of the CUDA headers, ';' between them.

Nothing is imported: finding a package's files must not load its libraries.
"""

import importlib.metadata
import importlib.util
import sys
from pathlib import Path


def package_dir(name: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def dali_version() -> str:
    for name in ("nvidia-dali-cuda130", "nvidia-dali-cuda120"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    sys.exit("no nvidia-dali-cuda130 package found; pip install nvidia-dali-cuda130")


def main() -> None:
    version = dali_version()
    dali = package_dir("nvidia.dali")
    if dali is None:
        sys.exit("nvidia.dali has no folder; reinstall nvidia-dali-cuda130")
    nvidia = package_dir("nvidia")
    candidates = []
    if nvidia is not None:
        candidates += [nvidia / "cu13" / "include", nvidia / "cuda_runtime" / "include"]
        candidates += [nvidia / "cu13" / "include" / "cccl", nvidia / "cuda_cccl" / "include"]
        candidates += [nvidia / "cuda_nvcc" / "include", nvidia / "cuda_crt" / "include"]
    candidates.append(Path("/usr/local/cuda/include"))
    includes = [str(path) for path in candidates if path.is_dir()]
    if not any((Path(path) / "cuda_runtime.h").is_file() for path in includes):
        sys.exit(
            "no cuda_runtime.h; pip install 'nvidia-cuda-runtime>=13,<14' nvidia-cuda-crt nvidia-cuda-cccl"
        )
    print(";".join([version, str(dali), *includes]))


if __name__ == "__main__":
    main()
