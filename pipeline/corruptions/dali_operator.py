"""The DALI front: the operator fn.vqsa.corrupt, for CPU and GPU graphs.

    from pipeline.corruptions import dali_operator
    dali_operator.load()
    images = fn.vqsa.corrupt(images, kind=kind, severity=severity, key=key, flavour="bethge")

Images are uint8 HWC; kind and severity are int32 or int64 scalars per sample, key is INT64 with the
bits of a uint64 (in numpy: keys.view(np.int64)), all on the CPU.
"""

from __future__ import annotations

import functools
from pathlib import Path

from pipeline.corruptions import core, frost

PLUGIN = Path(__file__).with_name("libvqsa_dali.so")


def compiled_version(plugin: Path = PLUGIN) -> str:
    """Return the DALI version that the plugin was compiled against, read from its bytes."""
    if not plugin.is_file():
        raise FileNotFoundError(
            f"{plugin} is missing: the native part is not built; run pip install -e . in the project's folder"
        )
    marker = b"vqsa compiled against DALI "
    content = plugin.read_bytes()
    start = content.find(marker)
    if start < 0:
        raise ValueError(f"{plugin} does not say which DALI it was compiled against; reinstall vqsa")
    return content[start + len(marker) :].split(b"\0", 1)[0].decode()


def check_version(installed: str, compiled: str) -> None:
    """Raise ValueError unless the two DALI versions are the same."""
    if installed != compiled:
        raise ValueError(
            f"the corruption operator was compiled against DALI {compiled}, but DALI {installed} is installed, and "
            "DALI's C++ interface changes between versions: rebuild with pip install -e . "
            f"--no-build-isolation, or pip install nvidia-dali-cuda130=={compiled}"
        )


@functools.cache
def load() -> None:
    """Import DALI and load the operator plugin, once per process.

    Raises:
        FileNotFoundError: the native part is not built.
        ValueError: the plugin was compiled against another DALI version.
    """
    compiled = compiled_version()
    # DALI first: the plugin's symbols come from its libraries.
    import nvidia.dali as dali
    from nvidia.dali import plugin_manager

    check_version(dali.__version__, compiled)
    core.library()
    frost.load_if_found()
    plugin_manager.load_library(str(PLUGIN))
