"""The report: one page with everything on it, from files alone where they are enough."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import RUN_KINDS

from tools.evaluate import EvaluateCommand, evaluate
from tools.figures import of_models
from tools.report import ReportCommand, report

VOID = {"meta", "img", "br"}


class Check(HTMLParser):
    """Counts pictures and refuses tags that do not close."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            found = dict(attrs)
            assert found["alt"]
            self.images.append(str(found["src"]))
        if tag not in VOID and tag != "html":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag != "html":
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def evaluation(run_folder: Path, picture_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation of the untrained model, adapted and not, and of a baseline."""
    out = tmp_path_factory.mktemp("evaluation")
    evaluate(
        EvaluateCommand(
            checkpoint=(run_folder,),
            models=("test_evaluate_sets:three_classes",),
            data=picture_shards,
            kinds=(*RUN_KINDS, "spatter"),
            adapt_bn=20,
            partial_mce=True,
            out=out,
        )
    )
    return out


def text_of(page: Path) -> str:
    text = page.read_text()
    check = Check()
    check.feed(text)
    assert not check.open
    assert check.images
    assert all(source.startswith("data:image/") for source in check.images)
    # It opens offline; a picture's base64 may hold any letters.
    assert "http" not in re.sub(r"data:image/[^\"'>\s]*", "", text)
    return text


def test_the_report_has_everything_and_needs_nothing(
    run_folder: Path, evaluation: Path, tmp_path: Path
) -> None:
    page = report(ReportCommand(run=run_folder, evaluation=evaluation, out=tmp_path / "report.html"))
    text = text_of(page)
    for words in ("ResNet-50 VQSA", "untrained+bn", "three_classes", "Unknown", "trained on 2 of the 15"):
        assert words in text
    files = {path.name for path in (evaluation / "figures").iterdir()}
    assert files >= {
        *of_models.FILES,
        "bars.png",
        "severity.png",
        "stability_0.png",
        "codes_0.png",
        "batch.jpg",
    }
    saved = json.loads((evaluation / "results.json").read_text())["models"]["untrained"]
    assert re.search(rf"<b>{100 * saved['clean_top1']:.1f}</b>", text)
    # A mean over a few kinds is never printed as if it were whole.
    assert "benchmark corruptions (2 of 15 kinds), %" in text
    assert "held-out corruptions (1 of 4 kinds), %" in text
    assert re.search(r"<td>[\d.]+( ± [\d.]+)? \(2 of 15 kinds\)</td>", text)


def test_saved_results_are_enough(evaluation: Path, tmp_path: Path) -> None:
    """Without run, checkpoint and images the page has all that was drawn before."""
    copy = shutil.copytree(evaluation, tmp_path / "copy")
    results = json.loads((copy / "results.json").read_text())
    for found in results["models"].values():
        if "checkpoint" in found:
            found["checkpoint"] = str(tmp_path / "gone")
    results["data"] = results["clean_images"] = str(tmp_path / "gone")
    (copy / "results.json").write_text(json.dumps(results))
    with_figures = text_of(report(ReportCommand(evaluation=copy)))
    assert "Grad-CAM" in with_figures
    shutil.rmtree(copy / "figures")
    without = text_of(report(ReportCommand(evaluation=copy, figures="saved")))
    assert "Grad-CAM" not in without
    assert "Top-1 per corruption" in without
    tried = text_of(report(ReportCommand(evaluation=copy)))
    assert "no figures of the models" in tried


def test_figures_of_another_model_are_not_shown(evaluation: Path, tmp_path: Path) -> None:
    """A second evaluation into the same folder leaves the first one's figures there."""
    copy = shutil.copytree(evaluation, tmp_path / "copy")
    report(ReportCommand(evaluation=copy))
    drawn = {file: (copy / "figures" / file).read_bytes() for file in of_models.FILES}
    results = json.loads((copy / "results.json").read_text())
    other = "three_classes"
    results["models"] = {other: results["models"][other]}
    (copy / "results.json").write_text(json.dumps(results))
    lines = (copy / "cells.csv").read_text().splitlines()
    rows = [line for line in lines if line.startswith(("model,", f"{other},"))]
    (copy / "cells.csv").write_text("\n".join(rows) + "\n")
    saved = text_of(report(ReportCommand(evaluation=copy, figures="saved")))
    assert "Grad-CAM" not in saved
    assert "the saved figures of the models are of another evaluation" in saved
    again = text_of(report(ReportCommand(evaluation=copy)))
    assert "three_classes has no convolution" in again
    assert not (copy / "figures" / "grad_cam.jpg").exists()  # the other model's
    assert (copy / "figures" / "tsne_classes.png").read_bytes() != drawn["tsne_classes.png"]


def test_an_evaluation_on_files_has_no_clean_images_to_draw(evaluation: Path, tmp_path: Path) -> None:
    """Its folder is a benchmark of many corruptions: none of it is read for the figures of the models."""
    copy = shutil.copytree(evaluation, tmp_path / "copy", ignore=shutil.ignore_patterns("figures"))
    results = json.loads((copy / "results.json").read_text())
    results["clean_images"] = None
    (copy / "results.json").write_text(json.dumps(results))
    text = text_of(report(ReportCommand(evaluation=copy)))
    assert "the evaluation read no clean images; give some with --data" in text
    assert not {path.name for path in (copy / "figures").iterdir()} & set(of_models.FILES)


def test_reports_on_nothing_are_refused(run_folder: Path, tmp_path: Path, evaluation: Path) -> None:
    with pytest.raises(ValueError, match="nothing to report on"):
        report(ReportCommand())
    with pytest.raises(FileNotFoundError, match=r"run tools/evaluate\.py first"):
        report(ReportCommand(evaluation=tmp_path))
    copy = shutil.copytree(evaluation, tmp_path / "copy")
    results = json.loads((copy / "results.json").read_text())
    for found in results["models"].values():
        found["step"] = 7
    (copy / "results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match=r"results of step 7, but .* has gone on to step 1"):
        report(ReportCommand(run=run_folder, evaluation=copy, figures="saved"))
