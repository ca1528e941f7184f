"""Runs one epoch on 1, 2, 4 and again 1 process, going on from a kill each time, and once on 1 process alone.

    python tests/elastic.py SHARDS FOLDER

Prints a JSON object: for both runs the position, sample and pixel checksum of everything trained on, and the metrics;
and for each stage of the second its processes, the steps between which it trained, and the micro-batches of each.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from kill_loop import newest
from ranks import ROOT, Ranks, run

from tools.runtime.metrics import read_metrics

RANKS = (1, 2, 4, 1)
STEPS = 12  # of 8 images: the epoch has 90


def audit(out: Path) -> list[list[Any]]:
    """Return [position, step, sample, pixels] of every image trained on, those of repeated steps as well."""
    rows = []
    for path in sorted(out.glob("audit_rank*.jsonl")):
        for line in path.read_text().splitlines():
            note = json.loads(line)
            columns = (note["position"], note["sample_id"], note["pixels"])
            rows += [[position, note["step"], *rest] for position, *rest in zip(*columns, strict=True)]
    return rows


def batches(out: Path) -> list[int]:
    """Return how many micro-batches each process has trained on so far."""
    paths = [out / f"audit_rank{rank}.jsonl" for rank in range(max(RANKS))]
    return [len(path.read_text().splitlines()) if path.exists() else 0 for path in paths]


def main() -> None:
    """Run and print."""
    shards, folder = Path(sys.argv[1]), Path(sys.argv[2])
    arguments = ["--recipe", str(ROOT / "tests" / "tiny.toml"), "--data", str(shards), "--audit"]
    arguments += ["--steps", str(STEPS), "--checkpoint-every", "3", "--resume", "auto"]
    # Frozen statistics: a step then computes the same on any number of processes.
    arguments += ["--model.freeze-bn", "--optim.lr", "1e-4"]
    steady, elastic = folder / "steady", folder / "elastic"
    folder.mkdir(parents=True, exist_ok=True)
    run([*arguments, "--out", str(steady)], 1, folder / "steady.log")
    stages = []
    for number, ranks in enumerate(RANKS):
        begin, before = newest(elastic), batches(elastic)
        process = Ranks([*arguments, "--out", str(elastic)], ranks, folder / f"{number}.log").start()
        if number + 1 == len(RANKS):
            codes = process.wait(240)
            assert set(codes.values()) == {0}, (folder / f"{number}.log").read_text()
        else:
            while newest(elastic) <= begin:
                assert not process.poll(), (folder / f"{number}.log").read_text()
                time.sleep(0.002)
            process.kill(*range(ranks))
            process.wait(60)
        grown = [after - was for was, after in zip(before, batches(elastic), strict=True)]
        stages.append({"ranks": ranks, "from": begin, "to": newest(elastic), "batches": grown})
    result: dict[str, Any] = {
        name: {"audit": audit(out), "metrics": read_metrics(out / "metrics.jsonl")}
        for name, out in (("steady", steady), ("elastic", elastic))
    }
    print(json.dumps({**result, "stages": stages}))


if __name__ == "__main__":
    main()
