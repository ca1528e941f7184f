"""Run by tests/test_train.py under `accelerate launch`: validates a model whose buffers differ by process."""

from __future__ import annotations

import sys

import torch
from accelerate import Accelerator
from torch import Tensor, nn

import shards
from pipeline.config import PipelineConfig
from tools.runtime.monitor import MonitorConfig, validate


class Constant(nn.Module):
    """Always answers with the class its buffer names."""

    def __init__(self, answer: int) -> None:
        super().__init__()
        self.register_buffer("answer", torch.tensor(answer))

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.one_hot(self.answer, 4).float().repeat(len(images), 1)


def main() -> None:
    """Print the accuracy that the first process reports; it answers class 0, the second one no class there is."""
    accelerator = Accelerator()
    assert accelerator.num_processes == 2
    scores = validate(
        accelerator,
        Constant(3 * accelerator.process_index),
        shards.open(sys.argv[1]),
        monitor=MonitorConfig(),
        pipeline=PipelineConfig(image_size=32, batch_global=8, kinds=()),
        precision="fp32",
        seed=0,
    )
    if accelerator.is_main_process:
        print(f"accuracy {scores['val_top1_pct']:.2f}")


if __name__ == "__main__":
    main()
