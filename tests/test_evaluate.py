"""Evaluation: the arithmetic against published numbers, the scoring against plain PyTorch, the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import TWO_PROCESSES, finish, start
from torch import Tensor, nn

import model
import shards
from model import ModelConfig
from pipeline.config import PipelineConfig
from pipeline.corruptions import HELD_OUT_KINDS, TRAINING_KINDS, corrupt, kind_id
from pipeline.loader import EvaluationLoader
from pipeline.normalise import normalise
from pipeline.plan import evaluation_keys
from tools.evaluate import EvaluateCommand, evaluate
from tools.report import page
from tools.runtime import scoring
from tools.runtime.alexnet import ALEXNET_ERROR
from tools.runtime.checkpoint import RUN_FILE
from tools.runtime.config import RunConfig
from tools.runtime.results import CLEAN, SEVERITIES, Cell, as_json, read_csv, summarise, table

KINDS = ("gaussian_noise", "contrast")


def cells(top1: dict[str, float]) -> list[Cell]:
    return [Cell(kind, s, value, 1.0, 10) for kind, value in top1.items() for s in SEVERITIES]


# The arithmetic


def test_the_held_out_average_of_the_papers_table_4() -> None:
    """Table 4, vanilla: 35.5 49.2 41.9 60.2; Table 3 prints 46.7. Held-out kinds do not enter the mCE."""
    held_out = dict(zip(HELD_OUT_KINDS, (0.355, 0.492, 0.419, 0.602), strict=True))
    summary = summarise([Cell(CLEAN, 0, 0.9, 1.0, 10), *cells({"fog": 0.5, **held_out})])
    assert summary.unknown_top1 == pytest.approx(0.467, abs=0.0005)
    assert (summary.known_top1, summary.mean_error, summary.mce_kinds) == (0.5, 0.5, 1)
    assert "over 1 of 15 kinds" in summary.mce_label
    assert summary.mce_pct is None
    assert summarise(cells({"fog": 0.5}), partial=True).mce_pct == pytest.approx(50 / ALEXNET_ERROR["fog"])


def test_missing_and_repeated_cells_are_named() -> None:
    every = cells(dict.fromkeys(TRAINING_KINDS, 0.5))
    without = summarise([cell for cell in every if cell.name not in {("fog", 4), ("fog", 5)}])
    assert (without.missing, without.mce_pct) == ((("fog", 4), ("fog", 5)), None)
    with pytest.raises(ValueError, match="fog severity 1 stands twice"):
        summarise([*cells({"fog": 0.5}), Cell("fog", 1, 0.5, 1.0, 10)])


def test_clean_alone_has_no_mce() -> None:
    only = [Cell(CLEAN, 0, 0.9, 1.0, 10)]
    assert as_json(summarise(only))["mce"] is None
    assert "mCE" not in table(only, 10)


# The scoring


class Guess(nn.Module):
    """Logits from a fixed random projection: right about as often as not, and moved by every corruption."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.randn(3 * 16 * 16, 3, generator=torch.Generator().manual_seed(1))

    def forward(self, images: Tensor) -> Tensor:
        small = nn.functional.adaptive_avg_pool2d(images, 16).flatten(1)
        return small.float() @ self.weight + 4 * images.mean((2, 3)).float()


@pytest.fixture(scope="module")
def store(picture_shards: Path) -> shards.Store:
    return shards.open(picture_shards)


CONFIG = PipelineConfig(image_size=32, constants="imagenet", kinds=KINDS)


def counts(store: shards.Store, batch: int, rank: int = 0, ranks: int = 1) -> Tensor:
    loader = EvaluationLoader(store, CONFIG, batch=batch, rank=rank, ranks=ranks)
    got = scoring.score(
        Guess(),
        loader,
        CONFIG,
        scoring.cells_of(KINDS),
        seed=5,
        flavour="hendrycks",
        device=torch.device("cpu"),
    )
    loader.close()
    return got


def test_counts_depend_neither_on_batches_nor_on_ranks(store: shards.Store) -> None:
    want = counts(store, 64)
    assert (want[:, 0] == len(store)).all()
    assert len(set(want[:, 1].tolist())) > 3  # the cells differ, so agreement below means something
    assert torch.equal(counts(store, 7), want)
    assert torch.equal(sum(counts(store, 8, rank, 3) for rank in range(3)), want)  # type: ignore[arg-type]


def test_counts_equal_a_plain_evaluation(store: shards.Store) -> None:
    loader = EvaluationLoader(store, CONFIG, batch=len(store))
    (batch,) = list(loader)
    loader.close()
    keys = evaluation_keys(5, batch.sample_id.numpy(), kind_id("contrast"), 4)
    pixels = corrupt(
        batch.images_u8, "contrast", 4, torch.from_numpy(keys.view("int64")), constants="imagenet"
    )
    hits = int((Guess()(normalise(pixels, CONFIG)).argmax(1) == batch.labels).sum())
    names = scoring.cells_of(KINDS)
    assert counts(store, 16)[names.index(("contrast", 4)), 1] == hits


def test_top5_of_three_classes_is_certain(store: shards.Store) -> None:
    got = counts(store, 32)
    assert torch.equal(got[:, 0], got[:, 2])
    assert (got[:, 1] < got[:, 0]).all()


def test_nothing_to_score_is_an_error() -> None:
    with pytest.raises(ValueError, match="no sound image was scored for clean"):
        scoring.cells_from_counts([(CLEAN, 0)], torch.zeros(1, 3, dtype=torch.int64))


# The command


@pytest.fixture(scope="module")
def run_folder(picture_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a checkpoint of an untrained model, as the training loop writes it."""
    from tools.runtime import checkpoint
    from tools.runtime.metrics import MetricsFile

    out = tmp_path_factory.mktemp("runs") / "untrained"
    config = RunConfig(
        data=picture_shards,
        steps=1,
        pipeline=PipelineConfig(image_size=32, constants="imagenet", kinds=KINDS, batch_global=32),
        model=ModelConfig(trunk="resnet10", codes=8, init="normal"),
    )
    net = model.build(config.model, 3)
    checkpoint.write(
        out / "checkpoints",
        {"model.safetensors": net.state_dict()},
        step=1,
        config=config,
        classes=["class0", "class1", "class2"],
    )
    metrics = MetricsFile(out / "metrics.jsonl", 0)
    metrics.write({"step": 1, "loss": 2.0, "ce": 1.0, "top1_pct": 30.0})
    metrics.close()
    return out


def test_the_command_writes_what_it_prints(
    run_folder: Path, picture_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = evaluate(
        EvaluateCommand(
            checkpoint=(run_folder,), data=picture_shards, kinds=KINDS, images=40, batch=16, partial_mce=True
        )
    )
    found = report["models"]["untrained"]
    output = capsys.readouterr().out
    assert report["images"] == 40
    assert "mCE over 2 of 15 kinds" in output
    assert "not comparable with published ones" in output
    saved = json.loads((run_folder / "evaluation" / "results.json").read_text())
    assert saved["models"]["untrained"]["mce"] == found["mce"]
    again = read_csv(run_folder / "evaluation" / "cells.csv")["untrained"]
    assert len(again) == 11
    assert summarise(again, partial=True).mce_pct == pytest.approx(found["mce"], abs=1e-3)


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(
    run_folder: Path, picture_shards: Path, tmp_path: Path
) -> None:
    one = evaluate(
        EvaluateCommand(
            checkpoint=(run_folder,), data=picture_shards, kinds=KINDS, batch=16, partial_mce=True
        )
    )
    command = [
        "tools/evaluate.py",
        "--checkpoint",
        str(run_folder),
        "--data",
        str(picture_shards),
        "--batch",
        "7",
    ]
    output = finish(
        start(*TWO_PROCESSES, *command, "--kinds", *KINDS, "--partial-mce", "--out", str(tmp_path))
    )
    two = json.loads((tmp_path / "results.json").read_text())
    assert output.count("mCE over 2 of 15 kinds") == 1  # one of the two speaks
    for name in ("images", "clean_top1", "mce", "top1_per_corruption"):
        a, b = ({**r, **r["models"]["untrained"]} for r in (one, two))
        assert b[name] == a[name], name


def test_the_report_is_one_file_with_its_pictures(run_folder: Path, picture_shards: Path) -> None:
    evaluate(
        EvaluateCommand(
            checkpoint=(run_folder,), data=picture_shards, kinds=KINDS, images=40, partial_mce=True
        )
    )
    text = page(run_folder, run_folder / "evaluation")
    assert text.count("data:image/png;base64,") == 3
    assert "http" not in text
    assert "mCE over 2 of 15 kinds" in text
    with pytest.raises(FileNotFoundError, match=r"run tools/evaluate\.py first"):
        page(run_folder, run_folder / "nowhere")


def test_other_classes_are_refused(run_folder: Path, tmp_path: Path) -> None:
    from conftest import write_pictures

    from shards.build import BuildOptions, build

    write_pictures(tmp_path / "two", 4, classes=2)
    build(BuildOptions(source=tmp_path / "two", out=tmp_path / "set", name="two", workers=1))
    with pytest.raises(ValueError, match=r"has 2 classes .* the model untrained 3"):
        evaluate(EvaluateCommand(checkpoint=(run_folder,), data=tmp_path / "set"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"images": 91}, "asks for 91, but .* has 90"),
        ({"kinds": ("gausian_noise",)}, "did you mean 'gaussian_noise'"),
    ],
)
def test_wrong_requests_are_refused(
    run_folder: Path, picture_shards: Path, wrong: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(EvaluateCommand(checkpoint=(run_folder,), data=picture_shards, **wrong))  # type: ignore[arg-type]


def test_a_missing_checkpoint_is_said(tmp_path: Path, picture_shards: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        evaluate(EvaluateCommand(checkpoint=(tmp_path,), data=picture_shards))
    assert not (tmp_path / RUN_FILE).exists()
