"""What a recipe can ask for: schedules, decay, smoothing, mixing, consistency, averages; against others' code."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from scipy.spatial.distance import jensenshannon
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, MultiStepLR, SequentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import model
from model.config import ModelConfig
from pipeline.config import PipelineConfig
from pipeline.mixing import Mix, draw_mix
from tools.runtime.config import RunConfig, validated
from tools.runtime.ema import Ema
from tools.runtime.launch import as_configured, make_accelerator
from tools.runtime.optim import OptimConfig, gradient_norm, learning_rate, make_optimizer, parameter_groups
from tools.runtime.step import learning_mode
from tools.runtime.targets import consistency, targets

TOTAL, PER_EPOCH = 40, 8.0


def torch_rates(optimizer: SGD, schedule: torch.optim.lr_scheduler.LRScheduler) -> list[float]:
    rates = []
    for _ in range(TOTAL):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def ours(**settings: object) -> list[float]:
    config = OptimConfig(lr=0.1, **settings)  # type: ignore[arg-type]
    return [learning_rate(config, step, TOTAL, PER_EPOCH) for step in range(TOTAL)]


@pytest.fixture
def sgd() -> SGD:
    return SGD([nn.Parameter(torch.zeros(1))], lr=0.1)


def test_warm_up_and_cosine_are_torchs(sgd: SGD) -> None:
    warm = LinearLR(sgd, start_factor=1 / 16, end_factor=1.0, total_iters=15)
    cosine = CosineAnnealingLR(sgd, T_max=TOTAL - 16, eta_min=1e-3)
    expected = torch_rates(sgd, SequentialLR(sgd, [warm, cosine], milestones=[16]))
    got = ours(warmup_epochs=2, min_lr=1e-3)
    assert got == pytest.approx(expected, rel=1e-6)
    assert got[0] == pytest.approx(0.1 / 16)
    assert got[15] == 0.1


def test_step_schedule_is_torchs(sgd: SGD) -> None:
    expected = torch_rates(sgd, MultiStepLR(sgd, milestones=[16, 32], gamma=0.3))
    assert ours(schedule="step", drop_epochs=(2, 4), drop_factor=0.3) == pytest.approx(expected)


def test_updates_per_epoch_hold_the_rate_for_an_epoch() -> None:
    rates = ours(update="epoch")
    assert [len(set(rates[i : i + 8])) for i in range(0, TOTAL, 8)] == [1] * 5
    assert rates == sorted(rates, reverse=True)
    assert set(ours(schedule="constant", warmup_epochs=1)[8:]) == {0.1}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optim": {"schedule": "step"}}, "schedule 'step' needs at least one"),
        ({"optim": {"drop_epochs": [3]}}, "the others take none"),
        ({"optim": {"schedule": "step", "drop_epochs": [5, 3]}}, "positive and rising"),
        ({"loss": {"consistency": 1}}, "set pipeline.paired = true or pipeline.augmix = 2"),
        ({"pipeline": {"augmix": 2}}, "set loss.consistency"),
        ({"pipeline": {"augmix": 1, "paired": True}}, "both make views of an image"),
        ({"sync_bn": True, "model": {"freeze_bn": True}}, "choose one"),
        ({"monitor": {"patience": 3}}, "give --val"),
        ({"monitor": {"kinds": ["fogg"]}}, "did you mean 'fog'"),
        ({"monitor": {"severities": [6]}}, "among 1..5"),
        ({"pipeline": {"mixup": 9}}, "less than or equal to 4"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validated(RunConfig, settings, "recipe")


@pytest.fixture(scope="module")
def net() -> model.VQSA:
    return model.build(ModelConfig(trunk="resnet10", codes=4, init="normal"), 3)


def test_norms_biases_and_codes_do_not_decay(net: model.VQSA) -> None:
    decayed, rest = parameter_groups(OptimConfig(weight_decay=0.1, decay="weights"), net)
    names = {id(p): name for name, p in net.named_parameters()}
    assert {group["weight_decay"] for group in (decayed, rest)} == {0.1, 0.0}
    assert {names[id(p)] for p in rest["params"]} == {
        name for name, p in net.named_parameters() if p.ndim == 1 or name.startswith("codebook")
    }
    assert len(decayed["params"]) + len(rest["params"]) == len(names)
    (everything,) = parameter_groups(OptimConfig(weight_decay=0.1), net)
    assert len(everything["params"]) == len(names)


def test_optimisers_by_name(net: model.VQSA) -> None:
    kinds = {
        name: type(make_optimizer(OptimConfig(name=name), net)).__name__ for name in ("adam", "adamw", "sgd")
    }
    assert kinds == {"adam": "Adam", "adamw": "AdamW", "sgd": "SGD"}
    assert make_optimizer(OptimConfig(fused=True), net).defaults["fused"]
    assert not make_optimizer(OptimConfig(), net).defaults["fused"]
    with pytest.raises(ValueError, match=r"does not tell which steps the loss scale skipped"):
        make_optimizer(OptimConfig(fused=True), net, scaled=True)


def test_a_frozen_trunk_keeps_weights_and_statistics() -> None:
    config = RunConfig(optim=OptimConfig(freeze_trunk=True, weight_decay=0.1))
    net = as_configured(model.build(ModelConfig(trunk="resnet10", codes=4, init="normal"), 3), config)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    optimizer = make_optimizer(config.optim, net)
    learning_mode(net, config)
    net(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])).loss.backward()
    optimizer.step()
    after = net.state_dict()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"codebook", "attention", "head"}


def test_sync_bn_on_a_cpu_is_refused() -> None:
    with pytest.raises(ValueError, match="torch has no synchronised batch normalisation for the CPU"):
        make_accelerator(RunConfig(sync_bn=True))


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="'wandb', which is not installed; pip install wandb"):
        make_accelerator(RunConfig(trackers=("wandb",)))


# Targets


def test_smoothed_targets_are_torchs() -> None:
    logits, labels = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
    target = targets(labels, classes=5, smoothing=0.2, mix=None, counted_views=[True])
    expected = F.cross_entropy(logits, labels, label_smoothing=0.2)
    torch.testing.assert_close(F.cross_entropy(logits, target), expected)


def test_views_that_do_not_count_leave_the_mean_of_those_that_do() -> None:
    logits, labels = torch.randn(12, 5), torch.tensor([0, 1, 2, 3])
    target = targets(labels, classes=5, smoothing=0.0, mix=None, counted_views=[True, False, False])
    torch.testing.assert_close(F.cross_entropy(logits, target), F.cross_entropy(logits[:4], labels))


def test_labels_stay_labels_where_they_say_everything() -> None:
    target = targets(torch.tensor([2, 0]), classes=3, smoothing=0.0, mix=None, counted_views=[True, True])
    assert target.tolist() == [2, 0, 2, 0]


def test_consistency_is_the_jensen_shannon_divergence() -> None:
    logits_VBC = torch.randn(2, 7, 5, dtype=torch.float64)
    a, b = logits_VBC.softmax(2).numpy()
    expected = np.mean(jensenshannon(a, b, axis=1) ** 2)
    assert consistency(logits_VBC).item() == pytest.approx(expected, abs=1e-6)
    assert consistency(logits_VBC[:1].repeat(3, 1, 1)).item() == pytest.approx(0, abs=1e-7)
    certain = torch.tensor([[[50.0, -50]], [[-50.0, 50]]])
    assert consistency(certain).item() == pytest.approx(math.log(2), abs=1e-5)


def test_consistency_of_three_views_is_augmixs_sum() -> None:
    """The form in which AugMix's authors write it: clamped mixture, mean of three divergences."""
    logits_VBC = torch.randn(3, 4, 6)
    p = logits_VBC.softmax(2)
    log_mixture = p.mean(0).clamp(1e-7, 1).log()
    expected = sum(F.kl_div(log_mixture, one, reduction="batchmean") for one in p) / 3
    torch.testing.assert_close(consistency(logits_VBC), expected)


# Mixing


def mixing(**settings: object) -> PipelineConfig:
    return PipelineConfig(image_size=32, **settings)  # type: ignore[arg-type]


def test_neighbours_are_mixed_with_each_other() -> None:
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    mixed = Mix(0.75, None).images(images)
    assert mixed[:, 0, 0, 0].tolist() == [0.25, 0.75, 2.25, 2.75]
    assert Mix(0.75, None).targets(torch.eye(4))[0].tolist() == [0.75, 0.25, 0, 0]


def test_the_box_comes_from_the_neighbour_and_keeps_the_memory_format() -> None:
    images = torch.zeros(2, 3, 32, 32)
    images[1] = 1
    images = images.to(memory_format=torch.channels_last)
    mixed = Mix(1 - 12 / 1024, (4, 8, 7, 12)).images(images)
    assert mixed[0].sum().item() == 3 * 12
    assert mixed[0, :, 4:7, 8:12].min() == 1
    assert (1 - mixed[1]).sum().item() == 3 * 12
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    assert images[0].sum() == 0


def test_a_micro_batch_is_mixed_as_the_whole_batch_is() -> None:
    images, mix = torch.rand(8, 3, 32, 32), draw_mix(mixing(mixup=0.4), 5, 17)
    assert mix is not None
    parts = torch.cat([mix.images(part) for part in images.split(2)])
    assert torch.equal(parts, mix.images(images))


@pytest.mark.parametrize("alpha", [0.2, 1.0, 2.5])
def test_shares_follow_beta(alpha: float) -> None:
    shares = [mix.share for k in range(600) if (mix := draw_mix(mixing(mixup=alpha), 1, k)) is not None]
    assert scipy.stats.kstest(shares, scipy.stats.beta(alpha, alpha).cdf).pvalue > 0.01


def test_the_share_of_cutmix_is_the_area_left() -> None:
    boxes = [mix for k in range(300) if (mix := draw_mix(mixing(cutmix=1.0), 1, k)) is not None]
    for mix in boxes:
        assert mix.box is not None
        top, left, bottom, right = mix.box
        assert 0 <= top <= bottom <= 32
        assert 0 <= left <= right <= 32
        assert mix.share == pytest.approx(1 - (bottom - top) * (right - left) / 1024)
    # Cut off at the borders, so more than a half is left on average.
    assert 0.5 < np.mean([mix.share for mix in boxes]) < 0.75


def test_which_batches_are_mixed_and_how() -> None:
    both = [draw_mix(mixing(mixup=0.3, cutmix=1, mix_probability=0.5), 2, k) for k in range(800)]
    mixed = [mix for mix in both if mix is not None]
    assert 0.44 < len(mixed) / 800 < 0.56
    assert 0.4 < sum(mix.box is not None for mix in mixed) / len(mixed) < 0.6
    assert both == [draw_mix(mixing(mixup=0.3, cutmix=1, mix_probability=0.5), 2, k) for k in range(800)]
    assert both[:50] != [draw_mix(mixing(mixup=0.3, cutmix=1, mix_probability=0.5), 3, k) for k in range(50)]
    assert draw_mix(mixing(), 2, 0) is None


# Averages and norms


def test_the_average_is_torchs() -> None:
    """With the decay constant from the start, torch's averaged model is the oracle."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    average = Ema(net, 0.15)  # below (1 + t) / (10 + t) of the first step
    theirs = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.15), use_buffers=True)
    theirs.update_parameters(net)  # its first call copies
    for step in range(1, 6):
        with torch.no_grad():
            for p in net.parameters():
                p += torch.randn_like(p)
        net(torch.randn(8, 3))
        average.update(step)
        theirs.update_parameters(net)
    for name, value in theirs.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(average.model_state()[name], value)


def test_the_average_is_lent_and_given_back() -> None:
    net = nn.Linear(2, 2)
    average = Ema(net, 0.5)
    own = net.weight.detach().clone() + 1
    with torch.no_grad():
        net.weight.add_(1)
    with average.applied():
        torch.testing.assert_close(net.weight.detach(), own - 1)
    assert torch.equal(net.weight.detach(), own)


@pytest.mark.parametrize("clip", [None, 0.5, 100.0])
def test_gradients_are_measured_and_clipped(clip: float | None) -> None:
    accelerator = Accelerator(cpu=True)
    parameters = [nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(2))]
    gradients = [torch.randn(3, 3), torch.randn(5)]
    for p, gradient in zip(parameters, gradients, strict=False):
        p.grad = gradient.clone()
    expected = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
    assert gradient_norm(accelerator, parameters, clip).item() == pytest.approx(expected, rel=1e-6)
    scale = 1.0 if clip is None else min(1.0, clip / expected)
    assert parameters[0].grad is not None
    torch.testing.assert_close(parameters[0].grad, gradients[0] * scale, rtol=1e-5, atol=0)
