"""The recipes: each loads, and an ablation differs from the paper's only where its name says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from model.count import count
from tools.runtime.config import RunConfig, flatten, read_recipe, validated

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
NO_ATTENTION = {"model.attention": False}
DIFFERENCES: dict[str, dict[str, Any]] = {
    "finetune": {"model.quantise": "none", **NO_ATTENTION},
    "replace": {"model.fusion": "replace", **NO_ATTENTION},
    "add": {"model.fusion": "add", **NO_ATTENTION},
    "concat": NO_ATTENTION,
    "concat_sa": {},
    "codes_1k": {"model.codes": 1_000},
    "codes_10k": {},
    "codes_100k": {"model.codes": 100_000},
    "resnext101_32x8d": {"model.trunk": "resnext101_32x8d"},
    "resnext101_64x4d": {"model.trunk": "resnext101_64x4d"},
    "no_corruptions": {"pipeline.kinds": []},
    "best": {"model.init": "kmeans", "model.init_batches": 16, "model.ema": 0.95, "model.revive_after": 10},
}
EVERY = sorted(path.stem for path in RECIPES.glob("*.toml"))


def _config(name: str) -> RunConfig:
    path = RECIPES / f"{name}.toml"
    return validated(RunConfig, read_recipe(path), str(path))


def _settings(name: str) -> dict[str, Any]:
    return flatten(_config(name).model_dump(mode="json"))


@pytest.mark.parametrize("name", DIFFERENCES)
def test_differs_from_the_papers_only_where_it_says(name: str) -> None:
    paper, found = _settings("paper"), _settings(name)
    assert paper.keys() == found.keys()
    assert {key: found[key] for key in found if found[key] != paper[key]} == DIFFERENCES[name]


@pytest.mark.parametrize(
    ("name", "full"),
    # FACTS: ResNet-50 is 25,557,032; each part of the paper's model is a multiple of d = 2048 more.
    [
        ("finetune", 25_557_032),
        ("replace", 25_557_032 + 10_000 * 2048),
        ("add", 25_557_032 + 10_000 * 2048),
        ("concat", 25_557_032 + 10_000 * 2048 + 4097 * 2048),
        ("concat_sa", 67_010_600),
        ("codes_1k", 48_578_600),
        ("codes_100k", 251_330_600),
        ("resnext101_32x8d", 67_010_600 - 25_557_032 + 88_791_336),
        ("resnext101_64x4d", 67_010_600 - 25_557_032 + 83_455_272),
    ],
)
def test_parameters(name: str, full: int) -> None:
    assert count(_config(name).model, 1000)[-1].parameters == full


@pytest.mark.parametrize("name", EVERY)
def test_is_complete_but_for_a_length_the_paper_does_not_state(name: str) -> None:
    config = _config(name)
    if config.epochs is None and config.steps is None:
        with pytest.raises(ValueError, match="the run has no length: say epochs or steps"):
            config.total_steps(1000)
    else:
        assert config.total_steps(1000) > 0


@pytest.mark.parametrize("name", EVERY)
def test_quirks_of_the_authors_code_are_the_released_recipes_alone(name: str) -> None:
    config = _config(name)
    assert config.model.released_eval_scale == (name == "released")
    if name == "released":
        choices = config.model
        assert (choices.quantise, choices.metric, choices.init) == ("pooled", "cosine", "uniform03")
        assert (config.optim.name, config.optim.lr, config.optim.momentum) == ("sgd", 1e-3, 0.9)
        assert (config.optim.weight_decay, config.epochs, config.pipeline.law) == (5e-4, 300, "bag")


@pytest.mark.parametrize("name", EVERY)
def test_a_wrong_option_fails_when_it_is_read(name: str) -> None:
    settings = read_recipe(RECIPES / f"{name}.toml")
    wrong = {**settings, "model": {**settings["model"], "fusoin": "concat"}}
    with pytest.raises(
        ValueError, match=r"r\.toml: unknown key 'model\.fusoin'; did you mean 'model\.fusion'"
    ):
        validated(RunConfig, wrong, "r.toml")
    wrong = {**settings, "model": {**settings["model"], "init": "zeros"}}
    with pytest.raises(ValueError, match=r"r\.toml: model\.init: .*'kmeans'.*got 'zeros'"):
        validated(RunConfig, wrong, "r.toml")
    wrong = {**settings, "model": {**settings["model"], "top_k": 3, "ema": 0.5}}
    with pytest.raises(ValueError, match="set ema to 0, or top_k to 1"):
        validated(RunConfig, wrong, "r.toml")
