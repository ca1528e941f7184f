"""The profile as one HTML page that opens offline: verdict, waterfall, rates, timeline, sweeps."""

from __future__ import annotations

import html

from tools.figures.page import folded, heading, note, table, tiles, title, verdicts
from tools.figures.page import page as whole
from tools.profiling import words
from tools.profiling.table import LANE_WORDS, Profile, Span, Spread, Stage, Sweep

_COLOUR = {"read": "#56b4e9", "graph": "#0072b2", "copy": "#cc79a7", "model": "#e69f00"}
_MEASURED, _PREDICTED, _BETTER, _TRIED = "#0072b2", "#56b4e9", "#009e73", "#cc79a7"
_PIECE = {
    "data wait": "#d55e00",
    "forward": "#e69f00",
    "backward": "#b5781f",
    "optimiser": "#cc79a7",
    "rest": "#d8dee5",
    "read": "#56b4e9",
}
_STYLE = """
.bar { display: grid; grid-template-columns: 12rem 1fr 12rem; gap: 0 .7rem; align-items: center;
       font-size: .88rem; margin: .18rem 0; font-variant-numeric: tabular-nums; }
.bar > * { overflow-wrap: anywhere; }
.bar i { position: relative; height: 1.1rem; background: #f3f5f7; border-radius: 3px; display: block; }
.bar i u { position: absolute; top: 0; bottom: 0; border-radius: 3px; min-width: 2px; max-width: 100%; }
@media (max-width: 700px) {
  .bar { grid-template-columns: 1fr auto; margin: .45rem 0; }
  .bar i { grid-row: 2; grid-column: 1 / 3; height: .8rem; }
}
.bar b { font-weight: 400; } .bar.limit span, .bar.limit b { font-weight: 700; }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .87rem; color: #5b6875; }
.key i { display: inline-block; width: .8rem; height: .8rem; border-radius: 2px; margin-right: .35rem; }
svg { width: 100%; height: auto; display: block; } li { margin: .3rem 0; overflow-wrap: anywhere; }
"""


def _e(text: object) -> str:
    return html.escape(str(text))


def _bar(name: str, start_pct: float, width_pct: float, colour: str, text: str, limit: bool = False) -> str:
    return (
        f'<div class="bar{" limit" if limit else ""}"><span>{_e(name)}</span><i>'
        f'<u style="left:{min(start_pct, 99.8):.2f}%;width:{width_pct:.2f}%;background:{colour}"></u></i>'
        f"<b>{_e(text)}</b></div>"
    )


def _key(colours: dict[str, str]) -> str:
    marks = "".join(f'<span><i style="background:{c}"></i>{_e(name)}</span>' for name, c in colours.items())
    return f'<div class="key">{marks}</div>'


def waterfall(profile: Profile) -> str:
    """Return the stages of each lane, one after the other, as an image passes through them."""
    counted = [stage for stage in profile.stages if stage.counts]
    lengths = {lane: sum(s.wall_s.p50 for s in counted if s.lane == lane and s.wall_s) for lane in LANE_WORDS}
    longest = max(lengths.values()) or 1.0
    limiting = profile.verdict.limits[0].stage if profile.verdict.limits else ""
    parts = []
    for lane, lane_words in LANE_WORDS.items():
        if not any(stage.lane == lane for stage in counted):
            continue
        parts.append(note(f"{lane_words}: {1000 * lengths[lane]:.3g} ms per image"))
        at_s = 0.0
        for stage in counted:
            if stage.lane == lane and stage.wall_s is not None:
                length_s = stage.wall_s.p50
                text = f"{1000 * length_s:.3g} ms"
                parts.append(
                    _bar(
                        stage.name,
                        100 * at_s / longest,
                        100 * length_s / longest,
                        _COLOUR[lane],
                        text,
                        stage.name == limiting,
                    )
                )
                at_s += length_s
    return "".join(parts)


def rates(profile: Profile) -> str:
    """Return bars of images per second: the whole, its halves, what was predicted, what would be without the limit."""
    v = profile.verdict
    rows = [(name, spread.p50, _MEASURED, _range(spread)) for name, spread in profile.rates_img_s.items()]
    rows.append(("predicted from stages", v.predicted_img_s, _PREDICTED, ""))
    rows += [(f"without {x.stage}", x.rate_if_free_img_s, _BETTER, "predicted") for x in v.limits[:1]]
    rows += [
        (t.change.replace("--pipeline.", ""), t.rate_img_s.p50, _TRIED, "tried")
        for t in profile.trials
        if t.rate_img_s is not None
    ]
    most = max(rate for _, rate, _, _ in rows)
    return "".join(
        _bar(name, 0, 100 * rate / most, colour, f"{rate:.4g} {note}") for name, rate, colour, note in rows
    )


def _range(spread: Spread) -> str:
    return f"({spread.p20:.4g} to {spread.p80:.4g})"


def kinds(profile: Profile) -> str:
    """Return bars of the time each corruption kind takes."""
    found = [s for s in profile.stages if s.name.startswith("corrupt: ") and s.wall_s is not None]
    most = max((s.wall_s.p50 for s in found if s.wall_s), default=0.0) or 1.0
    return "".join(
        _bar(
            s.name.removeprefix("corrupt: "),
            0,
            100 * s.wall_s.p50 / most,
            _COLOUR["graph"],
            f"{1000 * s.wall_s.p50:.3g} ms",
        )
        for s in sorted(found, key=lambda s: -s.wall_s.p50 if s.wall_s else 0.0)
        if s.wall_s
    )


def timeline(spans: list[Span]) -> str:
    """Return an SVG of a few steps: the training loop above, the reader threads below."""
    if not spans:
        return ""
    lanes = list(dict.fromkeys(span.lane for span in spans))
    end_s = max(span.start_s + span.seconds for span in spans) or 1.0
    width, row, left = 1000, 30, 84
    height = row * len(lanes) + 26
    marks = []
    for span in spans:
        x = left + (width - left) * span.start_s / end_s
        w = max(0.6, (width - left) * span.seconds / end_s)
        y = row * lanes.index(span.lane)
        marks.append(
            f'<rect x="{x:.1f}" y="{y + 3}" width="{w:.1f}" height="{row - 6}" fill="{_PIECE.get(span.name, "#999")}">'
            f"<title>{_e(span.name)}: {1000 * span.seconds:.1f} ms at {1000 * span.start_s:.1f} ms</title></rect>"
        )
    labels = "".join(
        f'<text x="0" y="{row * i + 20}" font-size="15" fill="#1c2733">{_e(lane)}</text>'
        for i, lane in enumerate(lanes)
    )
    ticks = "".join(
        f'<text x="{left + (width - left) * t / 4:.0f}" y="{height - 4}" font-size="14" fill="#5b6875" '
        f'text-anchor="{"start" if t == 0 else "end" if t == 4 else "middle"}">{1000 * end_s * t / 4:.0f} ms</text>'
        for t in range(5)
    )
    seen = {span.name for span in spans}
    return (
        f'<div class="scroll"><svg viewBox="0 0 {width} {height}" style="min-width:640px" role="img" '
        f'aria-label="timeline of training steps">{"".join(marks)}{labels}{ticks}</svg></div>'
        + _key({name: colour for name, colour in _PIECE.items() if name in seen})
    )


def _ms(spread: Spread | None) -> str:
    return "–" if spread is None else f"{1000 * spread.p50:.3f} ± {500 * (spread.p80 - spread.p20):.3f}"


def stage_table(stages: list[Stage], ranks: int) -> str:
    """Return every stage with its times."""
    rows = []
    for s in stages:
        rate = f"{ranks / s.wall_s.p50:.4g}" if s.wall_s and s.wall_s.p50 else "–"
        name = f"({s.name})" if s.lane == "shown" else s.name
        rows.append((name, _ms(s.wall_s), _ms(s.cpu_s), _ms(s.device_s), rate, s.note))
    return table(("stage", "ms/image", "CPU ms", "GPU ms", "images/s alone", ""), rows)


def sweep_part(sweep: Sweep) -> str:
    """Return a sweep as bars."""
    best = max((p.rate_img_s.p50 for p in sweep.points if p.rate_img_s), default=1.0)
    parts = [heading(f"Rate over {sweep.setting}")]
    for p in sweep.points:
        name = f"{p.value}{' (knee)' if p.value == sweep.knee else ''}"
        if p.rate_img_s is None:
            parts.append(_bar(name, 0, 0, "#fff", f"not measured: {p.note}"))
            continue
        text = (
            f"{p.rate_img_s.p50:.4g} images/s, efficiency {100 * (p.efficiency or 0):.0f} %, epoch "
            f"{words.hours(p.hours_per_epoch or 0)}"
        )
        colour = _BETTER if p.value == sweep.knee else _MEASURED
        parts.append(_bar(name, 0, 100 * p.rate_img_s.p50 / best, colour, text))
    return "".join(parts)


def _listed(lines: list[str]) -> str:
    return "<ul>" + "".join(f"<li>{_e(line)}</li>" for line in lines) + "</ul>"


def page(profile: Profile) -> str:
    """Return the HTML of a profile."""
    v, env, machine = profile.verdict, profile.environment, profile.machine
    first = v.limits[0] if v.limits else None
    name = (
        f"{profile.settings.get('model.trunk', 'model')} at {profile.settings.get('pipeline.image_size')} px: "
        f"{v.measured_img_s:.4g} images/s"
    )
    where = (
        f"{machine.ranks} process(es), {profile.batch_per_rank} images each, {profile.settings.get('precision')}; "
        f"{machine.name}, {machine.cores:.2f} CPU cores per process, GPU: {env.get('gpu')}; {env.get('date')}, commit "
        f"{env.get('commit')}."
    )
    numbers = [
        (f"{v.measured_img_s:.4g}", "images per second, measured"),
        (f"{v.predicted_img_s:.4g}", "predicted from the stages"),
        (first.stage if first else "–", "limiting stage"),
        (f"{first.rate_if_free_img_s:.4g}" if first else "–", "images per second were it free"),
        (f"{v.data_wait_pct:.1f} %", "of the time waiting for data"),
        ("no GPU" if v.gpu_busy_pct is None else f"{v.gpu_busy_pct:.0f} %", "GPU busy"),
        (f"{v.mfu_pct:.1f} %", "model FLOP utilisation"),
        (words.hours(v.hours_per_epoch), "an epoch"),
    ]
    parts = [
        f"<style>{_STYLE}</style>",
        title(name),
        note(where),
        tiles(numbers),
        heading("Verdict"),
        verdicts(words.verdict_lines(profile)),
        *(note(warning) for warning in profile.warnings),
        heading("What would help"),
        _listed(words.suggestion_lines(profile)),
    ]
    if profile.trials:
        parts += [heading("Tried, in turns with the run as it is"), _listed(words.trial_lines(profile))]
    parts += [
        heading("Images per second"),
        rates(profile),
        heading("Where the time of one image goes"),
        note(
            "The lanes work side by side; within a lane stages follow one another. The limiting stage is bold."
        ),
        waterfall(profile),
    ]
    if any(s.name.startswith("corrupt: ") for s in profile.stages):
        parts += [heading("Corruption kinds"), kinds(profile)]
    if profile.timeline:
        parts += [heading("Timeline of a few training steps"), timeline(profile.timeline)]
    parts += [sweep_part(sweep) for sweep in profile.sweeps]
    settings = [(key, str(value)) for key, value in profile.settings.items()]
    parts += [
        heading("Every stage"),
        note(
            "Milliseconds per image of one process, median ± half the distance from the 20th to the 80th percentile. "
            "In brackets: part of another stage, or an alternative to it."
        ),
        stage_table(profile.stages, machine.ranks),
        heading("Configuration"),
        f"<p class=note><code>{_e(env.get('command'))}</code></p>",
        folded("every setting", table(("setting", ""), settings)),
    ]
    return whole(name, parts)
