"""The torch operator: registration, tracing, CUDA against CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_corruptions_core import picture

from pipeline.corruptions import available_kinds, corrupt, frost
from pipeline.corruptions.torch_operator import _corrupt


def test_opcheck() -> None:
    images = torch.stack([picture(32, 40), picture(32, 40, seed=1)])
    plan = torch.tensor([[1, 12], [3, 2], [5, -7]])
    torch.library.opcheck(_corrupt, (images, plan, 0, -1))


def test_compiles_in_one_graph() -> None:
    images = torch.stack([picture(32, 40), picture(32, 40, seed=1)])
    plan = torch.tensor([[1, 12], [3, 2], [5, -7]])

    def step(x: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        return _corrupt(x, p, 0, -1).float().mean((1, 2)) / 255

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(images, plan), step(images, plan))


@pytest.mark.parametrize(
    ("kind", "severity", "keys"),
    [("fog", 3, (42, 2**63 + 5)), (["snow", 1], [5, 2], ([8, 9], [1, 2])), (4, 1, (0, 1))],
)
def test_the_public_function_compiles_in_one_graph(kind: Any, severity: Any, keys: tuple[Any, Any]) -> None:
    images = torch.stack([picture(32, 40), picture(32, 40, seed=1)])

    def step(x: torch.Tensor, key: Any) -> torch.Tensor:
        return corrupt(x, kind, severity, key).float().mean((1, 2)) / 255

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for key in keys:
        assert torch.equal(compiled(images, key), step(images, key))


def test_threads_do_not_change_the_result() -> None:
    images = torch.stack([picture(48, 40, seed=s) for s in range(9)])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = corrupt(images, "gaussian_noise", 3, list(range(9)))
        torch.set_num_threads(4)
        assert torch.equal(one, corrupt(images, "gaussian_noise", 3, list(range(9))))
    finally:
        torch.set_num_threads(before)


@pytest.mark.gpu
@pytest.mark.parametrize("flavour", ["hendrycks", "bethge"])
@pytest.mark.parametrize("size", [(224, 224), (33, 47), (64, 64), (32, 32)])
def test_cuda_equals_cpu(size: tuple[int, int], flavour: str) -> None:
    """At most one grey level apart on 99.9 % of values, in one mixed batch."""
    kinds = [k for k in available_kinds() if k != "frost" or frost.found()]
    for severity in range(1, 6):
        images = torch.stack([picture(*size, seed=s) for s in range(len(kinds))])
        keys = [severity * 100 + i for i in range(len(kinds))]
        want = corrupt(images, kinds, severity, keys, flavour=flavour)
        got = corrupt(images.cuda(), kinds, severity, keys, flavour=flavour).cpu()
        for i, kind in enumerate(kinds):
            far = ((got[i].int() - want[i].int()).abs() > 1).float().mean().item()
            assert far <= 1e-3, f"{kind} {severity}: {far:.2%} of values differ"


@pytest.mark.gpu
def test_cuda_runs_on_the_current_stream() -> None:
    images = torch.zeros(64, 224, 224, 3, dtype=torch.uint8, device="cuda")
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        out = corrupt(images, "contrast", 3, 0)
        assert not stream.query(), "corrupt waited for the device"
    stream.synchronize()
    assert out.sum().item() == 0


@pytest.mark.gpu
def test_kind_severity_and_key_stay_on_the_host() -> None:
    with pytest.raises(ValueError, match="on the CPU"):
        corrupt(
            torch.zeros(1, 32, 32, 3, dtype=torch.uint8, device="cuda"), "fog", torch.tensor([1]).cuda(), 0
        )
