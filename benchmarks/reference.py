"""PyPI imagecorruptions 1.1.2 on current libraries: what tests and benchmarks compare with.

The package itself is left as it is; what it needs of older libraries is put in its place at run time.
"""

from __future__ import annotations

import importlib.util
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np


def reference() -> Any | None:
    """Return imagecorruptions.corruptions on current libraries, or None where it is not installed."""
    if importlib.util.find_spec("imagecorruptions") is None:
        return None
    shim = types.ModuleType("pkg_resources")

    def resource_filename(package: str, path: str) -> str:
        spec = importlib.util.find_spec(package.split(".")[0])
        assert spec is not None
        return str(Path(next(iter(spec.submodule_search_locations or ()))) / path)

    shim.resource_filename = resource_filename  # type: ignore[attr-defined]
    sys.modules.setdefault("pkg_resources", shim)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import cv2
        import imagecorruptions.corruptions as module
        from skimage.filters import gaussian

    cv2.setNumThreads(1)

    def gaussian_today(image: Any, *args: Any, multichannel: bool = False, **kwargs: Any) -> Any:
        return gaussian(image, *args, channel_axis=-1 if multichannel else None, **kwargs)

    module.gaussian = gaussian_today
    if not hasattr(np, "float_"):
        np.float_ = np.float64  # type: ignore[attr-defined]  # noqa: NPY201
    return module
