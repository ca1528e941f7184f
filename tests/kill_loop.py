"""Kills a run with kill -9 again and again, lets it go on, and compares it with an undisturbed one.

    python tests/kill_loop.py --kills 20 --out benchmarks/results/kill_resume.json

Two CPU processes that train, validate and save. Of six kills two hit a checkpoint that is being written and one the
start-up; the others come some random steps after the start. About half of them hit one process only, so that the other
one has to notice. Afterwards weights, optimiser, best score and metrics must be bit-equal, with every interval and
every validation in the log once.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from ranks import ROOT, Ranks, run

from tools.runtime import checkpoint
from tools.runtime.metrics import read_metrics

WITHIN_S = 60  # for the other process to notice
VAL_EVERY = 6
LOG_EVERY = 2  # and a checkpoint every third step: every other one is inside an interval


def last_step(out: Path) -> int:
    records = read_metrics(out / "metrics.jsonl")
    return int(records[-1]["step"]) if records else 0


def newest(out: Path) -> int:
    names = [p.name for p in (out / "checkpoints").glob("step_*") if p.suffix != ".tmp"]
    return max((int(name.removeprefix("step_").partition(".")[0]) for name in names), default=0)


def inode(out: Path) -> int:
    """Return the metrics file's number: a run that goes on puts a new file in its place first."""
    path = out / "metrics.jsonl"
    return path.stat().st_ino if path.exists() else 0


def disturb(
    arguments: list[str], out: Path, log: Path, randomness: random.Random, *, when: str, one: bool
) -> dict[str, Any]:
    """Start, kill processes at a random moment, and wait for all; returns what was done and seen.

    Args:
        when: "start" (while the processes come up), "write" (of a checkpoint) or "step".
        one: kill one process only.
    """
    begin = newest(out)
    target = begin + randomness.randint(1, 5)
    stale = inode(out)
    process = Ranks([*arguments, "--out", str(out), "--resume", "auto"], 2, log).start()
    deadline_s = time.monotonic() + (randomness.uniform(0, 3) if when == "start" else 240)
    while time.monotonic() < deadline_s and not process.poll():
        if when == "write" and any(out.glob("checkpoints/step_*.tmp")) and inode(out) != stale:
            break
        if when == "step" and inode(out) != stale and last_step(out) >= target:
            break
        time.sleep(0.001)
    if process.poll():
        raise RuntimeError(f"the run ended before it was killed:\n{log.read_text()[-3000:]}")
    time.sleep(randomness.uniform(0, 0.03))
    victims = [randomness.randrange(process.ranks)] if one else list(range(process.ranks))
    partial = [p.name for p in out.glob("checkpoints/step_*.tmp")]
    process.kill(*victims)
    killed_s = time.monotonic()
    codes = process.wait(WITHIN_S)
    return {
        "when": when,
        "resumed_from": begin,
        "killed_ranks": victims,
        "step_in_log": last_step(out),
        "unfinished_checkpoint": partial[0] if partial else None,
        "others_lived_s": round(time.monotonic() - killed_s, 2),
        "exit_codes": [codes[rank] for rank in range(process.ranks)],
    }


def differences(a: Path, b: Path, steps: int) -> list[str]:
    """Return what differs between two finished runs, in words."""
    import torch

    found = []
    ends = [checkpoint.newest(out) for out in (a, b)]
    states = [end.model_state() for end in ends]
    found += [name for name in states[0] if not torch.equal(states[0][name], states[1][name])]
    saved = [torch.load(end.path / checkpoint.TRAINING_FILE, weights_only=True) for end in ends]
    found += [
        part for part in ("best", "progress", "stream") if saved[0]["parts"][part] != saved[1]["parts"][part]
    ]
    optimizers = [one["optimizer"]["state"] for one in saved]
    for number, values in optimizers[0].items():
        found += [
            f"optimizer {number} {key}"
            for key, value in values.items()
            if not torch.equal(torch.as_tensor(value), torch.as_tensor(optimizers[1][number][key]))
        ]
    varies = {"rate_img_s", "data_wait_pct", "memory_gib", "host_gib"}
    logs = [
        [{k: v for k, v in r.items() if k not in varies} for r in read_metrics(out / "metrics.jsonl")]
        for out in (a, b)
    ]
    validations = [r["step"] for r in logs[1] if "val_score_pct" in r]
    for what, steps_found, wanted in (
        (
            "steps",
            [r["step"] for r in logs[1] if "loss" in r],
            sorted({*range(LOG_EVERY, steps, LOG_EVERY), steps}),
        ),
        ("validations", validations, sorted({*range(VAL_EVERY, steps, VAL_EVERY), steps})),
    ):
        if steps_found != wanted:
            found.append(f"{what} in the log: {steps_found}")
    if logs[0] != logs[1]:
        first = next(
            (pair for pair in zip(*logs, strict=False) if pair[0] != pair[1]), "one has more records"
        )
        found.append(f"metrics: {first}")
    return found


def kill_loop(shards: Path, folder: Path, kills: int, seed: int, steps: int) -> dict[str, Any]:
    """Run undisturbed and with kills; returns the result as it is written to the file."""
    arguments = ["--recipe", str(ROOT / "tests" / "tiny.toml"), "--data", str(shards), "--steps", str(steps)]
    arguments += ["--val", str(shards), "--val-every", str(VAL_EVERY), "--monitor.images", "16"]
    arguments += [
        "--log-every",
        str(LOG_EVERY),
        "--checkpoint-every",
        "3",
        "--lost-after-s",
        "10",
        "--join-within-s",
        "20",
    ]
    calm, disturbed = folder / "calm", folder / "disturbed"
    folder.mkdir(parents=True, exist_ok=True)
    run([*arguments, "--out", str(calm)], 2, folder / "calm.log")
    randomness = random.Random(seed)
    done = []
    for number in range(kills):
        when = ("step", "step", "write", "step", "start", "write")[number % 6]
        log = folder / f"kill{number}.log"
        done.append(disturb(arguments, disturbed, log, randomness, when=when, one=randomness.random() < 0.5))
        print(json.dumps(done[-1]), flush=True)
    run([*arguments, "--out", str(disturbed), "--resume", "auto"], 2, folder / "disturbed.log")
    return {
        "kills": kills,
        "kills_during_a_checkpoint_write": sum(d["unfinished_checkpoint"] is not None for d in done),
        "kills_of_one_process": sum(len(d["killed_ranks"]) == 1 for d in done),
        "longest_s_until_the_others_ended": max(d["others_lived_s"] for d in done),
        "steps": steps,
        "differences": differences(calm, disturbed, steps),
        "each": done,
    }


def main() -> None:
    """Run the command line; exit code 1 if anything differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--data", type=Path, help="shard set; by default 90 generated pictures")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = chosen.data
        if shards is None:
            from conftest import write_pictures

            from shards.build import BuildOptions, build

            write_pictures(folder / "source", 90)
            shards = folder / "shards"
            build(BuildOptions(source=folder / "source", out=shards, name="pictures", workers=1))
        began_s = time.perf_counter()
        result = kill_loop(shards, folder / "runs", chosen.kills, chosen.seed, chosen.steps)
        result["seconds"] = round(time.perf_counter() - began_s, 1)
    if chosen.out:
        from benchmarks.environment import environment, write_result

        command = (
            f"python tests/kill_loop.py --kills {chosen.kills} --seed {chosen.seed} --steps {chosen.steps}"
        )
        write_result(chosen.out, {**environment(), "command": command, **result})
    print(f"{result['kills']} kills, differences: {result['differences'] or 'none'}")
    sys.exit(bool(result["differences"]))


if __name__ == "__main__":
    main()
