"""The authors' checkpoint: names and shapes as published, forward pass recomputed by itself, and back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

import model
from model import ModelConfig
from model.released import from_released, to_released
from tools.import_released import ImportCommand, export_released, import_released
from tools.runtime import checkpoint

CODES, CLASSES, DIM = 12, 7, 2048
ROOT = Path(__file__).resolve().parent.parent
THEIRS = {"quantise": "pooled", "metric": "cosine", "released_eval_scale": True}
PARTS = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}


@pytest.fixture(scope="module")
def trunk() -> torchvision.models.ResNet:
    torch.manual_seed(3)
    net = torchvision.models.resnet50(num_classes=CLASSES)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    for name, parameter in net.named_parameters():
        if name.endswith("bn3.weight"):
            parameter.data.fill_(0.1)  # features of order one, as a trained trunk's
    return net.eval()


@pytest.fixture(scope="module")
def theirs(trunk: torchvision.models.ResNet) -> dict[str, Tensor]:
    """Their 326 tensors, with few codes and classes."""
    state = {}
    for name, tensor in trunk.state_dict().items():
        part, _, rest = name.partition(".")
        state[name if part == "fc" else f"resnet_layer.{PARTS[part]}.{rest}"] = tensor
    # Scores of order one, so that the missing square root shows.
    for name in "KQV":
        state[name] = torch.randn(DIM, DIM) / DIM**0.5 / (12 if name != "V" else 1)
    state["codebook.embeddings.weight"] = torch.rand(CODES, DIM) * 3
    state["fc_fuse.0.weight"] = torch.randn(DIM, 2 * DIM) / DIM**0.5
    state["fc_fuse.0.bias"] = torch.randn(DIM)
    assert len(state) == 326
    return state


@pytest.fixture(scope="module")
def published(theirs: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("published") / "best.pth"
    torch.save({"model": theirs, "optimizer": {"state": {}}, "epoch": 7, "best_acc": 0.5}, path)
    return path


@pytest.fixture(scope="module")
def imported(published: Path, tmp_path_factory: pytest.TempPathFactory) -> checkpoint.Checkpoint:
    return import_released(ImportCommand(source=published, out=tmp_path_factory.mktemp("ours") / "released"))


def _images() -> Tensor:
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def _recomputed(
    net: torchvision.models.ResNet, s: dict[str, Tensor], divisor: float
) -> tuple[Tensor, Tensor]:
    """Logits and codes with one matrix per sample and token columns, from the published description alone."""
    x = net.maxpool(net.relu(net.bn1(net.conv1(_images()))))
    x = net.layer4(net.layer3(net.layer2(net.layer1(x))))
    z_BD = F.adaptive_avg_pool2d(x, 1)[:, :, 0, 0]
    codes_KD = s["codebook.embeddings.weight"]
    index_B = F.cosine_similarity(z_BD[:, None].double(), codes_KD[None].double(), dim=2).argmax(1)
    columns_BD2 = torch.cat([codes_KD[index_B][:, :, None], z_BD[:, :, None]], dim=2)
    key, query, value = (torch.bmm(s[name].expand(3, DIM, DIM), columns_BD2) for name in "KQV")
    weight_B22 = torch.softmax(torch.bmm(key.mT, query) / divisor, dim=1)
    mixed_BD2 = torch.bmm(value, weight_B22)
    pair_BF = torch.cat([mixed_BD2[:, :, 0], mixed_BD2[:, :, 1]], dim=1)
    hidden_BD = (pair_BF @ s["fc_fuse.0.weight"].T + s["fc_fuse.0.bias"]).clamp_min(0)
    return hidden_BD @ s["fc.weight"].T + s["fc.bias"], index_B


def test_forward_pass_is_the_published_one(
    imported: checkpoint.Checkpoint, trunk: torchvision.models.ResNet, theirs: dict[str, Tensor]
) -> None:
    config = ModelConfig(**{**imported.config["model"], "weights": ""})
    assert (config.codes, config.quantise, config.metric, config.released_eval_scale) == (
        CODES, "pooled", "cosine", True,
    )  # fmt: skip
    net = model.build(config, len(imported.classes))
    net.load_state_dict(imported.model_state())
    with torch.no_grad():
        found = net.eval()(_images(), return_features=True)
    logits, index_B = _recomputed(trunk, theirs, divisor=1.0)
    assert torch.equal(found.code_index, index_B)
    scale = logits.abs().max()
    assert (found.logits - logits).abs().max() < 1e-5 * scale
    with_root, _ = _recomputed(trunk, theirs, divisor=2**0.5)
    assert (with_root - logits).abs().max() > 1e-4 * scale, "the missing divisor must show in this test"


def test_the_checkpoint_is_one_of_ours(imported: checkpoint.Checkpoint) -> None:
    assert checkpoint.newest(imported.path).step == 0
    assert imported.classes == [str(i) for i in range(CLASSES)]
    assert imported.config["optim"]["name"] == "sgd"
    assert imported.config["pipeline"]["law"] == "bag"


def test_back_and_forth_gives_the_same_tensors(
    imported: checkpoint.Checkpoint, theirs: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "again.pth"
    export_released(ImportCommand(source=imported.path, out=path, reverse=True))
    again = torch.load(path, weights_only=True)["model"]
    assert again.keys() == theirs.keys()
    assert all(torch.equal(again[name], theirs[name]) for name in theirs)


def test_bare_and_data_parallel_states(theirs: dict[str, Tensor], tmp_path: Path) -> None:
    path, names = tmp_path / "bare.pth", tmp_path / "names.txt"
    torch.save({f"module.{name}": tensor for name, tensor in theirs.items()}, path)
    names.write_text("\n".join(f"n{i}" for i in range(CLASSES)) + "\n")
    command = [
        sys.executable,
        "tools/import_released.py",
        str(path),
        str(tmp_path / "out"),
        "--classes",
        str(names),
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"{CODES} codes, {CLASSES} classes" in done.stdout
    assert checkpoint.read(tmp_path / "out").classes[-1] == "n6"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"K": None}, "missing K;"),
        ({"mlp.0.weight": torch.zeros(2)}, r"unexpected mlp\.0\.weight"),
        ({"Q": torch.zeros(2, 2)}, r"other shapes Q \(2, 2\) instead of \(2048, 2048\)"),
        ({"codebook.embeddings.weight": None}, "no matrix 'codebook.embeddings.weight'"),
    ],
)
def test_other_tensors_are_named(theirs: dict[str, Tensor], change: dict[str, Any], match: str) -> None:
    state = {name: tensor for name, tensor in {**theirs, **change}.items() if tensor is not None}
    with pytest.raises(ValueError, match=match):
        from_released(state, ModelConfig(quantise="pooled"))


def test_bad_requests(published: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        import_released(ImportCommand(source=tmp_path / "nowhere.pth", out=tmp_path / "a"))
    with pytest.raises(ValueError, match="already there"):
        import_released(ImportCommand(source=published, out=tmp_path))
    (tmp_path / "two.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match=r"has 2 classes, .* 7 outputs"):
        import_released(ImportCommand(source=published, out=tmp_path / "a", classes=tmp_path / "two.txt"))
    assert not (tmp_path / "a").exists()


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("exploded"),))


def test_what_their_network_has_and_what_it_has_not() -> None:
    kept_up = ModelConfig(**THEIRS, trunk="resnet10", codes=4, ema=0.9, revive_after=3, init="normal")  # type: ignore[arg-type]
    net = model.build(kept_up, 3)
    theirs = to_released(net.state_dict(), kept_up)
    assert torch.equal(theirs["codebook.embeddings.weight"], net.codebook.codes)  # type: ignore[union-attr]
    assert not any("upkeep" in name for name in theirs)
    for choices, match in (
        ({"quantise": "map"}, "quantise 'map' instead of 'pooled'; train"),
        ({"metric": "l2"}, "metric 'l2' instead of 'cosine'; train"),
        (
            {"attention": False, "fusion": "add"},
            "fusion 'add' instead of 'concat', attention False instead of True",
        ),
        ({"attention_scale": "sqrt_d"}, "attention_scale 'sqrt_d' instead of 'sqrt2'; train"),
        ({"released_eval_scale": False}, "released_eval_scale False instead of True; train"),
        ({"stem": "small"}, "stem 'small' instead of 'imagenet'; train"),
        ({"top_k": 2}, "top_k 2 instead of 1; train one by recipe released"),
        ({"centre": True}, "centre True instead of False; train"),
        ({"trunk": "timm:test_resnet"}, "a torchvision trunk; this model's is 'timm:test_resnet'"),
    ):
        config = ModelConfig(**(THEIRS | {"trunk": "resnet10", "codes": 4, "init": "normal"} | choices))  # type: ignore[arg-type]
        state = {} if config.trunk.startswith("timm:") else model.build(config, 3).state_dict()
        with pytest.raises(ValueError, match=match):
            to_released(state, config)


def test_a_strangers_file_executes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": _Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(ValueError, match="no torch file of tensors alone"):
        import_released(ImportCommand(source=tmp_path / "bomb.pth", out=tmp_path / "a"))
    assert not (tmp_path / "exploded").exists()
