"""Which images and models an evaluation takes, and what it refuses."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from conftest import write_pictures
from PIL import Image
from torch import Tensor, nn

import shards
from pipeline.config import PipelineConfig
from pipeline.loader import EvaluationLoader
from tools.evaluate import EvaluateCommand, evaluate
from tools.evaluation import models, sets
from tools.evaluation.classes import imagenet_classes, outputs_of
from tools.evaluation.folder import open_folder
from tools.evaluation.models import Classifier, Preprocessing
from tools.evaluation.outcomes import Outcomes, Snapshots
from tools.evaluation.run import list_sources
from tools.runtime.results import CLEAN, read_csv

SIDE = 32


class Guess(nn.Module):
    """Logits of a few classes from the mean colour and a fixed random projection."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(3 * 16, classes)
        with torch.no_grad():
            self.fc.bias.zero_()
            self.fc.weight.copy_(torch.randn(classes, 48, generator=torch.Generator().manual_seed(1)))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(nn.functional.adaptive_avg_pool2d(images, 4).flatten(1))
        return logits


SHOWN = {
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "size": SIDE,
    "resize": 36,
    "interpolation": "bicubic",
}


def three_classes() -> tuple[nn.Module, dict[str, Any]]:
    return Guess(3), {**SHOWN, "classes": ["class0", "class1", "class2"], "trained_on": ["fog"]}


def five_classes() -> tuple[nn.Module, dict[str, Any]]:
    return Guess(5), {**SHOWN, "classes": ["class4", "class1", "class0", "class3", "class2"]}


def no_pair() -> nn.Module:
    return Guess(3)


def wrong_mean() -> tuple[nn.Module, dict[str, Any]]:
    return Guess(3), {**SHOWN, "mean": (0.5, 0.5)}


def few_outputs() -> tuple[nn.Module, dict[str, Any]]:
    return Guess(3), SHOWN


def spec(function: Callable[[], object]) -> str:
    return f"test_evaluate_sets:{function.__name__}"


def write_cell(folder: Path, side: int = SIDE, count: int = 6, suffix: str = "png", seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    for i in range(count):
        path = folder / f"class{i % 3}" / f"{i}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(path)


@pytest.fixture
def on_disk(tmp_path: Path) -> Path:
    root = tmp_path / "c"
    for s in range(1, 6):
        write_cell(root / "fog" / str(s), seed=s)
    write_cell(root / "clean")
    return root


def pixels(store: shards.Store, config: PipelineConfig) -> Tensor:
    loader = EvaluationLoader(store, config, batch=len(store))
    (batch,) = list(loader)
    loader.close()
    return batch.images_u8


# Image files as records


def test_files_are_read_as_pillow_reads_them(on_disk: Path) -> None:
    """At the model's own size nothing is resized: the pixels are the file's."""
    store = open_folder(on_disk / "fog" / "2", "fog", SIDE)
    assert store.classes == ["class0", "class1", "class2"]
    got = pixels(store, PipelineConfig(image_size=SIDE, eval_resize=SIDE, eval_interpolation="bicubic"))
    for i in range(len(store)):
        want = np.asarray(Image.open(on_disk / "fog" / "2" / f"{store.key(i)}.png"))
        assert np.array_equal(got[i].numpy(), want)


@pytest.mark.parametrize(
    ("interpolation", "filter_"),
    [("bilinear", Image.Resampling.BILINEAR), ("bicubic", Image.Resampling.BICUBIC)],
)
def test_resizing_is_within_a_level_of_pillows(tmp_path: Path, interpolation: Any, filter_: Any) -> None:
    write_pictures(tmp_path / "p", 6, side=90)
    store = open_folder(tmp_path / "p", "p")
    config = PipelineConfig(image_size=56, eval_resize=64, eval_interpolation=interpolation)
    got = pixels(store, config).numpy().astype(int)
    errors = []
    for i in range(len(store)):
        image = Image.open(tmp_path / "p" / f"{store.key(i)}.jpg")
        short = min(image.size)
        size = tuple(side * 64 // short for side in image.size)
        left, top = (round((side - 56) / 2) for side in size)
        want = np.asarray(image.resize(size, filter_).crop((left, top, left + 56, top + 56))).astype(int)
        errors.append(np.abs(got[i] - want).mean())
    assert max(errors) < 0.5


def test_a_folder_equals_shards_of_it(tmp_path: Path) -> None:
    from shards.build import BuildOptions, build

    write_pictures(tmp_path / "p", 12)
    build(BuildOptions(source=tmp_path / "p", out=tmp_path / "s", name="p", workers=1))
    config = PipelineConfig(image_size=48)
    a, b = open_folder(tmp_path / "p", "p"), shards.open(tmp_path / "s")
    assert torch.equal(pixels(a, config), pixels(b, config))
    assert a.label.tolist() == b.label.tolist()


def test_a_damaged_file_is_named_and_left_out(tmp_path: Path) -> None:
    write_cell(tmp_path / "set", side=40, suffix="jpg")
    (tmp_path / "set" / "class0" / "0.jpg").write_bytes(b"no picture")
    report = evaluate(
        EvaluateCommand(
            models=(spec(three_classes),), sets=(f"odd={tmp_path / 'set'}",), out=tmp_path / "out"
        )
    )
    assert report["images"] == 5
    (where,) = report["damaged"]
    assert "class0/0.jpg" in where


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        open_folder(tmp_path / "absent", "x")
    with pytest.raises(ValueError, match="wanted one folder per class"):
        open_folder(tmp_path, "x")
    (tmp_path / "class0").mkdir()
    with pytest.raises(ValueError, match="class0: a class folder without"):
        open_folder(tmp_path, "x")


# ImageNet-C on disk


def test_cells_on_disk_are_scored_as_they_are(on_disk: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = evaluate(
        EvaluateCommand(models=(spec(three_classes),), imagenet_c=on_disk, out=out, partial_mce=True, batch=4)
    )
    assert [cell.name for cell in read_csv(out / "cells.csv")["three_classes"]] == [
        (CLEAN, 0),
        *(("fog", s) for s in range(1, 6)),
    ]
    net, _ = three_classes()

    def predictions(folder: Path) -> list[int]:
        images = [torch.from_numpy(np.array(Image.open(p))) for p in sorted(folder.glob("*/*.png"))]
        index = net((torch.stack(images).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5).argmax(1)
        return [int(i) for i in index]

    labels = [0, 0, 1, 1, 2, 2]
    found = predictions(on_disk / "fog" / "3")
    cell = next(c for c in read_csv(out / "cells.csv")["three_classes"] if c.name == ("fog", 3))
    assert cell.top1 * 6 == pytest.approx(sum(a == b for a, b in zip(found, labels, strict=True)), abs=1e-4)
    # Consistency compares with the clean files of the same names.
    clean = predictions(on_disk / "clean")
    assert cell.consistency == pytest.approx(
        sum(a == b for a, b in zip(found, clean, strict=True)) / 6, abs=1e-4
    )
    assert "trained on 1 of the 15" in report["models"]["three_classes"]["verdict"]


def test_wrong_sizes_on_disk_are_refused(on_disk: Path, tmp_path: Path) -> None:
    request = EvaluateCommand(models=(spec(three_classes),), imagenet_c=on_disk, out=tmp_path / "out")
    write_cell(on_disk / "snow" / "1", side=40)
    with pytest.raises(
        ValueError, match=r"snow/1/class\d/\d\.png: 40 x 40 pixels, .* the model takes 32 x 32"
    ):
        evaluate(request)
    # One wrong image among right ones is found when its cell is opened.
    write_cell(on_disk / "snow" / "1")
    Image.new("RGB", (40, 40)).save(on_disk / "snow" / "1" / "class1" / "4.png")
    with pytest.raises(ValueError, match=r"4\.png: 40 x 40"):
        open_folder(on_disk / "snow" / "1", "x", SIDE)


def test_other_layouts_on_disk_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="wants <corruption>/<severity>"):
        sets.corruptions_on_disk(tmp_path / "absent", "imagenet-c", SIDE, "refuse")
    with pytest.raises(ValueError, match="no corruption folders"):
        sets.corruptions_on_disk(tmp_path, "imagenet-c", SIDE, "refuse")
    (tmp_path / "gausian_noise").mkdir()
    with pytest.raises(ValueError, match="did you mean 'gaussian_noise'"):
        sets.corruptions_on_disk(tmp_path, "imagenet-c", SIDE, "refuse")
    (tmp_path / "gausian_noise").rename(tmp_path / "fog")
    with pytest.raises(ValueError, match="wanted a folder for each severity 1 to 5, found none"):
        sets.corruptions_on_disk(tmp_path, "imagenet-c", SIDE, "refuse")


def test_real_severities_are_put_in_order(tmp_path: Path) -> None:
    """ImageNet-C-bar names its severities by their strength."""
    for strength in ("10.0", "2.5", "5.0", "7.5", "1.0"):
        write_cell(tmp_path / "perlin_noise" / strength)
    found = sets.corruptions_on_disk(tmp_path, "imagenet-c-bar", SIDE, "refuse")
    assert [s.cells[0] for s in found] == [("perlin_noise", i) for i in range(1, 6)]
    assert [s.open().path.name for s in found] == ["1.0", "2.5", "5.0", "7.5", "10.0"]
    for strength in ("1", "2", "12"):  # 12 is a strength too, not the severities 1 and 2
        write_cell(tmp_path / "whole" / "sparkles" / strength)
    whole = sets.corruptions_on_disk(tmp_path / "whole", "imagenet-c-bar", SIDE, "refuse")
    assert [(s.cells[0][1], s.path.name) for s in whole] == [(1, "1"), (2, "2"), (3, "12")]


def test_one_cell_is_not_scored_twice(on_disk: Path, picture_shards: Path, tmp_path: Path) -> None:
    both = {"data": picture_shards, "imagenet_c": on_disk, "out": tmp_path}
    with pytest.raises(ValueError, match="fog severity 1 would be scored twice"):
        evaluate(EvaluateCommand(models=(spec(three_classes),), kinds=("fog",), **both))  # type: ignore[arg-type]


@pytest.mark.parametrize("names", [("v2", "v2.top"), ("a/b", "a-b"), ("a", "[a]")])
def test_sets_of_similar_names_keep_their_partial_results_apart(tmp_path: Path, names: Any) -> None:
    for name in names:
        found = Outcomes.empty(1, 2, 0)
        found.done_CN[:] = True
        found.prediction_CN[:] = len(name)
        Snapshots(tmp_path, name).save({"m": found})
    for name in names:
        got = Snapshots(tmp_path, name).load(["m"])["m"]
        assert got.prediction_CN.tolist() == [[len(name)] * 2]
    assert Snapshots(tmp_path, "other").load(["m"]) == {}


def test_clean_images_of_the_first_set_are_kept(on_disk: Path, picture_shards: Path, tmp_path: Path) -> None:
    """Two sets of clean images: one is scored, and it is not neither."""
    shutil.copytree(on_disk / "clean", tmp_path / "bar" / "clean")
    write_cell(tmp_path / "bar" / "perlin_noise" / "1")
    both: Any = {"imagenet_c": on_disk, "imagenet_c_bar": tmp_path / "bar"}
    classifiers = [models.from_name(spec(three_classes))]

    def sources(**more: Any) -> list[str]:
        command = EvaluateCommand(models=(spec(three_classes),), out=tmp_path / "out", **both, **more)
        return [s.name for s in list_sources(command, classifiers) if (CLEAN, 0) in s.cells]

    assert sources() == ["imagenet-c/clean/0"]
    assert sources(data=picture_shards, kinds=("none",)) == ["on-the-fly"]


# Classes


def test_a_set_of_fewer_classes_is_scored_among_them(tmp_path: Path) -> None:
    """As ImageNet-A and -R are: the logits of the other classes take no part."""
    write_cell(tmp_path / "r", side=40)
    out = tmp_path / "out"
    evaluate(EvaluateCommand(models=(spec(five_classes),), sets=(f"imagenet-r={tmp_path / 'r'}",), out=out))
    (cell,) = read_csv(out / "cells.csv")["five_classes"]
    assert cell.name == ("imagenet-r", 0)
    store = open_folder(tmp_path / "r", "r")
    images = pixels(store, PipelineConfig(image_size=SIDE, eval_resize=36, eval_interpolation="bicubic"))
    net, settings = five_classes()
    logits = net((images.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5)
    outputs = [settings["classes"].index(name) for name in store.classes]
    assert outputs == [2, 1, 4]
    right = logits[:, outputs].argmax(1).numpy() == store.label
    assert cell.top1 == pytest.approx(right.mean())


def test_class_lists_must_fit() -> None:
    names = ["a", "b", "c"]
    assert outputs_of(["c", "a"], names, "set", "model", fewer=True).tolist() == [2, 0]
    assert outputs_of(["0", "2"], names, "v2", "model", fewer=True).tolist() == [0, 2]
    with pytest.raises(
        ValueError, match=r"set has 2 classes \(a, b\), model 3 .* or say --fewer-classes mask"
    ):
        outputs_of(["a", "b"], names, "set", "model", fewer=False)
    with pytest.raises(ValueError, match="1 of the data are none of the model's, the first is 'd'"):
        outputs_of(["a", "d"], names, "set", "model", fewer=True)


def test_imagenets_classes_are_timms() -> None:
    from timm.data import ImageNetInfo

    assert imagenet_classes() == ImageNetInfo().label_names()


# Models


def test_torchvision_models_bring_their_preprocessing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights themselves are not needed to see how a model wants its images."""
    build = torchvision.models.get_model
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, weights: build(name, weights=None))
    v2 = models.from_name("torchvision:resnet18")
    assert (v2.preprocessing.size, v2.preprocessing.resize, v2.classes[0]) == (224, 256, "n01440764")
    assert models.from_name("torchvision:resnet50@IMAGENET1K_V2").preprocessing.resize == 232
    assert models.from_name("torchvision:efficientnet_b0").preprocessing.interpolation == "bicubic"
    with pytest.raises(ValueError, match="no model 'resnet51'; did you mean"):
        models.from_name("torchvision:resnet51")
    with pytest.raises(ValueError, match="no weights 'V9'"):
        models.from_name("torchvision:resnet18@V9")


def test_timm_models_bring_their_preprocessing(monkeypatch: pytest.MonkeyPatch) -> None:
    build = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: build(name, pretrained=False))
    shown = models.from_name("timm:tf_efficientnet_lite0.in1k").preprocessing
    assert (shown.size, shown.resize, shown.interpolation, shown.mean) == (
        224,
        256,
        "bicubic",
        (0.5, 0.5, 0.5),
    )
    with pytest.raises(ValueError, match="timm has no model 'resnet51'"):
        models.from_name("timm:resnet51")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("resnet50", "wanted torchvision:NAME, timm:NAME or package.module:function"),
        ("test_evaluate_sets:absent", "has no 'absent'"),
        (spec(no_pair), r"returns \(torch.nn.Module, preprocessing\), got Guess"),
        (spec(wrong_mean), "preprocessing mean.2: Field required"),
    ],
)
def test_wrong_model_specs_are_refused(wrong: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.from_name(wrong)


def test_a_package_that_is_not_there() -> None:
    with pytest.raises(ImportError, match="install it, or run where it can be imported"):
        models.from_name("no_such_package_of_ours:model")


def test_outputs_must_be_as_many_as_classes() -> None:
    with pytest.raises(ValueError, match=r"outputs of shape \(1, 3\), wanted \(1, 1000\)"):
        models.check_outputs(models.from_name(spec(few_outputs)), torch.device("cpu"))


def test_the_feature_of_any_model_is_what_its_last_layer_sees() -> None:
    classifier = models.from_name(spec(three_classes))
    images = torch.randn(2, 3, SIDE, SIDE)
    signals = classifier(images)
    want = nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)
    assert signals.before is not None
    torch.testing.assert_close(signals.before, want)


def test_names_are_told_apart() -> None:
    made = [
        Classifier("run", Guess(3), Preprocessing.model_validate(SHOWN), ["a", "b", "c"], {"step": step})
        for step in (100, 200, 200)
    ]
    models.unique_names(made)
    assert [c.name for c in made] == ["run", "run@200", "run#3"]


def test_a_checkpoint_without_its_configuration(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"has weights but no run\.json"):
        models.from_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"exported model.* give the run or the checkpoint"):
        models.from_checkpoint(tmp_path)


# Requests


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"data": Path("x")}, "no model: give --checkpoint RUN or --models"),
        ({"models": ("a:b",), "out": Path("x")}, "no images: give --data"),
        ({"models": ("a:b",), "data": Path("x")}, "no run folder for the results"),
        ({"models": ("a:b",), "out": Path("x"), "mos": Path("y")}, "--mos and --mos-images belong together"),
    ],
)
def test_requests_that_ask_for_too_little(request_: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluateCommand(**request_)


def test_sets_need_a_name(tmp_path: Path) -> None:
    request = {"models": (spec(three_classes),), "out": tmp_path}
    with pytest.raises(ValueError, match="wanted NAME=PATH"):
        evaluate(EvaluateCommand(sets=(str(tmp_path),), **request))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'fog' cannot be the name of a set"):
        evaluate(EvaluateCommand(sets=(f"fog={tmp_path}",), **request))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("later", "message"),
    [
        ("absent", "absent"),
        ("others", "3 of the data are none of the model's"),
        ("few", r"--images asks for 5, but .*few has 3"),
    ],
)
def test_every_set_is_looked_at_before_the_first_is_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, later: str, message: str
) -> None:
    write_cell(tmp_path / "first", side=40)
    write_cell(tmp_path / "few", side=40, count=3)
    for i in range(3):
        shutil.copytree(tmp_path / "first" / "class0", tmp_path / "others" / f"other{i}")

    def not_yet(*_: object) -> None:
        pytest.fail("a set was scored before all were looked at")

    monkeypatch.setattr("tools.evaluation.run.read_set", not_yet)
    named = tuple(f"{name}={tmp_path / name}" for name in ("first", later))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        evaluate(EvaluateCommand(models=(spec(three_classes),), sets=named, images=5, out=tmp_path / "out"))


# Mean opinion scores


def test_opinion_scores_are_compared_with_confidence(tmp_path: Path) -> None:
    write_cell(tmp_path / "photos", side=48, count=12, suffix="jpg")
    files = sorted((tmp_path / "photos").rglob("*.jpg"))
    scores = {path: 10.0 * i for i, path in enumerate(files)}
    lines = [f"{path.relative_to(tmp_path / 'photos')},{score}" for path, score in scores.items()]
    (tmp_path / "mos.csv").write_text("\n".join(["file,mos", *lines, "gone.jpg,5"]) + "\n")
    mos = {"mos": tmp_path / "mos.csv", "mos_images": tmp_path / "photos"}
    report = evaluate(EvaluateCommand(models=(spec(three_classes),), out=tmp_path / "out", **mos))
    found = report["models"]["three_classes"]["mos_correlation"]
    assert list(found) == ["confidence"]  # no codebook, no distance to it
    from scipy import stats

    store = sets.opinions(path=mos["mos"], images=mos["mos_images"]).open()
    images = pixels(store, PipelineConfig(image_size=SIDE, eval_resize=36, eval_interpolation="bicubic"))
    net, _ = three_classes()
    confidence = net((images.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5).softmax(1).max(1).values.detach()
    want = stats.spearmanr(confidence, list(scores.values())).statistic
    assert found["confidence"]["srcc"] == pytest.approx(want)
    assert found["confidence"]["n"] == 12


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,score\n", "wanted the columns file and mos, found name, score"),
        ("file,mos\nx.jpg,3\n", "none of the images it names is in"),
        ("file,mos\nphoto.jpg,high\n", "line 2: mos 'high' is no number"),
    ],
)
def test_opinion_tables_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "photo.jpg")
    (tmp_path / "mos.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        sets.read_opinions(tmp_path / "mos.csv", tmp_path)
