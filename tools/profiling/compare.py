"""What changed between two profiles beyond the spread of their measurements."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from tools.profiling.table import Profile, Spread


class Change(NamedTuple):
    """One number in both profiles. `beyond` is whether their spreads do not touch."""

    name: str
    unit: str
    before: Spread
    after: Spread

    @property
    def beyond(self) -> bool:
        """Whether the 20th to 80th percentiles of the two do not overlap."""
        return self.after.p20 > self.before.p80 or self.after.p80 < self.before.p20

    @property
    def change_pct(self) -> float:
        """Change of the median in percent; 0 where both are 0."""
        if self.before.p50 == 0:
            return 0.0 if self.after.p50 == 0 else float("inf")
        return 100 * (self.after.p50 / self.before.p50 - 1)


def _numbers(profile: Profile) -> Iterator[tuple[str, str, Spread]]:
    for name, rate in profile.rates_img_s.items():
        yield name, "images/s", rate
    for stage in profile.stages:
        if stage.wall_s is not None:
            yield f"{stage.name}, time", "ms/image", stage.wall_s.times(1000)
        if stage.cpu_s is not None:
            yield f"{stage.name}, CPU", "ms/image", stage.cpu_s.times(1000)


def changes(before: Profile, after: Profile) -> list[Change]:
    """Return every number that both profiles have."""
    first = {(name, unit): spread for name, unit, spread in _numbers(before)}
    return [
        Change(name, unit, first[name, unit], spread)
        for name, unit, spread in _numbers(after)
        if (name, unit) in first
    ]


def differing(before: Profile, after: Profile) -> list[str]:
    """Return a line for each setting and each part of the surroundings that is not the same."""
    lines = []
    for title, a, b in (
        ("", before.settings, after.settings),
        ("environment: ", before.environment, after.environment),
        ("", before.machine.model_dump(), after.machine.model_dump()),
    ):
        names = sorted({*a, *b} - {"cores", "peak_tflops", "command", "date", "out"})
        lines += [
            f"{title}{name}: {a.get(name, 'absent')} -> {b.get(name, 'absent')}"
            for name in names
            if a.get(name) != b.get(name)
        ]
    return lines


def report(before: Profile, after: Profile) -> str:
    """Return the comparison in words."""
    lines = ["What was set or found differently:"]
    lines += [f"  {line}" for line in differing(before, after)] or ["  nothing"]
    found = changes(before, after)
    beyond = [change for change in found if change.beyond]
    lines.append(f"Beyond the spread ({len(beyond)} of {len(found)} numbers):")
    for change in sorted(beyond, key=lambda c: -abs(c.change_pct)):
        lines.append(
            f"  {change.name:34s} {change.before.p50:10.4g} -> {change.after.p50:10.4g} {change.unit:9s}"
            f"{change.change_pct:+8.1f} %"
        )
    if not beyond:
        lines.append("  nothing")
    names = {stage.name for stage in before.stages}, {stage.name for stage in after.stages}
    for title, only in (("first", names[0] - names[1]), ("second", names[1] - names[0])):
        if only:
            lines.append(f"Only in the {title}: {', '.join(sorted(only))}")
    a, b = before.verdict.limits, after.verdict.limits
    if a and b and a[0].stage != b[0].stage:
        lines.append(f"The limiting stage was {a[0].stage} and is {b[0].stage}.")
    return "\n".join(lines)
