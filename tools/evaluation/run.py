"""One evaluation from the request to the files: models x sets, interrupted and continued at will."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from tqdm import tqdm

from pipeline.corruptions import available_kinds, kind_id
from pipeline.order import permutation
from shards import Store
from tools.evaluation import adaptation, models, sets
from tools.evaluation.ahead import check_sources
from tools.evaluation.classes import outputs_of
from tools.evaluation.command import EvaluateCommand
from tools.evaluation.findings import Findings, describe, write
from tools.evaluation.models import Classifier
from tools.evaluation.outcomes import Outcomes, Snapshots
from tools.evaluation.passes import Pass, Scorer, Settings, geometry
from tools.evaluation.sets import Source
from tools.runtime import checkpoint
from tools.runtime.device import loader_device_id
from tools.runtime.environment import environment
from tools.runtime.optim import autocast_dtype
from tools.runtime.results import CLEAN, CellName, table

PARTIAL = "partial"


def evaluate(command: EvaluateCommand) -> dict[str, Any]:
    """Run the evaluation; prints the tables, writes results.json and cells.csv, returns the JSON's content.

    Raises:
        FileNotFoundError: no checkpoint or no images there.
        ValueError: classes of data and model differ, an unknown kind or model, more images asked for than there are,
            images on disk of another size, partial results of another evaluation in the folder.
    """
    state = Accelerator()  # unlike PartialState, it also joins several processes on a CPU
    checkpoint.code_version()
    classifiers = load_models(command, state.device)
    sources = list_sources(command, classifiers)
    check_sources(sources, classifiers, command.images)
    settings = Settings(
        seed=command.seed,
        flavour=command.flavour,
        jpeg85=command.jpeg85,
        precision=autocast_dtype(command.precision),
        batch=command.batch,
        threads=command.threads,
        on_damaged="stop" if command.on_damaged == "stop" else "replace",
        device=state.device,
        device_id=loader_device_id(state.device),
        rank=state.process_index,
        ranks=state.num_processes,
    )
    out = command.out or _run_folder(Path(classifiers[0].source["checkpoint"])) / "evaluation"
    partial = out / PARTIAL
    if state.is_main_process:
        claim(partial, fingerprint(command, classifiers), fresh=command.fresh)
    state.wait_for_everyone()

    findings = {c.name: Findings(c) for c in classifiers}
    damaged: dict[str, str] = {}
    began_s, scored = time.perf_counter(), 0
    # A log file wants a line now and then, a screen a moving bar.
    interval_s = 1 if sys.stderr.isatty() else 30
    cells = sum(len(source.cells) for source in sources)
    with tqdm(unit="img", disable=not state.is_main_process, mininterval=interval_s) as bar:
        for number, source in enumerate(sources):
            store = source.open()
            part = Pass(
                source.name,
                store,
                chosen(store, command),
                source.cells,
                source.on_disk,
                source.resize,
                source.fewer,
                source.labelled,
            )
            if number == 0:  # the sets of one evaluation have about as many images each
                bar.total = len(part.sample_N) * cells * len(classifiers) // state.num_processes
            outcomes, part_damaged, part_scored = read_set(
                part, classifiers, settings, command, partial, state, bar
            )
            store.close()
            damaged |= part_damaged
            scored += part_scored
            keys = [store.key(i) for i in part.sample_N.tolist()]
            for name, found in outcomes.items():
                findings[name].add(part, keys, found, command)
    rate_img_s = scored / (time.perf_counter() - began_s)
    report: dict[str, Any] = {
        "commit": checkpoint.code_version(),
        "date": datetime.now(UTC).date().isoformat(),
        "data": str(
            command.data or command.imagenet_c or command.imagenet_c_bar or "".join(command.sets[:1])
        ),
        "clean_images": command.data and str(command.data),
        "seed": command.seed,
        "flavour": command.flavour,
        "jpeg85": command.jpeg85,
        "precision": command.precision,
        "compiled": command.compile,
        "images": max((cell.images for f in findings.values() for cell in f.cells), default=0),
        "environment": {**environment(), "device": state.device.type, "processes": state.num_processes},
        "rate_img_s": rate_img_s,
        "damaged": damaged,
        "models": {name: describe(f, command) for name, f in findings.items()},
    }
    if state.is_main_process:
        write(out, report, findings)
        for name, f in findings.items():
            print(f"\n{name}")
            print(
                table(
                    f.cells,
                    len(f.classifier.classes),
                    partial=command.partial_mce,
                    released_bug=command.released_mce_bug,
                )
            )
            print(report["models"][name]["verdict"])
        if damaged:
            print(f"left out: {len(damaged)} damaged images, named in {out / 'results.json'}")
        print(f"\n{rate_img_s:.0f} scores/s over {cells} cells and {len(findings)} models; written to {out}")
        shutil.rmtree(partial)
    return report


def load_models(command: EvaluateCommand, device: torch.device) -> list[Classifier]:
    """Open all models asked for, on the device, and the adapted copies where they were asked for."""
    classifiers = [models.from_checkpoint(path) for path in command.checkpoint]
    classifiers += [models.from_name(spec) for spec in command.models]
    models.unique_names(classifiers)
    if command.adapt_bn is not None:
        classifiers += adaptation.adapted(classifiers, command.adapt_bn, command.adapt_prior)
    for classifier in classifiers:
        classifier.net.to(memory_format=torch.channels_last).to(device).eval()
        models.check_outputs(classifier, device)
        if command.compile:
            classifier.compile()
    return classifiers


def list_sources(command: EvaluateCommand, classifiers: Sequence[Classifier]) -> list[Source]:
    """List the sets to read.

    Raises:
        ValueError: an unknown kind, a set without a name, models of several sizes with images that are not resized.
    """
    found = []
    if command.data is not None:
        kinds = list(command.kinds)
        if kinds == ["all"]:
            kinds = list(available_kinds())[1:]
        elif kinds == ["none"]:
            kinds = []
        for kind in kinds:
            kind_id(kind)
        found.append(sets.made_on_the_fly(command.data, kinds, command.fewer_classes))
    for benchmark, root in (("imagenet-c", command.imagenet_c), ("imagenet-c-bar", command.imagenet_c_bar)):
        if root is None:
            continue
        sizes = sorted({c.preprocessing.size for c in classifiers})
        if len(sizes) > 1:
            raise ValueError(
                f"--{benchmark}: the models take images of {' and '.join(map(str, sizes))} pixels, but those on disk "
                "have one size and are not resized; evaluate the models one size at a time"
            )
        found += sets.corruptions_on_disk(root, benchmark, sizes[0], command.fewer_classes)
    for named in command.sets:
        name, equals, path = named.partition("=")
        if not equals:
            raise ValueError(f"--sets {named!r}: wanted NAME=PATH, such as imagenet-r=/data/imagenet-r")
        found.append(sets.plain_set(name, Path(path)))
    if command.mos is not None and command.mos_images is not None:
        found.append(sets.opinions(command.mos, command.mos_images))
    every = [cell for source in found for cell in source.cells]
    twice = sorted({cell for cell in every if every.count(cell) > 1 and cell[0] != CLEAN})
    if twice:
        raise ValueError(
            f"{twice[0][0]} severity {twice[0][1]} would be scored twice, on the fly and on disk, and the two are not "
            "the same benchmark; evaluate them apart, or say --kinds none"
        )
    # Clean images are scored once: the first set that has them is the one the others are compared with.
    first = next((source for source in found if (CLEAN, 0) in source.cells), None)
    return [source for source in found if source is first or (CLEAN, 0) not in source.cells]


def chosen(store: Store, command: EvaluateCommand) -> npt.NDArray[np.int64]:
    """Return the samples of a set that take part: all, or a seeded subset, ascending."""
    if command.images is None:
        return np.arange(len(store), dtype=np.int64)
    subset: npt.NDArray[np.int64] = np.sort(permutation(len(store), command.seed, 0)[: command.images])
    return subset


def read_set(
    part: Pass,
    classifiers: Sequence[Classifier],
    settings: Settings,
    command: EvaluateCommand,
    partial: Path,
    state: Accelerator,
    bar: Any,
) -> tuple[dict[str, Outcomes], dict[str, str], int]:
    """Score all models on one set, over all processes; returns outcomes by model, damage, and scores made now."""
    names = [c.name for c in classifiers]
    outputs = [
        torch.zeros(1, dtype=torch.int64)
        if not part.labelled
        else outputs_of(
            part.store.classes,
            c.classes,
            str(part.store.path),
            f"the model {c.name}",
            fewer=part.fewer != "refuse",
        )
        for c in classifiers
    ]
    snapshots = Snapshots(partial, part.name)
    # Read by one process and told to all: a file that another process writes meanwhile must not count.
    told = [snapshots.load(names) if state.is_main_process else None]
    earlier: dict[str, Outcomes] = broadcast_object_list(told)[0]
    bar.total = (bar.total or 0) - sum(int(f.done_CN.sum()) for f in earlier.values()) // state.num_processes
    bar.refresh()
    shape = (len(part.cells), len(part.sample_N))
    if any(found.done_CN.shape != shape for found in earlier.values()):
        raise ValueError(
            f"{partial} holds partial results of other images than {part.store.path} has now; say --fresh to throw "
            "them away"
        )
    own: dict[str, Outcomes] = {}
    damaged: dict[int, str] = {}
    scored = 0

    def progress(count: int) -> None:
        nonlocal scored
        scored += count
        bar.update(count)

    for shown in {geometry(c.preprocessing): None for c in classifiers}:
        at = [i for i, c in enumerate(classifiers) if geometry(c.preprocessing) == shown]
        group = [classifiers[i] for i in at]
        before = {c.name: earlier[c.name].done_CN for c in group if c.name in earlier}
        statistics = {
            c.name: adaptation.CellStatistics(c, part, command.adapt_bn or 0, command.adapt_prior, settings)
            for c in group
            if c.name.endswith(adaptation.SUFFIX) and "adapted" in c.source
            if c.name not in before or not before[c.name].all()
        }

        def prepare(classifier: Classifier, cell: CellName, statistics: dict[str, Any] = statistics) -> None:
            if classifier.name in statistics:
                statistics[classifier.name].put(cell)

        scorer = Scorer(part, group, [outputs[i] for i in at], before, settings, prepare)

        scorer.run(progress, snapshots.save, command.save_every_s)
        own |= scorer.found
        damaged |= scorer.damaged
    whole: dict[str, Outcomes] = {}
    for piece in [earlier, *gather_object([own])]:
        for name, found in piece.items():
            if name in whole:
                whole[name].add(found)
            else:
                whole[name] = found
    unfinished = [name for name, found in whole.items() if not found.done_CN.all()]
    if unfinished:
        raise RuntimeError(
            f"{part.name}: {unfinished} not scored on all images; this is a mistake in the program"
        )
    named = {part.store.location(i): why for i, why in gather_object(list(damaged.items()))}
    for i in np.flatnonzero(whole[names[0]].damaged_N).tolist():
        where = part.store.location(int(part.sample_N[i]))
        named.setdefault(where, "damaged; met before the evaluation was continued")
    return whole, named, sum(gather_object([scored]))


def fingerprint(command: EvaluateCommand, classifiers: Sequence[Classifier]) -> dict[str, Any]:
    """Return what decides the numbers, to be the same when an evaluation is continued."""
    asked = command.model_dump(mode="json")
    free = ("checkpoint", "models", "out", "fresh", "batch", "threads", "partial_mce", "released_mce_bug")
    for name in (*free, "save_every_s"):
        asked.pop(name)
    described = [
        {"name": c.name, "preprocessing": c.preprocessing.model_dump(mode="json"), **c.source}
        for c in classifiers
    ]
    return {**asked, "models": described}


def claim(partial: Path, wanted: dict[str, Any], *, fresh: bool) -> None:
    """Make the folder of partial results, or take over the one of the same evaluation.

    Raises:
        ValueError: if there are partial results of another one.
    """
    if fresh and partial.exists():
        shutil.rmtree(partial)
    file = partial / "evaluation.json"
    wanted = json.loads(json.dumps(wanted))
    # What left no results behind (a refused request, say) stands in nobody's way.
    if file.is_file() and any(partial.glob("*.npz")):
        found = json.loads(file.read_text())
        different = sorted(k for k in wanted.keys() | found.keys() if wanted.get(k) != found.get(k))
        if different:
            raise ValueError(
                f"{partial} holds the partial results of another evaluation (different: {', '.join(different)}); "
                "repeat that command to finish it, give another --out, or say --fresh to throw them away"
            )
        print(f"going on with the partial results in {partial}")
        return
    partial.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(wanted, indent=1))


def _run_folder(checkpoint_path: Path) -> Path:
    return checkpoint_path.parent.parent if checkpoint_path.parent.name == "checkpoints" else checkpoint_path
