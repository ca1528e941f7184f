"""Comparing profiles, the page made of one, and files that are none."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tools.profiling import compare, page, table, words
from tools.profiling.table import (
    Limit,
    Machine,
    Profile,
    Span,
    Spread,
    Stage,
    Suggestion,
    Sweep,
    Trial,
    Verdict,
)
from tools.profiling.verdict import limits, predicted_img_s


def spread(value: float, share: float = 0.1) -> Spread:
    return Spread(p20=value * (1 - share), p50=value, p80=value * (1 + share))


def made(decode_ms: float = 4.0, share: float = 0.1, **settings: object) -> Profile:
    stages = [
        Stage(name="read", lane="read", wall_s=spread(0.001), cpu_s=spread(0.0001)),
        Stage(
            name="decode",
            lane="graph",
            wall_s=spread(decode_ms / 1000, share),
            cpu_s=spread(decode_ms / 1000, share),
        ),
        Stage(name="forward", lane="model", wall_s=spread(0.002), cpu_s=spread(0.002)),
        Stage(name="corrupt: fog", lane="shown", wall_s=spread(0.003), cpu_s=spread(0.003)),
        Stage(name="all-reduce", lane="shown", wall_s=None, note="one process: nothing to average"),
    ]
    rate = predicted_img_s(stages, 2.0)
    return Profile(
        environment={"commit": "abc", "gpu": "none", "date": "2026-11-21", "command": "python <it>"},
        settings={"model.trunk": "resnet18", "pipeline.image_size": 64, "precision": "fp32", **settings},
        samples=9000,
        batch_per_rank=8,
        machine=Machine(device="cpu", name="a CPU", ranks=1, cores=2.0, peak_tflops={"fp32": 0.1}),
        stages=stages,
        rates_img_s={"loader alone": spread(rate * 1.5), "both": spread(rate)},
        gflop_per_image=1.0,
        verdict=Verdict(
            predicted_img_s=rate,
            measured_img_s=rate,
            predicted_over_measured=Spread(p20=0.97, p50=1.02, p80=1.04),
            with_checkpoints_img_s=rate,
            limits=limits(stages, 2.0),
            data_wait_pct=12.5,
            cpu_busy_pct=97.0,
            gpu_busy_pct=None,
            mfu_pct=40.0,
            hours_per_epoch=9000 / rate / 3600,
        ),
        suggestions=[
            Suggestion(words="Do <this>", change="--threads 4", rate_img_s=rate * 1.2, how="computed")
        ],
        trials=[
            Trial(change="--pipeline.threads 4", rate_img_s=spread(rate * 1.5), baseline_img_s=spread(rate))
        ],
        sweeps=[
            Sweep.model_validate(
                {
                    "setting": "ranks",
                    "knee": 1,
                    "points": [
                        {"value": 1, "rate_img_s": spread(rate), "efficiency": 1.0, "hours_per_epoch": 1.5},
                        {"value": 2, "rate_img_s": None, "note": "failed: <no> room"},
                    ],
                }
            )
        ],
        timeline=[
            Span(lane="training", name="forward", start_s=0.0, seconds=0.01),
            Span(lane="reader 1", name="read", start_s=0.002, seconds=0.001),
        ],
        warnings=["no GPU here"],
    )


def test_only_what_lies_beyond_the_spread_is_a_change() -> None:
    beyond = {c.name for c in compare.changes(made(4.0), made(6.0)) if c.beyond}
    assert beyond == {"decode, time", "decode, CPU", "loader alone", "both"}
    assert not [c for c in compare.changes(made(4.0), made(4.4)) if c.beyond]  # +10 %, spread ±10 %
    (decode,) = [c for c in compare.changes(made(4.0), made(6.0)) if c.name == "decode, time"]
    assert decode.change_pct == pytest.approx(50)
    # The same change inside wider spreads is none.
    wide = {c.name for c in compare.changes(made(4.0, 0.3), made(6.0, 0.3)) if c.beyond}
    assert "decode, time" not in wide


def test_the_comparison_says_what_was_set_differently() -> None:
    said = compare.report(made(4.0), made(0.5, **{"pipeline.threads": 4}))
    assert "pipeline.threads: absent -> 4" in said
    assert "The limiting stage was decode and is forward." in said
    assert "nothing" in compare.report(made(), made()).splitlines()[1]
    assert "Beyond the spread (0 of " in compare.report(made(), made())


def test_a_profile_survives_being_written(tmp_path: Path) -> None:
    profile = made()
    table.write(profile, tmp_path / "profile.json")
    assert table.read(tmp_path / "profile.json") == profile


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ('{"format": 7}', r"is no profile of format 2 \(found 7\); measure again"),
        ("[]", "is no profile of format 2"),
        ('{"format": 2}', r"is a damaged profile \(environment: Field required\)"),
    ],
)
def test_a_file_that_is_no_profile_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        table.read(tmp_path / "x.json")
    with pytest.raises(FileNotFoundError, match=r"does not exist; give a profile\.json"):
        table.read(tmp_path / "y.json")


def test_the_words_name_the_limit_and_the_gain() -> None:
    said = words.everything(made())
    assert "Limiting stage: decode (the data graph) limits at 250 images/s" in said
    assert "Do <this>: 300 images/s (+20 %, computed)  [--threads 4]" in said
    assert re.search(r"--pipeline.threads 4 +375 against +250 images/s \(\+50.0 %\)", said)
    assert "GPU: no GPU" in said
    assert "not measured: failed: <no> room" in said


class _Checker(HTMLParser):
    """Counts tags; finds what an offline page must not have."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.foreign: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "html", "body"):
            self.open.append(tag)
        self.foreign += [str(v) for k, v in attrs if k in ("src", "href") and v and not v.startswith("data:")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("html", "body"):
            assert self.open.pop() == tag


def test_the_page_is_whole_offline_and_escaped() -> None:
    made_page = page.page(made())
    checker = _Checker()
    checker.feed(made_page)
    assert not checker.open
    assert not checker.foreign
    assert "Do &lt;this&gt;" in made_page
    for part in (
        "Verdict",
        "What would help",
        "Where the time of one image goes",
        "Timeline",
        "Rate over ranks",
    ):
        assert part in made_page
    assert '<div class="bar limit"><span>decode</span>' in made_page


def test_the_page_does_without_what_was_not_measured() -> None:
    bare = made().model_copy(update={"timeline": [], "sweeps": [], "trials": [], "suggestions": []})
    bare = bare.model_copy(update={"stages": [s for s in bare.stages if not s.name.startswith("corrupt: ")]})
    said = page.page(bare)
    assert "Timeline of" not in said
    assert "Corruption kinds" not in said
    assert "Nothing on the list would raise the rate by 2 %." in said


def test_a_limit_names_its_lane() -> None:
    limit = Limit(stage="x", lane="read", rate_img_s=10, rate_if_free_img_s=20, binding="reading")
    assert (
        words.limit_line(limit)
        == "x (reading) limits at 10 images/s; what is full is reading. Were it free: 20"
    )
