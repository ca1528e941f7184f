"""The DALI operator: the same pixels as the torch front, in a CPU graph; a GPU graph that serialises."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pipeline.corruptions import KINDS, available_kinds, corrupt, dali_operator, frost

dali = pytest.importorskip("nvidia.dali")


@pytest.fixture(scope="module", autouse=True)
def _operator() -> None:
    dali_operator.load()


def build(
    images: list[np.ndarray], kind: Any, severity: Any, key: Any, device: str = "cpu", **options: str
) -> Any:
    fn, types = dali.fn, dali.types

    @dali.pipeline_def(batch_size=len(images), num_threads=2, device_id=0 if device == "gpu-run" else None)
    def graph() -> Any:
        x = fn.external_source(source=lambda: images, batch=True, dtype=types.UINT8, ndim=3, layout="HWC")
        if device != "cpu":
            x = x.gpu()

        def scalar(values: Any) -> Any:
            if not isinstance(values, np.ndarray):
                return values
            kinds = {np.dtype(np.int32): types.INT32, np.dtype(np.int64): types.INT64}
            return fn.external_source(source=lambda: values, batch=True, dtype=kinds[values.dtype], ndim=0)

        return fn.vqsa.corrupt(x, kind=scalar(kind), severity=scalar(severity), key=scalar(key), **options)

    return graph()


def batch(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.integers(0, 256, (40 + i, 50, 3), dtype=np.uint8) for i in range(count)]


@pytest.mark.parametrize("device", ["cpu", pytest.param("gpu-run", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_same_pixels_as_the_torch_front(dtype: type, device: str) -> None:
    kinds = [k for k in available_kinds() if k != "frost" or frost.found()]
    images = batch(len(kinds))
    kind = np.array([KINDS.index(k) for k in kinds], dtype)
    severity = (np.arange(len(kinds)) % 5 + 1).astype(dtype)
    keys = np.random.default_rng(5).integers(0, 2**64, len(kinds), dtype=np.uint64)
    for flavour in ("hendrycks", "bethge"):
        pipe = build(images, kind, severity, keys.view(np.int64), device=device, flavour=flavour)
        pipe.build()
        (out,) = pipe.run()
        assert out.layout() == "HWC"
        if device == "gpu-run":
            out = out.as_cpu()
        for i, name in enumerate(kinds):
            want = corrupt(torch.from_numpy(images[i]), name, int(severity[i]), int(keys[i]), flavour=flavour)
            far = np.abs(out.at(i).astype(int) - want.numpy()) > (0 if device == "cpu" else 1)
            assert far.mean() <= (0 if device == "cpu" else 1e-3), f"{name} {flavour}"


def test_constants_as_arguments() -> None:
    images = batch(2)
    pipe = build(images, 12, 3, 9, constants="cifar10")
    pipe.build()
    want = corrupt(torch.from_numpy(images[1]), "contrast", 3, 9, constants="cifar10")
    assert np.array_equal(pipe.run()[0].at(1), want.numpy())


@pytest.mark.parametrize(
    ("kind", "severity", "options", "match"),
    [
        (12, 6, {}, "severity is 6"),
        (55, 1, {}, "kind 55 is unknown"),
        (12, 1, {"flavour": "betghe"}, "unknown flavour"),
        (12, 1, {"constants": "tiny"}, "unknown constants"),
    ],
)
def test_bad_arguments(kind: int, severity: int, options: dict[str, str], match: str) -> None:
    with pytest.raises(Exception, match=match):  # noqa: PT012
        pipe = build(batch(1), kind, severity, 0, **options)
        pipe.build()
        pipe.run()


def test_gpu_graph_serialises_without_a_driver() -> None:
    graph = build(batch(2), np.zeros(2, np.int32), np.ones(2, np.int32), np.zeros(2, np.int64), device="gpu")
    assert b"vqsa__Corrupt" in graph.serialize()


def test_another_dali_version_is_refused() -> None:
    assert dali_operator.compiled_version() == dali.__version__
    with pytest.raises(ValueError, match=r"compiled against DALI 2\.3\.0, but DALI 2\.4\.0"):
        dali_operator.check_version("2.4.0", "2.3.0")


def test_missing_plugin_says_what_to_do(tmp_path: Any) -> None:
    with pytest.raises(FileNotFoundError, match="pip install -e"):
        dali_operator.compiled_version(tmp_path / "libvqsa_dali.so")
