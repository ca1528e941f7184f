"""What a launcher says to Accelerate and this project says itself; and a launcher that ends first."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import DistributedType
from accelerate.state import AcceleratorState, GradientState

from tools.runtime import launch
from tools.runtime.config import RunConfig


@pytest.fixture(autouse=True)
def _no_accelerator() -> Any:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("ACCELERATE_DYNAMO_BACKEND", "EAGER", "dynamo_backend = EAGER .* other names .* --compile here"),
        (
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
            "4",
            r"gradient_accumulation_steps = 4 .* say 1 there: .* pipeline\.batch_global",
        ),
        ("ACCELERATE_USE_FSDP", "true", "^FSDP from `accelerate launch` .* train here with DDP"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "^DeepSpeed from .* train here with DDP"),
        ("ACCELERATE_USE_MEGATRON_LM", "True", "^Megatron-LM from .* train here with DDP"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "^a parallelism configuration from .* use torchrun"),
    ],
)
def test_what_would_change_the_training_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words):
        launch.make_accelerator(RunConfig())


def test_what_accelerate_config_writes_by_default_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("DYNAMO_BACKEND", "NO"), ("MIXED_PRECISION", "no"), ("USE_FSDP", "false")):
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    assert launch.make_accelerator(RunConfig()).gradient_accumulation_steps == 1


def test_several_processes_that_are_not_ddp_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made = SimpleNamespace(distributed_type=DistributedType.XLA)
    monkeypatch.setattr(launch, "Accelerator", lambda **named: made)
    with pytest.raises(ValueError, match=r"^XLA from .* train here with DDP"):
        launch.make_accelerator(RunConfig())


def test_the_precision_is_the_runs_own(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with caplog.at_level(logging.WARNING):
        assert launch.make_accelerator(RunConfig()).mixed_precision == "no"
    assert "mixed_precision = bf16 from `accelerate launch`" in caplog.text
    assert "this run's is fp32 (--precision)" in caplog.text
