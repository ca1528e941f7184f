"""The whole classifier: every variant runs, learns, keeps its layout and compiles; counts are the paper's."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision
from pydantic import ValidationError
from torch import Tensor, nn

from model import VQSA, Features, Losses, ModelConfig, build
from model.backbone import TorchvisionTrunk
from model.count import count

# Shapes: B = images, D = feature dimension, h, w = feature map size, C = classes.

VARIANTS = [
    {"quantise": quantise, "fusion": fusion, "attention": attention}
    for quantise, (fusion, attention) in itertools.product(
        ["map", "pooled"], [("replace", False), ("add", False), ("concat", False), ("concat", True)]
    )
] + [{"quantise": "none", "attention": False}]
IDS = ["-".join(str(value) for value in variant.values()) for variant in VARIANTS]


def _model(seed: int = 0, **choices: Any) -> VQSA:
    torch.manual_seed(seed)
    return build(ModelConfig(**({"trunk": "resnet10", "codes": 6} | choices)), num_classes=5)


def _batch(size: int = 64, images: int = 8) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(images, 3, size, size, generator=g), torch.randint(5, (images,), generator=g)


@pytest.mark.parametrize("variant", VARIANTS, ids=IDS)
def test_every_variant_runs_and_every_parameter_learns(variant: dict[str, Any]) -> None:
    model = _model(**variant)
    images, labels = _batch()
    out = model(images, labels)
    assert isinstance(out, Losses)
    assert out.logits.shape == (8, 5)
    torch.testing.assert_close(out.loss, out.vq + 0.25 * out.commit + out.ce)
    torch.testing.assert_close(out.ce, nn.functional.cross_entropy(out.logits, labels))
    shape = {"map": (8, 2, 2), "pooled": (8,), "none": None}[variant["quantise"]]
    assert (None if out.code_index is None else tuple(out.code_index.shape)) == shape
    assert all(value.dtype == torch.float32 and value.ndim == 0 for value in out[:4])
    out.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    if variant["quantise"] != "none":
        assert out.vq > 0
        assert torch.equal(out.vq.detach(), out.commit.detach())

    model.eval()
    logits = model(images)
    assert isinstance(logits, Tensor)
    features = model(images, return_features=True)
    assert isinstance(features, Features)
    assert torch.equal(features.logits, logits)
    assert torch.equal(model.head(features.fused), logits)
    assert features.map.shape == (8, 512, 2, 2)
    torch.testing.assert_close(features.z, features.map.mean((2, 3)))


@pytest.mark.parametrize("variant", [VARIANTS[3], VARIANTS[4], VARIANTS[8]], ids=[IDS[3], IDS[4], IDS[8]])
def test_a_few_steps_lower_the_loss(variant: dict[str, Any]) -> None:
    model = _model(**variant)
    images, labels = _batch(32)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    losses = []
    for _ in range(8):
        out = model(images, labels)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.ce.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("quantise", ["map", "pooled"])
def test_order_of_the_steps_is_the_documented_one(quantise: str) -> None:
    """The whole forward pass once more, in other words and in float64."""
    model = _model(quantise=quantise, metric="cosine" if quantise == "pooled" else "l2")
    images, labels = _batch()
    model(images, labels)
    model.eval()
    found = model(images, return_features=True)
    assert model.codebook is not None
    assert model.attention is not None
    assert model.head.fuse is not None
    model.double()
    with torch.no_grad():
        map_BDhw = found.map.double()
        codes_KD = model.codebook.codes
        z_BD = torch.nn.functional.adaptive_avg_pool2d(map_BDhw, 1).flatten(1)
        if quantise == "map":
            z_BhwD = map_BDhw.movedim(1, -1)
            index = (z_BhwD[..., None, :] - codes_KD).norm(dim=-1).argmin(-1)
            code_BD = codes_KD[index].mean((1, 2))
        else:
            index = nn.functional.cosine_similarity(z_BD[:, None], codes_KD[None], dim=-1).argmax(-1)
            code_BD = codes_KD[index]
        tokens_B2D, _ = model.attention(code_BD, z_BD)
        logits = model.head.fc(model.head.fuse(torch.cat([tokens_B2D[:, 0], tokens_B2D[:, 1]], 1)).relu())
    assert torch.equal(found.code_index, index)
    torch.testing.assert_close(found.quantised, code_BD.float())
    torch.testing.assert_close(found.logits, logits.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("fusion", "expected"), [("replace", "e"), ("add", "z+e"), ("concat", "[e,z]")])
def test_fusion(fusion: str, expected: str) -> None:
    model = _model(fusion=fusion, attention=False)
    model.initialise_codebook(_batch()[0])
    found = model.eval()(_batch()[0], return_features=True)
    e, z = found.quantised, found.z
    wanted = {"e": e, "z+e": z + e, "[e,z]": torch.cat([e, z], 1)}[expected]
    assert torch.equal(found.fused, wanted)


def test_every_loss_moves_its_own_part_of_the_model() -> None:
    model = _model()
    out = model(*_batch())
    assert model.codebook is not None
    trunk = model.trunk.conv1.weight  # type: ignore[union-attr]
    for value, moved in ((out.vq, (True, False)), (out.commit, (False, True)), (out.ce, (False, True))):
        grads = torch.autograd.grad(
            value, (model.codebook.codes, trunk), retain_graph=True, allow_unused=True
        )  # type: ignore[arg-type]
        assert tuple(grad is not None and bool(grad.any()) for grad in grads) == moved


class _Map(nn.Module):
    """A trunk whose whole output is a parameter, so that its gradient can be read off."""

    def __init__(self, map_BDhw: Tensor) -> None:
        super().__init__()
        self.map_BDhw = nn.Parameter(map_BDhw)

    def forward(self, images: Tensor) -> Tensor:
        return self.map_BDhw[: len(images)]


def _exact_loss(model: VQSA, map_BDhw: Tensor, labels: Tensor, index: Tensor) -> Tensor:
    """The whole objective once more, with plain autograd, the codes' choice given."""
    config = model.config
    parameters = dict(model.named_parameters())
    codes_KD = parameters["codebook.codes"]
    z_ND = map_BDhw.movedim(1, -1) if config.quantise == "map" else map_BDhw.mean((2, 3))
    code_ND = codes_KD[index]
    sum_or_mean = {"mean": 1, "sum": z_ND.shape[-1]}[config.reduction]
    vq = (code_ND - z_ND.detach()).square().mean() * sum_or_mean
    commit = (z_ND - code_ND.detach()).square().mean() * sum_or_mean
    through_ND = z_ND + (code_ND - z_ND).detach()
    e_BD = through_ND.mean((1, 2)) if config.quantise == "map" else through_ND
    z_BD = map_BDhw.mean((2, 3))
    fused = {"replace": e_BD, "add": z_BD + e_BD, "concat": torch.cat([e_BD, z_BD], 1)}[config.fusion]
    if config.attention:
        key, query, value = (
            torch.stack([e_BD, z_BD], 1) @ parameters[f"attention.{name}"].T for name in ("K", "Q", "V")
        )
        weight_Bkq = torch.softmax(key @ query.mT / 2**0.5, dim=1)
        fused = (weight_Bkq.mT @ value).flatten(1)
    if "head.fuse.weight" in parameters:
        fused = torch.relu(fused @ parameters["head.fuse.weight"].T + parameters["head.fuse.bias"])
    logits = fused @ parameters["head.fc.weight"].T + parameters["head.fc.bias"]
    return vq + 0.25 * commit + nn.functional.cross_entropy(logits, labels)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("variant", VARIANTS[:-1], ids=IDS[:-1])
def test_gradients_equal_float64_autograd(variant: dict[str, Any], metric: str) -> None:
    g = torch.Generator().manual_seed(2)
    map_BDhw = torch.rand(6, 16, 2, 3, generator=g)
    torch.manual_seed(0)
    config = ModelConfig(codes=9, metric=metric, init="normal", reduction="sum", **variant)  # type: ignore[arg-type]
    model = build(config, 5, trunk=_Map(map_BDhw))
    labels = torch.randint(5, (6,), generator=g)
    out = model(torch.zeros(6, 3, 8, 8), labels)
    assert isinstance(out, Losses)
    out.loss.backward()
    found = {name: p.grad for name, p in model.named_parameters()}

    assert out.code_index is not None
    codes_KD = model.codebook.codes.detach().double()  # type: ignore[union-attr]
    z_ND = (map_BDhw.movedim(1, -1) if variant["quantise"] == "map" else map_BDhw.mean((2, 3))).double()
    far_NK = (z_ND[..., None, :] - codes_KD).square().sum(-1)
    if metric == "cosine":
        far_NK = -nn.functional.cosine_similarity(z_ND[..., None, :], codes_KD, dim=-1)
    assert torch.equal(out.code_index, far_NK.argmin(-1))

    model.double().zero_grad()
    exact = model.trunk.net.map_BDhw  # type: ignore[union-attr]
    loss = _exact_loss(model, exact, labels, out.code_index)  # type: ignore[arg-type]
    loss.backward()
    torch.testing.assert_close(out.loss, loss.float(), rtol=1e-5, atol=1e-6)
    for name, parameter in model.named_parameters():
        grad = found[name]
        assert grad is not None
        assert parameter.grad is not None
        worst = float((grad.double() - parameter.grad).abs().max() / parameter.grad.abs().max())
        assert worst < 1e-5, (name, worst)


@pytest.mark.filterwarnings("ignore:codebook of")
@pytest.mark.parametrize("quantise", ["map", "pooled"])
def test_a_common_offset_changes_no_code(quantise: str) -> None:
    """Features and codes moved together by 100 standard deviations choose as float64 does."""
    g = torch.Generator().manual_seed(2)
    map_BDhw = torch.randn(32, 64, 4, 4, generator=g)
    map_BDhw = map_BDhw + 100 * map_BDhw.std()
    model = build(ModelConfig(codes=200, quantise=quantise), 5, trunk=_Map(map_BDhw))  # type: ignore[arg-type]
    model.initialise_codebook(torch.zeros(32, 3, 8, 8))
    with torch.no_grad():
        model.codebook.codes.add_(0.3 * torch.randn(200, 64, generator=g))  # type: ignore[union-attr]
    found = model.eval()(torch.zeros(32, 3, 8, 8), return_features=True).code_index
    z_ND = map_BDhw.movedim(1, -1) if quantise == "map" else map_BDhw.mean((2, 3))
    codes_KD = model.codebook.codes.detach().double()  # type: ignore[union-attr]
    assert torch.equal(found, torch.stack([(z.double() - codes_KD).square().sum(-1).argmin() for z in
                                           z_ND.flatten(0, -2)]).view(found.shape))  # fmt: skip


def test_moving_state_is_not_sent_between_ranks_in_every_pass() -> None:
    model = _model(ema=0.9, revive_after=3)
    ignored = set(model._ddp_params_and_buffers_to_ignore)
    assert {"codebook.upkeep.ema_sum_KD", "codebook.upkeep.recent_K"} <= ignored
    assert not any(name.startswith("trunk.") for name in ignored)


def test_update_codebook_takes_the_steps_outputs() -> None:
    images, labels = _batch()
    model = _model(ema=0.5, revive_after=1, freeze_bn=True)
    model.initialise_codebook(images)
    whole, halves = copy.deepcopy(model), copy.deepcopy(model)
    out = whole(images, labels)
    assert out.features.shape == (32, 512)
    assert not out.features.requires_grad
    before_KD = whole.codebook.codes.clone()  # type: ignore[union-attr]
    whole.update_codebook(out)
    assert not torch.equal(whole.codebook.codes, before_KD)  # type: ignore[union-attr]
    halves.update_codebook(*(halves(i, t) for i, t in zip(images.chunk(2), labels.chunk(2), strict=True)))
    torch.testing.assert_close(halves.codebook.codes, whole.codebook.codes)  # type: ignore[union-attr]
    plain = _model()
    out = plain(images, labels)
    assert out.features is None
    plain.update_codebook(out)  # nothing to do
    assert out.finite.tolist() == [True] * 8
    broken = images.clone()
    broken[3, 0, 5, 5] = torch.nan
    assert plain.eval()(broken, labels).finite.tolist() == [True] * 3 + [False] + [True] * 4


def test_beta_and_lambda_weigh_the_losses() -> None:
    out = _model(beta=2.0, lambda_ce=3.0)(*_batch())
    torch.testing.assert_close(out.loss, out.vq + 2 * out.commit + 3 * out.ce)
    summed = _model(reduction="sum")(*_batch())
    torch.testing.assert_close(summed.vq, out.vq * 512)


def test_same_seed_same_bits() -> None:
    def gradients() -> list[Tensor]:
        model = _model()
        model(*_batch())
        model(*_batch()).loss.backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    for a, b in zip(gradients(), gradients(), strict=True):
        assert torch.equal(a, b)


def test_frozen_normalisation_keeps_its_statistics_but_learns() -> None:
    model = _model(freeze_bn=True).train()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms]  # type: ignore[union-attr]
    model(*_batch()).loss.backward()
    for norm, (mean, var) in zip(norms, before, strict=True):
        assert not norm.training
        assert torch.equal(norm.running_mean, mean)  # type: ignore[arg-type]
        assert torch.equal(norm.running_var, var)  # type: ignore[arg-type]
        assert norm.weight.grad is not None
    assert model.training
    thawed = _model().train()
    thawed(*_batch())
    assert any(norm.running_mean.any() for norm in thawed.modules() if isinstance(norm, nn.BatchNorm2d))  # type: ignore[union-attr]


@pytest.mark.parametrize("variant", [*VARIANTS, {"ema": 0.9}, {"top_k": 2}], ids=[*IDS, "ema", "top_k"])
def test_bfloat16_autocast_keeps_losses_and_search_in_float32(variant: dict[str, Any]) -> None:
    model = _model(**variant)
    images, labels = _batch()
    with torch.autocast("cpu", torch.bfloat16):
        model(images, labels)
        out = model(images, labels)
        features = model(images, return_features=True)
    assert out.logits.dtype == features.map.dtype == torch.bfloat16
    assert features.z.dtype == torch.float32
    assert all(value.dtype == torch.float32 and value.isfinite() for value in out[:4])
    if features.attention is not None:
        assert features.attention.dtype == torch.float32
    if features.sqdist is not None and model.config.quantise == "map":
        # The distance of the bfloat16 map as it is, not of something rounded once more.
        assert model.codebook is not None
        z_ND = features.map.detach().permute(0, 2, 3, 1).flatten(0, 2).double()
        exact_N = (
            (z_ND - model.codebook.codes.detach().double()[features.code_index.flatten()]).square().sum(1)
        )
        torch.testing.assert_close(features.sqdist.flatten(), exact_N.float(), rtol=1e-6, atol=0)
    out.loss.backward()
    assert all(
        parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None
    )


def test_channels_last_is_kept_and_costs_no_copy() -> None:
    model = _model().to(memory_format=torch.channels_last)
    images = _batch()[0].contiguous(memory_format=torch.channels_last)
    model.initialise_codebook(images)
    map_BDhw = model.eval()(images, return_features=True).map
    assert map_BDhw.is_contiguous(memory_format=torch.channels_last)
    assert model._features(map_BDhw).data_ptr() == map_BDhw.data_ptr()


MORE = [
    {"ema": 0.9, "revive_after": 2},
    {"metric": "cosine", "centre": True, "top_k": 3, "top_k_weights": "softmax"},
    {"quantise": "pooled", "metric": "cosine", "centre": True, "init": "normal"},
]
MORE_IDS = ["ema-revive", "centre-top_k", "pooled-centre"]


@pytest.mark.parametrize("variant", [*VARIANTS, *MORE], ids=[*IDS, *MORE_IDS])
def test_compiles_without_a_break(variant: dict[str, Any]) -> None:
    model = _model(**variant)
    images, labels = _batch(32)
    model.initialise_codebook(images)
    out = model(images, labels)
    out.loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    usage = None if model.codebook is None else model.codebook.usage_K.clone()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    found = compiled(images, labels)
    found.loss.backward()
    torch.testing.assert_close(found.loss, out.loss)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in expected)
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[name])
    if model.codebook is not None:
        assert usage is not None
        assert torch.equal(model.codebook.usage_K, 2 * usage), "usage is counted in the compiled model too"


def test_initialising_first_gives_the_codes_of_the_first_step() -> None:
    images, labels = _batch()
    stepped, first, halves = _model(), _model(), _model(freeze_bn=True)
    stepped(images, labels)
    before = {name: buffer.clone() for name, buffer in first.trunk.named_buffers()}
    first.initialise_codebook(images)
    assert first.codebook is not None
    assert stepped.codebook is not None
    assert halves.codebook is not None
    assert torch.equal(first.codebook.codes, stepped.codebook.codes)
    for name, buffer in first.trunk.named_buffers():
        assert torch.equal(buffer, before[name]), f"{name} was touched"
    whole = _model(freeze_bn=True)
    whole.initialise_codebook(images)
    halves.initialise_codebook(*images.chunk(2))
    assert whole.codebook is not None
    torch.testing.assert_close(halves.codebook.codes, whole.codebook.codes)


@pytest.mark.parametrize(
    ("stem", "size", "stride", "map_size"),
    [("imagenet", 64, 32, 2), ("imagenet", 70, 32, 3), ("small", 32, 8, 4), ("small", 64, 8, 8)],
)
def test_trunk_sizes(stem: Any, size: int, stride: int, map_size: int) -> None:
    trunk = TorchvisionTrunk("resnet10", stem)
    assert (trunk.dim, trunk.stride) == (512, stride)
    assert trunk(torch.zeros(1, 3, size, size)).shape == (1, 512, map_size, map_size)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("resnet50", 23_508_032), ("resnext101_32x8d", 86_742_336), ("resnext101_64x4d", 81_406_272)],
)
def test_trunk_parameters(name: str, parameters: int) -> None:
    # FACTS: totals with the 1,000-class layer are 25,557,032, 88,791,336 and 83,455,272.
    with torch.device("meta"):
        trunk = TorchvisionTrunk(name)
    assert trunk.dim == 2048
    assert sum(p.numel() for p in trunk.parameters()) == parameters


@pytest.mark.parametrize(
    ("codes", "full", "paper"),
    [(1_000, 48_578_600, 40_187_944), (10_000, 67_010_600, 58_619_944), (100_000, 251_330_600, 242_939_944)],
)
def test_parameter_counts_are_the_published_ones(codes: int, full: int, paper: int) -> None:
    config = ModelConfig(codes=codes)
    assert count(config, 1000, mode="full")[-1].parameters == full
    assert count(config, 1000, mode="paper")[-1].parameters == paper
    with torch.device("meta"):
        assert sum(p.numel() for p in build(config, 1000).parameters()) == full


def test_macs_are_the_published_ones() -> None:
    spatial = {part.name: part.macs for part in count(ModelConfig(), 1000)}
    pooled = {part.name: part.macs for part in count(ModelConfig(quantise="pooled"), 1000)}
    baseline = count(ModelConfig(quantise="none", attention=False), 1000)[-1]
    assert (spatial["trunk layers"] + spatial["head fc"]) / 1e9 == pytest.approx(4.089, abs=5e-4)
    assert baseline.macs / 1e9 == pytest.approx(4.1114, abs=5e-5)
    assert baseline.parameters == 25_557_032
    assert spatial["codebook"] == 49 * 10_000 * 2048
    assert pooled["codebook"] == 10_000 * 2048
    assert spatial["attention"] / 1e9 == pytest.approx(0.0252, abs=5e-5)
    assert spatial["head fuse"] / 1e9 == pytest.approx(0.0084, abs=5e-5)
    assert count(ModelConfig(), 1000, mode="paper")[-1].macs / 1e9 == pytest.approx(4.1366, abs=5e-5)
    with pytest.raises(ValueError, match="'half'"):
        count(ModelConfig(), 1000, mode="half")  # type: ignore[arg-type]


def test_count_tool_prints_both_counts() -> None:
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "tools/count.py", "--model.codes", "1000"],
        cwd=root, env={"PYTHONPATH": str(root), "PATH": ""}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "48,578,600" in done.stdout
    assert "40,187,944" in done.stdout


@pytest.mark.parametrize(
    ("choices", "match"),
    [
        ({"attention": True, "fusion": "add"}, "fusion is 'add'"),
        ({"quantise": "none"}, "needs the codebook's token"),
        ({"stem": "small", "weights": "torchvision"}, "stem is 'small'"),
        ({"trunk": "resnet10", "weights": "torchvision"}, "no weights for resnet10"),
        ({"trunk": "vgg16"}, "resnet50"),
        ({"codes": 0}, "greater than or equal to 1"),
        ({"code": 5}, "[Ee]xtra inputs"),
    ],
)
def test_choices_that_do_not_fit_are_refused(choices: dict[str, Any], match: str) -> None:
    with pytest.raises(ValidationError, match=match):
        ModelConfig(**choices)


def test_calls_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one class"):
        build(ModelConfig(trunk="resnet10", codes=6), 0)
    with pytest.raises(ValueError, match="either losses"):
        _model()(*_batch(), return_features=True)
    with pytest.raises(ValueError, match="run one training step"):
        _model().eval()(_batch()[0])


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", "wrapped.pth"])
@pytest.mark.parametrize("classes", [5, 7])
def test_weights_from_a_file(tmp_path: Path, suffix: str, classes: int) -> None:
    torch.manual_seed(9)
    net = torchvision.models.resnet18(num_classes=classes)
    net.bn1.running_mean.fill_(0.5)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(net.state_dict(), path)
    elif suffix == ".pth":
        torch.save(net.state_dict(), path)
    else:
        torch.save({"model": {f"module.{k}": v for k, v in net.state_dict().items()}, "epoch": 3}, path)
    choices = {"trunk": "resnet18", "quantise": "none", "attention": False, "weights": str(path)}
    if classes == 5:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = _model(**choices)
        images = _batch()[0]
        torch.testing.assert_close(model.eval()(images), net.eval()(images))
    else:
        with pytest.warns(UserWarning, match="for 7 classes and 5 are wanted"):
            model = _model(**choices)
        assert model.trunk.bn1.running_mean[0] == 0.5  # type: ignore[union-attr, index]


def test_weights_that_are_not_there_or_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        _model(weights="nowhere.pth")
    path = tmp_path / "other.pth"
    torch.save(torchvision.models.resnet34().state_dict(), path)
    with pytest.raises(ValueError, match=r"does not fit trunk resnet18: missing none; unexpected layer1\.2"):
        _model(trunk="resnet18", weights=str(path))
    with pytest.raises(
        ValueError, match=r"other shapes conv1\.weight \(64, 3, 7, 7\) instead of \(64, 3, 3, 3\)"
    ):
        _model(trunk="resnet34", stem="small", weights=str(path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match=r"fetch https://.*resnet18.*nothing is downloaded|nothing is downloaded"
    ):
        _model(trunk="resnet18", weights="torchvision")


def test_torchvision_weights_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    name = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[1]
    net = torchvision.models.resnet18()
    torch.save(net.state_dict(), folder / name)
    with pytest.warns(UserWarning, match="1000 classes"):
        model = _model(trunk="resnet18", weights="torchvision")
    assert torch.equal(model.trunk.state_dict()["layer4.1.conv2.weight"], net.layer4[1].conv2.weight)
