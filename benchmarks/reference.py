"""PyPI imagecorruptions 1.1.2 on current libraries: what tests and benchmarks compare with.

The package itself is left as it is; what it needs of older libraries is put in its place at run time.
"""

# ruff: noqa: NPY002 - the reference draws from NumPy's global generator

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def reference() -> Any | None:
    """Return imagecorruptions.corruptions on current libraries, or None where it is not installed.

    All 19 kinds draw from NumPy's global generator, so np.random.seed decides every pixel.
    """
    if importlib.util.find_spec("imagecorruptions") is None:
        return None
    shim = types.ModuleType("pkg_resources")

    def resource_filename(package: str, path: str) -> str:
        spec = importlib.util.find_spec(package.split(".")[0])
        assert spec is not None
        return str(Path(next(iter(spec.submodule_search_locations or ()))) / path)

    shim.resource_filename = resource_filename  # type: ignore[attr-defined]
    stands_in = sys.modules.setdefault("pkg_resources", shim) is shim
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import cv2
            import imagecorruptions.corruptions as module
            import skimage.color
            import skimage.util
            from skimage.filters import gaussian
    finally:
        if stands_in:  # others take it for the whole of setuptools' module
            del sys.modules["pkg_resources"]

    cv2.setNumThreads(1)

    def gaussian_today(image: Any, *args: Any, multichannel: bool = False, **kwargs: Any) -> Any:
        return gaussian(image, *args, channel_axis=-1 if multichannel else None, **kwargs)

    def random_noise_of_global_generator(image: Any, **kwargs: Any) -> Any:
        """Current scikit-image draws impulse noise from a fresh generator; older ones drew as here."""
        noisy: Any = skimage.util.random_noise
        return noisy(image, rng=np.random.mtrand._rand, **kwargs)

    module.gaussian = gaussian_today
    noise = types.SimpleNamespace(random_noise=random_noise_of_global_generator)
    module.sk = types.SimpleNamespace(util=noise, color=skimage.color)
    if not hasattr(np, "float_"):
        np.float_ = np.float64  # type: ignore[attr-defined]  # noqa: NPY201
    return module


def glass_offsets(height: int, width: int, reach: int, iterations: int) -> np.ndarray:
    """Draw what the reference's glass blur draws, from NumPy's global generator, in its order.

    Returns:
        (pixels visited, 2) int64, the (dx, dy) of one visit after another.
    """
    visits = iterations * (height - 2 * reach) * (width - 2 * reach)
    return np.random.randint(-reach, reach, size=(visits, 2))


@functools.cache
def glass_shuffle() -> Callable[[np.ndarray, tuple[int, ...], tuple[float, int, int], np.ndarray], None]:
    """Return the reference's own loop of glass blur, compiled by numba: f(image, shape, constants, offsets).

    The loop is read from the installed package; only its draw is replaced by the next of `offsets`.

    Raises:
        ImportError: numba is not installed.
    """
    import numba

    module = reference()
    assert module is not None

    class NextOffset(ast.NodeTransformer):
        def visit_Call(self, node: ast.Call) -> ast.AST:
            self.generic_visit(node)
            drawn = ast.unparse(node.func) == "np.random.randint"
            return ast.parse("next(offsets)", mode="eval").body if drawn else node

    tree = ast.parse(inspect.getsource(module.glass_blur))
    loop = next(node for node in ast.walk(tree) if isinstance(node, ast.For))
    function = ast.parse("def shuffle(x, x_shape, c, drawn):\n    offsets = iter(drawn)")
    assert isinstance(function.body[0], ast.FunctionDef)
    function.body[0].body.append(NextOffset().visit(loop))
    scope: dict[str, Any] = {}
    exec(compile(ast.fix_missing_locations(function), "imagecorruptions' loop of glass_blur", "exec"), scope)
    return numba.njit(scope["shuffle"])  # type: ignore[no-any-return]


def glass_blur_by_numba(image: Any, severity: int) -> np.ndarray:
    """The reference's glass blur, pixel for pixel, with its loop compiled: some 5 ms instead of 600."""
    module = reference()
    assert module is not None
    c = ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))[severity - 1]
    smooth: np.ndarray = module.gaussian(np.array(image) / 255.0, sigma=c[0], multichannel=True)
    x = (smooth * 255).astype(np.uint8)
    glass_shuffle()(x, x.shape, c, glass_offsets(x.shape[0], x.shape[1], c[1], c[2]))
    out: np.ndarray = np.clip(module.gaussian(x / 255.0, sigma=c[0], multichannel=True), 0, 1) * 255
    return out
