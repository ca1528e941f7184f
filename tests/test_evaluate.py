"""Evaluation: the arithmetic against published numbers, the scoring against plain PyTorch, the command."""

from __future__ import annotations

import itertools
import json
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import RUN_KINDS, TWO_PROCESSES, finish, start
from torch import Tensor, nn

import shards
from pipeline.config import PipelineConfig
from pipeline.corruptions import HELD_OUT_KINDS, TRAINING_KINDS, corrupt, kind_id
from pipeline.loader import EvaluationBatch, EvaluationLoader
from pipeline.normalise import normalise
from pipeline.plan import evaluation_keys
from tools.evaluate import EvaluateCommand, evaluate
from tools.evaluation import adaptation, models
from tools.evaluation.passes import Pass, Settings, cell_pixels
from tools.runtime import scoring
from tools.runtime.alexnet import ALEXNET_ERROR
from tools.runtime.checkpoint import RUN_FILE
from tools.runtime.results import CLEAN, SEVERITIES, Cell, as_json, read_csv, summarise, table

KINDS = RUN_KINDS


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
    assert as_json(summary)["known_kinds"] == 1
    assert as_json(summary)["unknown_kinds"] == 4
    printed = table([Cell(CLEAN, 0, 0.9, 1.0, 10), *cells({"fog": 0.5, "spatter": 0.4})], 10)
    assert "mean corruption error, unnormalised (1 of 15 kinds): 50.00 %" in printed
    assert "held-out kinds (1 of 4 kinds), mean top-1: 40.00 %" in printed
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


def launch(processes: int, *arguments: str) -> subprocess.Popen[str]:
    launcher = [str(processes) if word == "2" else word for word in TWO_PROCESSES] if processes > 1 else []
    return start(*launcher, "tools/evaluate.py", *arguments)


def numbers(out: Path) -> tuple[str, object]:
    """All that an evaluation found: the cells as text, and the aggregates."""
    report = json.loads((out / "results.json").read_text())
    found = dict(report["models"]["untrained"])
    return (out / "cells.csv").read_text(), found


@pytest.mark.slow
def test_one_and_three_processes_and_any_batch_give_the_same_numbers(
    run_folder: Path, picture_shards: Path, tmp_path: Path
) -> None:
    """Every cell to the last printed digit, calibration and code measures included."""
    request = EvaluateCommand(
        checkpoint=(run_folder,), data=picture_shards, kinds=KINDS, partial_mce=True, out=tmp_path / "64"
    )
    evaluate(request)
    evaluate(request.model_copy(update={"batch": 8, "out": tmp_path / "8"}))
    arguments = ["--checkpoint", str(run_folder), "--data", str(picture_shards), "--kinds", *KINDS]
    output = finish(launch(3, *arguments, "--partial-mce", "--batch", "8", "--out", str(tmp_path / "three")))
    assert output.count("mCE over 2 of 15 kinds") == 1  # one of them speaks
    want = numbers(tmp_path / "64")
    assert numbers(tmp_path / "8")[0] == want[0]
    assert numbers(tmp_path / "three")[0] == want[0]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 3])
def test_a_killed_evaluation_goes_on_where_it_was(
    run_folder: Path, picture_shards: Path, tmp_path: Path, processes: int
) -> None:
    """kill -9 in the middle, then go on with another batch size and number of processes: the same numbers."""
    request = EvaluateCommand(
        checkpoint=(run_folder,), data=picture_shards, kinds=KINDS, out=tmp_path / "whole"
    )
    evaluate(request)
    out = tmp_path / "killed"
    arguments = [
        "--checkpoint",
        str(run_folder),
        "--data",
        str(picture_shards),
        "--kinds",
        *KINDS,
        "--out",
        str(out),
    ]
    process = launch(1, *arguments, "--batch", "4", "--save-every-s", "0")
    until_s = time.monotonic() + 200
    while not any((out / "partial").glob("*.npz")) and process.poll() is None and time.monotonic() < until_s:
        time.sleep(0.02)
    process.kill()
    said = process.communicate()[0]
    assert not (out / "results.json").exists(), said
    (part,) = (out / "partial").glob("*.npz")
    done = np.load(part)["untrained/done_CN"]
    assert 0 < done.sum() < done.size
    if processes == 1:
        evaluate(request.model_copy(update={"out": out, "batch": 64}))
    else:
        output = finish(launch(processes, *arguments, "--batch", "64"))
        assert "going on with the partial results" in output
    assert numbers(out)[0] == numbers(tmp_path / "whole")[0]
    assert not (out / "partial").exists()


def test_partial_results_of_another_evaluation_are_not_mixed_in(
    run_folder: Path, picture_shards: Path, tmp_path: Path
) -> None:
    request = EvaluateCommand(checkpoint=(run_folder,), data=picture_shards, kinds=("fog",), out=tmp_path)
    (tmp_path / "partial").mkdir()
    (tmp_path / "partial" / "evaluation.json").write_text('{"seed": 1}')
    np.savez(tmp_path / "partial" / "on-the-fly.0.npz", nothing=np.zeros(1))
    with pytest.raises(ValueError, match=r"another evaluation \(different: .*seed.*\); repeat that command"):
        evaluate(request)
    evaluate(request.model_copy(update={"fresh": True}))
    assert (tmp_path / "results.json").is_file()


def test_models_scored_together_get_their_own_numbers(
    run_folder: Path, picture_shards: Path, tmp_path: Path
) -> None:
    """Two checkpoints and a baseline that is shown other pixels, in one pass each."""
    baseline = "test_evaluate_sets:three_classes"
    together = EvaluateCommand(
        checkpoint=(run_folder, run_folder),
        models=(baseline,),
        data=picture_shards,
        kinds=("fog",),
        out=tmp_path,
    )
    evaluate(together)
    found = read_csv(tmp_path / "cells.csv")
    assert list(found) == ["untrained", "untrained@1", "three_classes"]
    assert found["untrained"] == found["untrained@1"]
    evaluate(together.model_copy(update={"checkpoint": (), "out": tmp_path / "alone"}))
    assert read_csv(tmp_path / "alone" / "cells.csv")["three_classes"] == found["three_classes"]
    assert found["three_classes"] != found["untrained"]
    assert found["untrained"][1].agreement is not None
    assert found["three_classes"][1].agreement is None  # it has no codes


@pytest.mark.slow
def test_compiled_models_say_the_same(run_folder: Path, picture_shards: Path, tmp_path: Path) -> None:
    """The codebook and a baseline of which a hook keeps the feature; the last batch is a smaller one."""
    plain = EvaluateCommand(
        checkpoint=(run_folder,),
        models=("test_evaluate_sets:three_classes",),
        data=picture_shards,
        kinds=("fog",),
        batch=64,
        out=tmp_path / "plain",
    )
    evaluate(plain)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    report = evaluate(plain.model_copy(update={"compile": True, "out": tmp_path / "compiled"}))
    assert report["compiled"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0  # compiled indeed
    want = read_csv(tmp_path / "plain" / "cells.csv")
    for name, cells_found in read_csv(tmp_path / "compiled" / "cells.csv").items():
        for found, cell in zip(cells_found, want[name], strict=True):
            assert found.name == cell.name
            assert found.top1 == pytest.approx(cell.top1, abs=0.03)  # 90 images: two of them by rounding
            for value in ("nll", "agreement", "drift_before"):
                assert getattr(found, value) == pytest.approx(getattr(cell, value), abs=2e-3)


def test_jpeg_after_the_corruption_changes_corrupted_images_alone(
    run_folder: Path, picture_shards: Path, tmp_path: Path
) -> None:
    request = EvaluateCommand(
        checkpoint=(run_folder,), data=picture_shards, kinds=("fog",), out=tmp_path / "a"
    )
    evaluate(request)
    evaluate(request.model_copy(update={"jpeg85": True, "out": tmp_path / "b"}))
    a, b = (read_csv(tmp_path / name / "cells.csv")["untrained"] for name in "ab")
    assert a[0] == b[0]
    assert all(x.nll != y.nll for x, y in zip(a[1:], b[1:], strict=True))


# Adaptation


def test_adapted_statistics_are_those_of_the_cell(
    run_folder: Path, picture_shards: Path, tmp_path: Path
) -> None:
    """A row of its own; on all images of a cell the first layer's statistics are that cell's own."""
    request = EvaluateCommand(
        checkpoint=(run_folder,), data=picture_shards, kinds=("contrast",), adapt_bn=90, out=tmp_path / "a"
    )
    evaluate(request)
    found = read_csv(tmp_path / "a" / "cells.csv")
    assert list(found) == ["untrained", "untrained+bn"]
    assert found["untrained"] != found["untrained+bn"]
    evaluate(request.model_copy(update={"batch": 7, "out": tmp_path / "b"}))
    assert read_csv(tmp_path / "b" / "cells.csv")["untrained+bn"] == found["untrained+bn"]

    store = shards.open(picture_shards)
    plain = models.from_checkpoint(run_folder)
    adapted = adaptation.adapted([plain], 90, 0)[0]
    settings = Settings(0, "hendrycks", False, None, 64, 1, "stop", torch.device("cpu"), None)
    part = Pass("p", store, np.arange(90), [(CLEAN, 0), ("contrast", 5)])
    statistics = adaptation.CellStatistics(adapted, part, 90, 0, settings)
    statistics.put(("contrast", 5))
    loader = EvaluationLoader(store, plain.preprocessing.pipeline(1), batch=90)
    (batch,) = list(loader)
    loader.close()
    pixels = cell_pixels(batch.images_u8, batch.sample_id.numpy(), ("contrast", 5), "imagenet", settings)
    activation = plain.net.trunk.conv1(normalise(pixels, plain.preprocessing.pipeline(1)))  # type: ignore[operator, union-attr]
    layer = adapted.net.trunk.bn1  # type: ignore[union-attr]
    torch.testing.assert_close(layer.running_mean, activation.mean((0, 2, 3)), atol=1e-4, rtol=1e-3)
    # With a prior of as many images, half of the training's own statistics is kept.
    (mixed,) = adaptation.adapted([plain], 90, 90)
    adaptation.CellStatistics(mixed, part, 90, 90, settings).put(("contrast", 5))
    trained = plain.net.trunk.bn1.running_mean  # type: ignore[union-attr]
    torch.testing.assert_close(mixed.net.trunk.bn1.running_mean, (layer.running_mean + trained) / 2)  # type: ignore[union-attr]


@pytest.mark.parametrize(("images", "sizes"), [(64, [64]), (65, [65]), (100, [64, 36]), (129, [64, 65])])
def test_adaptation_takes_sound_images_in_batches_of_some_size(images: int, sizes: list[int]) -> None:
    """No grey stand-in of a damaged image, and no batch of one, enters the statistics."""
    ids = torch.arange(images + 2)
    damaged = torch.zeros(images + 2, dtype=torch.bool)
    damaged[[0, images + 1]] = True
    pixels = ids.to(torch.uint8)[:, None, None, None].expand(-1, 1, 1, 3)

    cuts = [0, *(1 + 64 * i for i in range(1, images // 64 + 1)), images + 2]
    made = [
        EvaluationBatch(images_u8=pixels[a:b], labels=ids[a:b], sample_id=ids[a:b], damaged=damaged[a:b])
        for a, b in itertools.pairwise(cuts)
        if a < b
    ]
    found = list(adaptation.sound_batches(made, torch.device("cpu")))
    assert [len(pixels_u8) for pixels_u8, _ in found] == sizes
    assert torch.equal(torch.cat([i for _, i in found]), ids[1:-1])
    assert torch.equal(torch.cat([p for p, _ in found]), pixels[1:-1])


def test_adaptation_needs_batch_normalisation(picture_shards: Path, tmp_path: Path) -> None:
    request = EvaluateCommand(
        models=("test_evaluate_sets:three_classes",), data=picture_shards, adapt_bn=8, out=tmp_path
    )
    with pytest.raises(ValueError, match="no batch normalisation to adapt in three_classes"):
        evaluate(request)


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


@pytest.mark.slow
def test_compiled_weights_are_frozen() -> None:
    """Normalisation is folded into the convolution before it: that a change of it goes unseen shows that."""
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
    nn.init.normal_(norm.weight, 1, 0.2)
    nn.init.normal_(norm.bias)
    net = nn.Sequential(conv, norm, nn.ReLU(), nn.Flatten(), nn.Linear(8 * 30 * 30, 4)).eval()
    shown = models.Preprocessing(mean=(0, 0, 0), std=(1, 1, 1), size=32, resize=32)
    classifier = models.Classifier("small", net, shown, ["a", "b", "c", "d"], {})
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        want = classifier(images).logits
        classifier.compile()
        assert torch.allclose(classifier(images).logits, want, atol=1e-5)
        for weight in norm.parameters():
            weight.zero_()
        assert torch.allclose(classifier(images).logits, want, atol=1e-5)
    assert torch._dynamo.config.recompile_limit >= 64  # last batches of that many sets


def test_compiled_models_are_not_adapted(picture_shards: Path) -> None:
    with pytest.raises(ValueError, match="--compile freezes them"):
        EvaluateCommand(checkpoint=(Path("run"),), data=picture_shards, adapt_bn=8, compile=True)


def test_a_missing_checkpoint_is_said(tmp_path: Path, picture_shards: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        evaluate(EvaluateCommand(checkpoint=(tmp_path,), data=picture_shards))
    assert not (tmp_path / RUN_FILE).exists()
