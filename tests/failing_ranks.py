"""Lets a run on two processes fail in one way after another, and tells how its processes ended.

    python tests/failing_ranks.py SHARDS FOLDER

Prints a JSON object: for each case the exit codes and process ids by rank, the seconds until a rank's end after the
failure was seen, and everything that was printed. No launcher: what the other process does is its own doing.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from kill_loop import last_step
from ranks import ROOT, Ranks

import shards
import train
from pipeline.loader import EvaluationLoader, TrainingLoader
from tools.runtime import checkpoint, heartbeat, monitor, scoring
from tools.runtime.metrics import read_metrics

LOST_AFTER_S = 10
LIMIT_S = 60  # of a whole run: killed after it
VICTIM = 1
# 33 images: the first process has one batch more than the second.
VALIDATED = ("--val-every", "4", "--monitor.images", "33", "--monitor.kinds", "contrast")


@contextmanager
def instead(owner: Any, name: str, new: Any) -> Any:
    """Put something else in the place of an attribute."""
    before = getattr(owner, name)
    setattr(owner, name, new)
    try:
        yield
    finally:
        setattr(owner, name, before)


def is_victim() -> bool:
    return os.environ.get("RANK") == str(VICTIM)


@contextmanager
def closing_hangs(kind: type) -> Any:
    """What the victim closes of a kind waits for ever; the time that cleaning up may take is made short."""
    close = kind.close  # type: ignore[attr-defined]

    def hanging(loader: object) -> None:
        if is_victim():
            time.sleep(600)
        close(loader)

    with instead(kind, "close", hanging), instead(heartbeat, "_CLEAN_UP_S", 3 - LOST_AFTER_S):
        yield


class Cases:
    """Runs them, each in a folder of its own."""

    def __init__(self, data: Path, folder: Path) -> None:
        self.data, self.folder = data, folder
        self.results: dict[str, Any] = {}

    def arguments(self, out: Path | str, *more: str) -> list[str]:
        common = ["--recipe", str(ROOT / "tests" / "tiny.toml"), "--data", str(self.data), "--out", str(out)]
        return [*common, "--lost-after-s", str(LOST_AFTER_S), "--join-within-s", "30", *more]

    def run(
        self, name: str, *more: str, out: Path | str | None = None, act: Callable[[Ranks], None] | None = None
    ) -> dict[str, Any]:
        """Run two processes to their end; `act` is called while they run."""
        log = self.folder / f"{name}.log"
        process = Ranks(self.arguments(out or self.folder / name, *more), 2, log).start()
        if act is not None:
            act(process)
        began_s, ended_s = time.monotonic(), {}
        while not process.poll():
            ended_s |= {r: time.monotonic() - began_s for r in process.codes if r not in ended_s}
            if time.monotonic() - began_s > LIMIT_S:
                process.kill(0, 1)
            time.sleep(0.01)
        ended_s |= {r: time.monotonic() - began_s for r in process.codes if r not in ended_s}
        codes = [process.codes[rank] for rank in range(2)]
        self.results[name] = {
            "codes": codes,
            "pids": process.pids,
            "ended_s": [ended_s[rank] for rank in range(2)],
            "log": log.read_text(),
            "checkpoints": [c.step for c in checkpoint.complete(self.folder / name / "checkpoints")],
        }
        return dict(self.results[name])

    def error(self) -> None:
        """One process fails; what it then closes waits for ever."""
        step = train.train_step

        def failing(*arguments: Any, **named: Any) -> None:
            if is_victim() and named["step"] == 3:
                raise ValueError("planted")
            step(*arguments, **named)

        with instead(train, "train_step", failing), closing_hangs(TrainingLoader):
            self.run("error")

    def error_in_validation(self) -> None:
        """As `error`, while the monitor set is scored."""
        score = scoring.score

        def failing(*arguments: Any, **named: Any) -> Any:
            if is_victim():
                raise ValueError("planted")
            return score(*arguments, **named)

        with instead(scoring, "score", failing), closing_hangs(EvaluationLoader):
            self.run("error in validation", "--val", str(self.data), *VALIDATED)

    def killed(self, victim: int) -> None:
        name = f"killed {victim}"

        def kill(process: Ranks) -> None:
            deadline_s = time.monotonic() + 120
            while last_step(self.folder / name) < 2 and time.monotonic() < deadline_s and not process.poll():
                time.sleep(0.01)
            process.kill(victim)

        self.run(name, "--steps", "4000", "--checkpoint-every", "4000", act=kill)

    def stuck(self, name: str, after: int, *more: str) -> None:
        """The victim's reads of a set wait for ever after some of them."""
        fetch = shards.Store.fetch
        calls: list[int] = []

        def hanging(store: shards.Store, *arguments: Any, **named: Any) -> Any:
            if is_victim() and (store.path.name == "val") == (name == "stuck validation"):
                calls.append(1)
                if len(calls) > after:
                    time.sleep(600)
            return fetch(store, *arguments, **named)

        with instead(shards.Store, "fetch", hanging):
            self.run(name, "--data-warn-s", "1", "--data-stop-s", "6", *more)

    def not_finite(self) -> None:
        """One process has a NaN in an image of step 2."""
        from tools.runtime import step

        prepare = step.prepare

        def poisoned(batch: Any, *arguments: Any, **named: Any) -> Any:
            made = prepare(batch, *arguments, **named)
            if is_victim() and 8 <= batch.position[0] < 16:
                made.images[1, 1, 4, 4] = float("nan")
            return made

        with instead(step, "prepare", poisoned):
            self.run("not finite", "--model.freeze-bn", "--optim.lr", "1e-4")

    def different_checkpoints(self) -> None:
        """Folders that are not shared: the second process has an older checkpoint, or another of the same step."""
        name = "different checkpoints"
        for rank in range(2):
            shutil.copytree(self.folder / "validated", self.folder / f"own{rank}")
        shutil.rmtree(self.folder / "own1" / "checkpoints" / "step_000012")
        settings = ("--val", str(self.data), *VALIDATED)
        self.run(name, *settings, "--resume", "auto", out=f"{self.folder}/own{{rank}}")
        shutil.copytree(
            self.folder / "own1" / "checkpoints" / "step_000008", self.folder / "one" / "step_000008"
        )
        record = self.folder / "one" / "step_000008" / "run.json"
        record.write_text(record.read_text() + "\n")
        paths = {"0": self.folder / "own1/checkpoints/step_000008", "1": record.parent}
        starting_point = train.starting_point

        def own(resume: str, *arguments: Any, **named: Any) -> Any:
            return starting_point(str(paths[os.environ["RANK"]]), *arguments, **named)

        with instead(train, "starting_point", own):
            self.run("same step", *settings)

    def stopped_in_validation(self) -> None:
        """SIGTERM reaches one process in the middle of a validation and of an interval; then the run goes on."""
        settings = ("--val", str(self.data), *VALIDATED, "--log-every", "3")
        calm = self.run("validated", *settings)
        assert calm["codes"] == [0, 0], calm["log"]
        batches = EvaluationLoader.__iter__

        def signalled(loader: EvaluationLoader) -> Any:
            for number, batch in enumerate(batches(loader)):
                print(f"rank {os.environ['RANK']} scores batch {number}", flush=True)
                if is_victim() and number == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

        out = self.folder / "stopped"
        with instead(monitor.EvaluationLoader, "__iter__", signalled):
            self.run("stopped", *settings)
        self.results["stopped"]["status"] = json.loads((out / "status.json").read_text())
        self.results["stopped"]["metrics"] = read_metrics(out / "metrics.jsonl")
        self.run("resumed", *settings, "--resume", "auto", out=out)
        ends = [checkpoint.newest(self.folder / name).path for name in ("validated", "stopped")]
        self.results["resumed"] |= {
            "same_weights": (ends[0] / checkpoint.MODEL_FILE).read_bytes()
            == (ends[1] / checkpoint.MODEL_FILE).read_bytes(),
            "metrics": [
                read_metrics(self.folder / name / "metrics.jsonl") for name in ("validated", "stopped")
            ],
            "best": [
                checkpoint.read(self.folder / name / "checkpoints" / "best").step
                for name in ("validated", "stopped")
            ],
        }


def main() -> None:
    """Run all and print."""
    data, folder = Path(sys.argv[1]), Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    val = folder / "val"
    shutil.copytree(data, val)
    cases = Cases(data, folder)
    cases.error()
    cases.error_in_validation()
    cases.killed(0)
    cases.killed(1)
    cases.stuck("stuck training", 16, "--steps", "400")
    cases.stuck("stuck start", 0)
    cases.stuck("stuck validation", 0, "--val", str(val), "--val-every", "2")
    cases.not_finite()
    cases.stopped_in_validation()
    cases.different_checkpoints()
    print(json.dumps(cases.results))


if __name__ == "__main__":
    main()
