"""Says what limits a training run on this machine: every stage measured, a verdict, what would help.

python tools/profile_throughput.py --recipe recipes/paper.toml --data SHARDS --out runs/profile
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from accelerate import Accelerator
from pydantic import Field

from tools.profiling import clock, compare, measure, memory, page, sweep, table, trace, trials, words
from tools.profiling.session import Session
from tools.runtime.config import RunConfig, parse_command, validated
from tools.runtime.launch import make_accelerator, set_up_log
from tools.runtime.launcher import end_with_launcher

_OWN = {"recipe", "device", "rounds", "seconds", "try_changes", "sweep", "trace", "compare", "rate_only"}


class ProfileCommand(RunConfig):
    """Measure every stage of a training run and say what limits it. Takes the settings of train.py."""

    out: Path = Path("runs/profile")
    """Folder for profile.json, profile.html and trace.json."""

    recipe: Path | None = None
    """TOML file with starting values, such as recipes/paper.toml."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto takes a GPU where there is one."""

    rounds: int = Field(5, ge=1)
    """Times everything is measured, in turns; the median and the spread are reported."""

    seconds: float = Field(0.3, gt=0)
    """Least length of one measurement."""

    try_changes: Annotated[bool, tyro.conf.arg(name="try")] = False
    """Measure cheap changes (threads, prefetch, batch, precision) beside the run as it is."""

    sweep: tuple[Literal["batch", "threads", "ranks"], ...] = ()
    """Measure the rate over these settings."""

    trace: bool = False
    """Also write a trace of a few steps by torch's profiler, with NVTX ranges."""

    compare: tuple[Path, Path] | None = None
    """Two profile.json files: say what changed beyond the spread, and measure nothing."""

    rate_only: Annotated[Path | None, tyro.conf.Suppress] = None
    """What --sweep ranks starts: measure whole training steps only and write their rate to this file."""


def run_config(command: ProfileCommand) -> RunConfig:
    """Return the run that is asked about."""
    config = validated(RunConfig, command.model_dump(exclude=_OWN), "command line")
    # A speed does not depend on the weights' values, which may not be at hand.
    return config.model_copy(update={"model": config.model.model_copy(update={"weights": ""})})


def accelerator_for(command: ProfileCommand, config: RunConfig) -> Accelerator:
    """Return where the run takes place.

    Raises:
        ValueError: a GPU was asked for and there is none.
    """
    if command.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "--device cuda was asked for, but torch sees no GPU (torch.cuda.is_available() is false); check the driver "
            "with nvidia-smi and CUDA_VISIBLE_DEVICES, or say --device cpu"
        )
    if command.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    return make_accelerator(config)


def _arguments() -> list[str]:
    """Return this program's arguments without what only the first process does."""
    kept, skip = [], False
    for argument in sys.argv[1:]:
        if argument.startswith("--"):
            skip = argument.split("=")[0] in {"--sweep", "--try", "--trace", "--rounds", "--seconds"}
        if not skip:
            kept.append(argument)
    return kept


def write(found: table.Profile, config: RunConfig, main: bool) -> None:
    """Write the files of the run's folder; the main process does."""
    if main:
        table.write(found, config.out / "profile.json")
        (config.out / "profile.html").write_text(page.page(found))


def profile(command: ProfileCommand) -> None:
    """Measure, print, and write the files."""
    config = run_config(command)
    accelerator = accelerator_for(command, config)
    if "ranks" in command.sweep and accelerator.num_processes > 1:
        raise ValueError("--sweep ranks starts the processes itself; run it without accelerate launch")
    main = accelerator.is_main_process
    terminal = main and sys.stderr.isatty()

    def progress(name: str) -> None:
        if terminal:
            print(f"\r\x1b[K{name}", end="", file=sys.stderr, flush=True)

    session = Session(config, accelerator, rounds=command.rounds, seconds=command.seconds, progress=progress)
    try:
        if command.rate_only is not None:
            both = session.both_probe()
            clock.measure([both], rounds=command.rounds, seconds=command.seconds, agree=session.agree)
            if main:
                command.rate_only.write_text(session.rate(both).model_dump_json())
            return
        found = measure.run(session)
        session.watch.detach()
        # Written again after each result: none is lost if a later one runs out of memory or the user stops.
        write(found, config, main)
        for trial in trials.run(session) if command.try_changes else ():
            found = found.model_copy(update={"trials": [*found.trials, trial]})
            write(found, config, main)
        over: dict[str, Callable[[], Iterator[table.Sweep]]] = {
            "batch": lambda: sweep.over_batches(session),
            "threads": lambda: sweep.over_threads(session),
            "ranks": lambda: sweep.over_ranks(session, _arguments()),
        }
        for setting in command.sweep:
            done = found.sweeps
            for so_far in over[setting]():
                found = found.model_copy(update={"sweeps": [*done, so_far]})
                write(found, config, main)
        if command.trace:
            trace.write(session.work, config.out / "trace.json")
    finally:
        session.close()
        progress("")
    if not main:
        return
    print(words.everything(found))
    print(f"written: {config.out / 'profile.json'}, {config.out / 'profile.html'}")


def main() -> None:
    """Run the command line; what the user got wrong is said in a line, without a traceback."""
    set_up_log()
    end_with_launcher()
    try:
        command = parse_command(ProfileCommand)
        if command.compare is not None:
            first, second = command.compare
            print(compare.report(table.read(first), table.read(second)))
            return
        profile(command)
    except (ValueError, OSError) as error:
        sys.exit(f"profile_throughput.py: {error}")
    except (RuntimeError, MemoryError) as error:
        if not memory.ran_out(error):
            raise
        sys.exit(
            f"profile_throughput.py: memory ran out while measuring ({error}); what was measured before is in "
            f"{command.out}. Say a smaller --pipeline.batch-per-gpu"
        )
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
