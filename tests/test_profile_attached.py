"""The profile that is attached to a training run: what falls into which piece."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
from torch import nn

from tools.profiling import attached
from tools.profiling.attached import StepProfile


class Slow(nn.Module):
    """Takes 30 ms forward and 60 ms backward."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.03)
        y = self.weight * x
        y.register_hook(lambda _: time.sleep(0.06))
        return y


class SlowSGD(torch.optim.SGD):
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        time.sleep(0.02)


class Loader:
    waited_s = 0.0

    def __next__(self) -> torch.Tensor:
        time.sleep(0.1)
        self.waited_s += 0.1
        return torch.ones(1)


def train(
    profile: StepProfile, net: nn.Module, optimizer: torch.optim.Optimizer, loader: Loader, parts: int
) -> bool:
    for _ in range(parts):
        net(next(loader)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return profile.step()


@pytest.mark.parametrize("parts", [1, 2])
def test_pieces_of_a_step(parts: int) -> None:
    net, loader = Slow(), Loader()
    optimizer = SlowSGD(net.parameters(), lr=0.1)
    profile = StepProfile(net, optimizer, loader, steps=2, skip=1)
    done = [train(profile, net, optimizer, loader, parts) for _ in range(3)]
    assert done == [False, False, True]
    steps = profile.take()
    assert len(steps) == 2
    wanted = {"data wait": 0.1 * parts, "forward": 0.03 * parts, "backward": 0.06 * parts, "optimiser": 0.02}
    for name, seconds in wanted.items():
        # Sleeping never takes less; on a busy machine it may take longer.
        assert seconds * 0.95 <= min(step.wall_s[name] for step in steps) < seconds + 0.25, name
    found = attached.summary(steps, images=8)
    assert found["rate_img_s"] == pytest.approx(8 / found["step_s"]["p50"])
    assert sum(found["share_pct"].values()) == pytest.approx(100, abs=15)
    assert found["share_pct"]["data wait"] > found["share_pct"]["forward"]
    assert "profile of 2 steps" in attached.line(found)


def test_validation_is_no_part_of_a_step() -> None:
    net, loader = Slow(), Loader()
    optimizer = SlowSGD(net.parameters(), lr=0.1)
    profile = StepProfile(net, optimizer, loader, steps=1, skip=0)
    net.eval()
    net(torch.ones(1))
    net.train()
    profile.restart()
    train(profile, net, optimizer, loader, 1)
    (step,) = profile.take()
    assert step.wall_s["forward"] < 0.06 + 0.2
    assert step.wall_s["rest"] < 0.03 + 0.2


def test_it_lets_go_of_the_model() -> None:
    net, loader = Slow(), Loader()
    optimizer = SlowSGD(net.parameters(), lr=0.1)
    profile = StepProfile(net, optimizer, loader, steps=1, skip=0)
    assert train(profile, net, optimizer, loader, 1)
    assert not net._forward_hooks
    assert not net._forward_pre_hooks
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_the_timeline_covers_the_steps() -> None:
    net, loader = Slow(), Loader()
    optimizer = SlowSGD(net.parameters(), lr=0.1)
    profile = StepProfile(net, optimizer, loader, steps=2, skip=0)
    train(profile, net, optimizer, loader, 1)
    start_s, spans = profile.spans()
    assert start_s > 0
    assert {"data wait", "forward", "backward", "optimiser"} <= {span.name for span in spans}
    in_order = sorted(spans, key=lambda span: span.start_s)
    for a, b in itertools.pairwise(in_order):
        assert a.start_s + a.seconds == pytest.approx(b.start_s, abs=1e-6)
