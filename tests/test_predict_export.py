"""Using a trained model: loading it in Python, exporting it, classifying files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import model
from model import ModelConfig
from pipeline.config import PipelineConfig
from tools.export import ExportCommand, export
from tools.predict import PredictCommand, predict, read_image
from tools.runtime import checkpoint
from tools.runtime.config import RunConfig

CLASSES = ["ant", "bee", "cat"]
VARIANTS = {
    "map": ModelConfig(trunk="resnet10", codes=6),
    "released": ModelConfig(
        trunk="resnet10", codes=3, quantise="pooled", metric="cosine", released_eval_scale=True
    ),
    "none": ModelConfig(trunk="resnet10", quantise="none", attention=False),
    "kept up": ModelConfig(trunk="resnet10", codes=6, ema=0.9, revive_after=2, metric="cosine", centre=True),
    "top-k": ModelConfig(trunk="resnet10", codes=6, top_k=2),
}


def _images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def _run(folder: Path, config: ModelConfig, step: int = 7) -> model.VQSA:
    """Write a checkpoint as the training loop does, and return its model."""
    torch.manual_seed(step)
    net = model.build(config, len(CLASSES))
    net.initialise_codebook(_images())
    path = folder / "checkpoints" / f"step_{step:06d}"
    path.mkdir(parents=True)
    save_file(net.state_dict(), path / "model.safetensors")
    run = RunConfig(model=config, pipeline={"image_size": 64, "constants": "imagenet"})  # type: ignore[arg-type]
    record = {
        "step": step,
        "commit": "abc",
        "classes": CLASSES,
        "files": {"model.safetensors": (path / "model.safetensors").stat().st_size},
        "config": run.model_dump(mode="json"),
    }
    (path / checkpoint.RUN_FILE).write_text(json.dumps(record))
    return net.eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_load_and_export_give_the_models_logits(variant: str, tmp_path: Path) -> None:
    net = _run(tmp_path, VARIANTS[variant])
    with torch.no_grad():
        wanted = net(_images())
        for path in (tmp_path, tmp_path / "checkpoints" / "step_000007"):
            loaded = model.load(path)
            assert not loaded.training
            assert loaded.classes == ("ant", "bee", "cat")
            assert torch.equal(loaded(_images()), wanted)

        assert export(ExportCommand(checkpoint=tmp_path, out=tmp_path / "out")) <= 1e-5
        exported = model.load(str(tmp_path / "out"))
        assert exported.classes == loaded.classes
        assert torch.equal(exported(_images()), wanted)
        program = torch.export.load(tmp_path / "out" / "model.pt2").module()
        for count in (1, 3):
            found = program(_images(count))
            assert (found - net(_images(count))).abs().max() <= 1e-5 * wanted.abs().max()
    record = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (record["image_size"], record["resize_shorter"], record["step"]) == (64, 73, 7)
    with pytest.raises(ValueError, match="already there"):
        export(ExportCommand(checkpoint=tmp_path, out=tmp_path / "out"))


def test_a_run_folder_means_its_newest_checkpoint(tmp_path: Path) -> None:
    _run(tmp_path, VARIANTS["none"], step=999_999)
    newest = _run(tmp_path, VARIANTS["none"], step=1_000_000)
    for name in ("step_1000001.tmp", "step_1000002"):
        (tmp_path / "checkpoints" / name).mkdir()
    with torch.no_grad():
        assert torch.equal(model.load(tmp_path)(_images()), newest(_images()))
        # A run killed between its last two renames: the one moved aside is all there is of its step.
        last = _run(tmp_path, VARIANTS["none"], step=1_000_003)
        folder = tmp_path / "checkpoints"
        (folder / "step_1000003").rename(folder / "step_1000003.replaced")
        assert torch.equal(model.load(tmp_path)(_images()), last(_images()))
        shutil.copytree(folder / "step_1000000", folder / "step_1000003")
        assert torch.equal(model.load(tmp_path)(_images()), newest(_images()))


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no trained model in"):
        model.load(tmp_path)
    _run(tmp_path, VARIANTS["map"])
    path = tmp_path / "checkpoints" / "step_000007"
    good = load_file(path / "model.safetensors")

    other = {name: tensor for name, tensor in good.items() if name != "attention.K"}
    save_file({**other, "surplus": torch.zeros(1)}, path / "model.safetensors")
    with pytest.raises(
        ValueError,
        match=r"missing attention\.K; unexpected surplus; other shapes none; .* fusion 'concat' without attention",
    ):
        model.load(path)
    save_file({**good, "codebook.codes": torch.zeros(5, 512)}, path / "model.safetensors")
    with pytest.raises(ValueError, match=r"codebook\.codes \(5, 512\) instead of \(6, 512\)"):
        model.load(path)
    # Tensors of a whole other model: says what they are, and which recipe has them.
    for choices, match in (
        ({"quantise": "none", "attention": False}, "trunk resnet10, no codebook: recipe finetune"),
        (
            {"codes": 9, "ema": 0.9},
            "trunk resnet10, 9 codes, fusion 'concat' with attention, ema: recipe paper",
        ),
        ({"fusion": "add", "attention": False}, "6 codes, fusion 'replace' or 'add': recipe replace or add"),
    ):
        net = model.build(ModelConfig(**({"trunk": "resnet10", "codes": 6} | choices)), len(CLASSES))
        save_file(net.state_dict(), path / "model.safetensors")
        with pytest.raises(ValueError, match=match):
            model.load(path)
    save_file(torchvision.models.resnet18().state_dict(), path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"a plain resnet18 with its classifier: give them as model\.weights"
    ):
        model.load(path)
    (path / "model.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        model.load(path)

    save_file(good, path / "model.safetensors")
    record = json.loads((path / "run.json").read_text())
    record["config"]["model"]["fusion"] = "melt"
    (path / "run.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="does not describe a model"):
        model.load(path)
    shutil.rmtree(path)
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        export(ExportCommand(checkpoint=tmp_path, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def _picture(path: Path) -> np.ndarray:
    """A smooth picture of exactly the size evaluation resizes to, and its pixels."""
    row, column = np.mgrid[0:73, 0:91]
    pixels = np.stack([2 * row, 2 * column, row + column], axis=2).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


@pytest.mark.parametrize("variant", VARIANTS)
def test_predictions_are_the_models(variant: str, tmp_path: Path) -> None:
    net = _run(tmp_path, VARIANTS[variant])
    pixels = _picture(tmp_path / "a.png")
    # No resizing is left to do, so the crop and the normalisation can be written out.
    top, left = round((73 - 64) / 2), round((91 - 64) / 2)
    image = torch.from_numpy(pixels[top : top + 64, left : left + 64]).permute(2, 0, 1) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        wanted = net(((image - mean[:, None, None]) / std[:, None, None])[None], return_features=True)
    (found,) = predict(PredictCommand(images=(tmp_path / "a.png",), checkpoint=tmp_path, top=2))
    shares = wanted.logits[0].softmax(0)
    order = shares.argsort(descending=True)[:2]
    assert [name for name, _ in found.classes] == [CLASSES[i] for i in order]
    assert [share for _, share in found.classes] == pytest.approx(shares[order].tolist(), rel=1e-3)
    if variant == "none":
        assert found.codes == []
    else:
        assert sum(count for _, count in found.codes) == wanted.code_index.numel()
        assert {code for code, _ in found.codes} == set(wanted.code_index.flatten().tolist())
        assert [count for _, count in found.codes] == sorted(
            (count for _, count in found.codes), reverse=True
        )


def test_predict_as_a_command_and_its_errors(tmp_path: Path) -> None:
    _run(tmp_path, VARIANTS["released"])
    _picture(tmp_path / "a.png")
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "tools/predict.py", "--checkpoint", str(tmp_path)]

    def run(*images: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *map(str, images)],
            cwd=root, env={"PYTHONPATH": str(root), "PATH": ""}, capture_output=True, text=True, check=False,
        )  # fmt: skip

    command += ["--overlays", str(tmp_path / "maps")]
    done = run(tmp_path / "a.png", tmp_path / "a.png")
    assert done.returncode == 0, done.stderr
    for name in ("000_a.png", "001_a.png"):
        assert f"heat map  {tmp_path / 'maps' / name}" in done.stdout
        assert Image.open(tmp_path / "maps" / name).size == (64, 64)
    assert done.stdout.count("/a.png") == 2
    assert all(done.stdout.count(name) == 2 for name in CLASSES)
    assert "codes  " in done.stdout
    config = PipelineConfig(image_size=64, constants="imagenet")
    with pytest.raises(FileNotFoundError, match=r"no image .*nowhere\.jpg"):
        read_image(tmp_path / "nowhere.jpg", config)
    (tmp_path / "text.jpg").write_text("no picture")
    with pytest.raises(ValueError, match=r"text\.jpg is no readable image"):
        read_image(tmp_path / "text.jpg", config)
    with pytest.raises(ValueError, match="no images named"):
        predict(PredictCommand(images=(), checkpoint=tmp_path))
