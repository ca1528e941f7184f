"""The verdict in words, and the table for the terminal."""

from __future__ import annotations

from tools.profiling.table import LANE_WORDS, Limit, Profile, Spread, Stage, Sweep


def limit_line(limit: Limit, ranks_words: str = "") -> str:
    """Say what limits and what it would give to be rid of it."""
    side = LANE_WORDS.get(limit.lane, limit.lane)
    return (
        f"{limit.stage} ({side}) limits at {limit.rate_img_s:.4g} images/s{ranks_words}; what is full is "
        f"{limit.binding}. Were it free: {limit.rate_if_free_img_s:.4g}"
    )


def verdict_lines(profile: Profile) -> list[str]:
    """Return the verdict, one sentence a line."""
    v = profile.verdict
    ratio = v.predicted_over_measured
    off = [100 * (value - 1) for value in (ratio.p50, ratio.p20, ratio.p80)]
    lines = [
        f"{v.measured_img_s:.4g} images/s measured; the stages add up to {v.predicted_img_s:.4g} (round by round "
        f"{off[0]:+.1f} %, {off[1]:+.1f} to {off[2]:+.1f}). With the run's checkpoints {v.with_checkpoints_img_s:.4g}."
    ]
    for number, limit in enumerate(v.limits):
        start = ("Limiting stage: ", "Next: ", "Then: ")[min(number, 2)]
        lines.append(f"{start}{limit_line(limit)}.")
    gpu = "no GPU" if v.gpu_busy_pct is None else f"{v.gpu_busy_pct:.0f} % busy"
    peak = profile.machine.peak_tflops
    peaks = ", ".join(f"{name} {value:.3g}" for name, value in peak.items())
    lines += [
        f"Data wait {v.data_wait_pct:.1f} %. GPU: {gpu}. CPU: {v.cpu_busy_pct:.0f} % of the "
        f"{profile.machine.cores:.2f} cores this process gets.",
        f"Model FLOP utilisation {v.mfu_pct:.1f} % of the measured matrix-product peak ({peaks} TFLOP/s), at "
        f"{profile.gflop_per_image:.3g} GFLOP per image.",
        f"An epoch of {profile.samples} images takes {hours(v.hours_per_epoch)} at this rate.",
    ]
    return lines


def hours(value: float) -> str:
    """Return hours in a unit that fits."""
    if value >= 1:
        return f"{value:.2f} h"
    return f"{60 * value:.1f} min" if value * 60 >= 1 else f"{3600 * value:.1f} s"


def suggestion_lines(profile: Profile) -> list[str]:
    """Return the suggestions with their gains; a sentence if there is none."""
    now = profile.verdict.with_checkpoints_img_s
    lines = []
    for s in profile.suggestions:
        setting = f"  [{s.change}]" if s.change else ""
        gain = f"{100 * (s.rate_img_s / now - 1):+.0f} %"
        lines.append(f"{s.words}: {s.rate_img_s:.4g} images/s ({gain}, {s.how}){setting}")
    return lines or ["Nothing on the list would raise the rate by 2 %."]


def trial_lines(profile: Profile) -> list[str]:
    """Return what the trials gave."""
    lines = []
    for t in profile.trials:
        rate, before = t.rate_img_s, t.baseline_img_s
        if rate is None or before is None:
            lines.append(f"{t.change:46s} {t.note}")
            continue
        apart = rate.p20 > before.p80 or rate.p80 < before.p20
        note = "" if apart else "  within the spread"
        lines.append(
            f"{t.change:46s} {rate.p50:9.4g} against {before.p50:9.4g} images/s "
            f"({100 * (rate.p50 / before.p50 - 1):+.1f} %){note}"
        )
    return lines


def _ms(spread: Spread | None) -> str:
    return (
        f"{'-':>18s}"
        if spread is None
        else f"{1000 * spread.p50:9.3f} ±{500 * (spread.p80 - spread.p20):7.3f}"
    )


def _row(stage: Stage, ranks: int) -> str:
    alone = "-" if stage.wall_s is None or not stage.wall_s.p50 else f"{ranks / stage.wall_s.p50:.0f}"
    name = f"({stage.name})" if stage.lane == "shown" else stage.name
    return f"  {name:32s}{_ms(stage.wall_s)}{_ms(stage.cpu_s)}{_ms(stage.device_s)}{alone:>10s}  {stage.note}".rstrip()


def table(profile: Profile) -> str:
    """Return the stage table: milliseconds per image of one process, ± half the spread from p20 to p80."""
    head = f"  {'':32s}{'ms/image':>18s}{'CPU ms/image':>18s}{'GPU ms/image':>18s}{'img/s':>10s}"
    lines = [head]
    for lane, words in LANE_WORDS.items():
        rows = [_row(s, profile.machine.ranks) for s in profile.stages if s.lane == lane]
        lines += [words, *rows] if rows else []
    lines.append("shown, but part of another stage or an alternative to it")
    lines += [_row(s, profile.machine.ranks) for s in profile.stages if s.lane == "shown"]
    lines.append("together")
    for name, rate in profile.rates_img_s.items():
        lines.append(f"  {name:32s}{rate.p50:9.4g} images/s ({rate.p20:.4g} to {rate.p80:.4g})")
    return "\n".join(lines)


def sweep_table(sweep: Sweep) -> str:
    """Return a sweep as a table."""
    lines = [f"  {sweep.setting:>8s}  images/s  efficiency  epoch"]
    for p in sweep.points:
        if p.rate_img_s is None:
            lines.append(f"  {p.value:8d}  not measured: {p.note}")
            continue
        mark = "  <- knee" if p.value == sweep.knee else ""
        lines.append(
            f"  {p.value:8d}  {p.rate_img_s.p50:8.4g}  {100 * (p.efficiency or 0):8.0f} %  "
            f"{hours(p.hours_per_epoch or 0)}{mark}{'  ' + p.note if p.note else ''}"
        )
    return "\n".join(lines)


def everything(profile: Profile) -> str:
    """Return the whole report for a terminal."""
    parts = [table(profile), "", *verdict_lines(profile), "", "What would help:"]
    parts += [f"  {line}" for line in suggestion_lines(profile)]
    if profile.trials:
        parts += ["Measured in turns with the run as it is:", *(f"  {line}" for line in trial_lines(profile))]
    for sweep in profile.sweeps:
        parts += ["", sweep_table(sweep)]
    parts += [f"note: {warning}" for warning in profile.warnings]
    return "\n".join(parts)
