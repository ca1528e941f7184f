"""Prints the parameters and multiply-accumulates of a model, in full and as the paper counts them.

python tools/count.py --recipe recipes/paper.toml --model.codes 1000
"""

from __future__ import annotations

import sys
from pathlib import Path

from pydantic import Field

from model.count import CountMode, count
from tools.runtime.config import RunConfig, parse_command


class CountCommand(RunConfig):
    """Count a recipe's parameters and MACs. Every setting of the recipe can be overridden."""

    recipe: Path | None = None
    """TOML file with starting values, such as recipes/paper.toml."""

    classes: int = Field(1000, ge=1)
    """Number of classes."""


def table(command: CountCommand) -> str:
    """Return both counts as text."""
    size = command.pipeline.image_size
    lines = [f"{command.model.trunk}, {command.classes} classes, {size} x {size} px, per image"]
    modes: tuple[tuple[CountMode, str], ...] = (
        ("full", "in full"),
        ("paper", "as the paper counts (no search, no fusing layer)"),
    )
    for mode, title in modes:
        lines += ["", f"{title:<50}{'parameters':>15}{'GMAC':>10}"]
        lines += [
            f"  {part.name:<48}{part.parameters:>15,}{part.macs / 1e9:>10.4f}"
            for part in count(command.model, command.classes, size, mode)
        ]
    return "\n".join(lines)


def main() -> int:
    """Read the command line and print; returns the exit code."""
    try:
        print(table(parse_command(CountCommand)))
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
