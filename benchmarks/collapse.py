"""Does the codebook collapse? Codes used and perplexity over a short training, variant by variant, on real photographs.

    python benchmarks/collapse.py --data SHARDS --val SHARDS [--steps 200] [--out result.json]

Every variant trains the same trunk from the same weights on the same batches; only the codebook's settings differ.
Made for Imagenette at 64 px and a ResNet-18 on a CPU.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
import tyro
from accelerate import Accelerator
from pydantic import BaseModel, ConfigDict, Field

import model
import shards
from benchmarks.environment import environment, write_result
from model.codebook import codes_used, perplexity
from pipeline.loader import EvaluationLoader, TrainingLoader
from pipeline.normalise import normalise
from tools.runtime.codebook import codebook_metrics, start_codebook
from tools.runtime.config import RunConfig, read_recipe, validated
from tools.runtime.device import loader_device_id

ROOT = Path(__file__).resolve().parents[1]
BEST = (
    "init",
    "init_batches",
    "metric",
    "ema",
    "revive_after",
    "centre",
    "top_k",
    "reduction",
    "attention_scale",
)
KMEANS = {"init": "kmeans", "init_batches": 16}
VARIANTS: dict[str, dict[str, Any]] = {
    "U(0, 3), Euclidean": {"init": "uniform03"},
    "paper (data, Euclidean)": {"init": "data"},
    "released (pooled, cosine, U(0, 3))": {"init": "uniform03", "metric": "cosine", "quantise": "pooled"},
    "k-means": KMEANS,
    "k-means, moving average": {**KMEANS, "ema": 0.95},
    "k-means, revival": {**KMEANS, "revive_after": 10},
    "k-means, moving average, revival": {**KMEANS, "ema": 0.95, "revive_after": 10},
    "k-means, slow moving average, revival": {**KMEANS, "ema": 0.99, "revive_after": 10},
    "k-means, moving average, revival, centred cosine": {
        **KMEANS, "ema": 0.95, "revive_after": 10, "metric": "cosine", "centre": True,
    },
}  # fmt: skip


class CollapseBenchmark(BaseModel):
    """Train each variant for a few steps and watch its codebook."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    data: Path
    """Shard set to train on."""

    val: Path
    """Shard set whose clean centre crops are classified at the end."""

    trunk: str = "resnet18"
    """Trunk, from random weights."""

    codes: int = Field(1000, ge=1)
    """Codes n."""

    image_size: int = Field(64, ge=32)
    """Side of the images in pixels."""

    batch: int = Field(64, ge=1)
    """Images per step."""

    steps: int = Field(200, ge=20)
    """Steps of each variant."""

    every: int = Field(20, ge=1)
    """Steps that a row of the table looks back on."""

    seed: int = 0
    """Of weights, samples and codes."""

    variants: tuple[str, ...] = ()
    """Only these (names as in the table, or "best" for recipes/best.toml); unset: all."""

    out: Path | None = None
    """JSON file for the result. Variants that it has from the same settings are not run again."""


def variants(command: CollapseBenchmark) -> dict[str, dict[str, Any]]:
    """Return the settings of each variant that is asked for."""
    recipe = ROOT / "recipes" / "best.toml"
    every = dict(VARIANTS)
    if recipe.is_file():
        settings = read_recipe(recipe)["model"]
        every["best"] = {name: settings[name] for name in BEST if name in settings}
    unknown = set(command.variants) - set(every)
    if unknown:
        raise ValueError(f"no variant {', '.join(unknown)}; there are {', '.join(every)}")
    return {name: every[name] for name in command.variants or every}


def train(command: CollapseBenchmark, choices: dict[str, Any]) -> dict[str, Any]:
    """Train one variant; returns its codebook's metrics over training and on the validation images."""
    settings = {
        "seed": command.seed,
        "precision": "bf16",
        "pipeline": {
            "image_size": command.image_size,
            "batch_global": command.batch,
            "crop_scale": (0.35, 1.0),
        },
        "model": {"trunk": command.trunk, "codes": command.codes, **choices},
    }
    config = validated(RunConfig, settings, "collapse")
    accelerator = Accelerator(mixed_precision="bf16")
    device = accelerator.device
    torch.manual_seed(command.seed)
    store = shards.open(command.data)
    net = model.build(config.model, len(store.classes)).to(memory_format=torch.channels_last).to(device)
    loader = TrainingLoader(store, config.pipeline, seed=command.seed, device_id=loader_device_id(device))
    learning = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learning, 1e-3)
    history = []
    try:
        start_codebook(
            accelerator, net, loader, lambda batch: batch.images,
            batches=config.model.init_batches, samples=len(store),
        )  # fmt: skip
        for step in range(1, command.steps + 1):
            net.train()
            batch = next(loader)
            with accelerator.autocast():
                out = net(batch.images, batch.labels)
            assert isinstance(out, model.Losses)
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
            net.update_codebook(out)
            if step % command.every == 0:
                history.append({"step": step, "ce": out.ce.item(), **codebook_metrics(accelerator, net)})
                print(f"  {json.dumps(history[-1])}", flush=True)
    finally:
        loader.close()
    return {"settings": choices, "history": history, **score(command, net.eval(), config, device)}


@torch.no_grad()
def score(
    command: CollapseBenchmark, net: model.VQSA, config: RunConfig, device: torch.device
) -> dict[str, float]:
    """Return clean top-1 on the validation set, and the codes that its features use."""
    loader = EvaluationLoader(
        shards.open(command.val), config.pipeline, batch=command.batch, device_id=loader_device_id(device)
    )
    hits = images = 0
    usage_K = torch.zeros(command.codes, dtype=torch.int64, device=device)
    try:
        for batch in loader:
            with torch.autocast(device.type, torch.bfloat16):
                found = net(normalise(batch.images_u8.to(device), config.pipeline), return_features=True)
            assert isinstance(found, model.Features)
            assert found.code_index is not None
            usage_K += found.code_index.flatten().bincount(minlength=command.codes)
            hits += int((found.logits.argmax(1).cpu() == batch.labels).sum())
            images += len(batch.labels)
    finally:
        loader.close()
    return {
        "val_top1_pct": 100 * hits / images,
        "val_features": int(usage_K.sum()),
        "val_codes_used_pct": 100 * int(codes_used(usage_K)) / command.codes,
        "val_perplexity": perplexity(usage_K).item(),
    }


def table(results: dict[str, dict[str, Any]], steps: list[int]) -> str:
    """Return the result as a Markdown table: codes used in percent / perplexity."""
    heads = ["variant", *(f"steps to {step}" for step in steps), "validation", "val top-1"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, result in results.items():
        rows = {row["step"]: row for row in result["history"]}
        cells = [f"{rows[s]['codes_used_pct']:.0f} % / {rows[s]['perplexity']:.0f}" for s in steps]
        cells.append(f"{result['val_codes_used_pct']:.0f} % / {result['val_perplexity']:.0f}")
        lines.append("| " + " | ".join([name, *cells, f"{result['val_top1_pct']:.1f} %"]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the benchmark and print a table."""
    command = tyro.cli(CollapseBenchmark, description=__doc__)
    settings = command.model_dump(mode="json", exclude={"data", "val", "out", "variants"})
    before = json.loads(command.out.read_text()) if command.out and command.out.is_file() else {}
    results: dict[str, dict[str, Any]] = before["variants"] if before.get("settings") == settings else {}
    for name, choices in variants(command).items():
        if results.get(name, {}).get("settings") == choices:
            continue
        print(name, flush=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that U(0, 3) with l2 is unwise is the point here
            results[name] = {**environment(), **train(command, choices)}
        if command.out:
            write_result(command.out, {"settings": settings, "variants": results})
    last = command.steps // command.every
    print(
        table(
            results, sorted({command.every, *(command.every * (last * k // 4) for k in (1, 2, 3, 4))} - {0})
        )
    )


if __name__ == "__main__":
    main()
