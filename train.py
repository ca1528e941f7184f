"""Trains VQSA: the whole loop, top to bottom.

accelerate launch train.py --recipe recipes/paper.toml --data SHARDS --out runs/x --epochs 90 --resume auto
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from pydantic import Field
from tqdm import tqdm

import model
import shards
from pipeline.loader import TrainingBatch, TrainingLoader
from tools.profiling.attached import StepProfile
from tools.runtime import checkpoint
from tools.runtime.audit import Audit
from tools.runtime.codebook import codebook_metrics, start_codebook
from tools.runtime.codes import CodeUsage
from tools.runtime.config import RunConfig, flatten, parse_command, validated
from tools.runtime.device import loader_device_id
from tools.runtime.ema import Ema
from tools.runtime.guard import FiniteGuard, not_finite
from tools.runtime.heartbeat import Heartbeat
from tools.runtime.interrupt import Stop, StopRequest, signals_answered, tell_of_early_end
from tools.runtime.launch import as_configured, collective_timeout_s, make_accelerator, set_up_log
from tools.runtime.launcher import end_with_launcher, is_first
from tools.runtime.lock import locked
from tools.runtime.meter import Meter
from tools.runtime.metrics import MetricsFile, forget_status, progress_line, write_status
from tools.runtime.monitor import Best, validate
from tools.runtime.optim import learning_rate, make_optimizer, set_learning_rate
from tools.runtime.resume import Progress, changes, check_agreement, circumstances, starting_point
from tools.runtime.sets import open_sets
from tools.runtime.state import TrainingState
from tools.runtime.step import learning_mode, train_step
from tools.runtime.trackers import Trackers
from tools.runtime.watchdog import Watchdog
from tools.runtime.writer import Writer


class TrainCommand(RunConfig):
    """Train VQSA on a shard set. Starting values come from --recipe FILE; every setting can be overridden."""

    recipe: Path | None = None
    """TOML file with starting values, such as recipes/paper.toml."""

    resume: str = "no"
    """"auto": go on from the newest whole checkpoint in `out`, or start there if it has none; refuses one that
    has only damaged ones. A path: go on from that checkpoint. "no": start; refuses a folder that already has
    checkpoints."""

    allow_changes: bool = False
    """Go on though the length of the run, its learning rates, clip_norm, precision, compile, fused or patience are
    not the checkpoint's: what follows is no longer the run that the checkpoint is of."""

    dry_run: bool = False
    """Check everything, print the resolved configuration and the length of the run, and stop."""

    profile: int = Field(0, ge=0)
    """Time the pieces of so many steps, after the first three, print them and write profile.json."""


def train(command: TrainCommand) -> int:
    """Run or continue a training; returns the exit code."""
    settings = command.model_dump(exclude={"recipe", "resume", "allow_changes", "dry_run", "profile"})
    config = validated(RunConfig, settings, "command line")
    store, val_store = open_sets(config)
    total = config.total_steps(len(store))  # refuses a run without a length before anything is set up
    with ExitStack() as opened:
        if is_first() and not command.dry_run:
            opened.enter_context(locked(config.out))
        start = starting_point(
            command.resume, config, store.classes, total, allow_changes=command.allow_changes
        )
        accelerator = make_accelerator(config)
        if accelerator.is_main_process and not command.dry_run:
            forget_status(config.out)
        # The heartbeat ends first: a process that fails tells the others before it closes what it has opened, since
        # that may wait for ever for the mount that it failed on.
        with Heartbeat(lost_after_s=config.lost_after_s) as heartbeat:
            opened.callback(heartbeat.all_closed)
            check_agreement(accelerator, start, config.out)
            if accelerator.is_main_process and not command.dry_run:
                step = 0 if start is None else start.step
                tell_of_early_end(config.out, step=step, total=total, told_within_s=heartbeat.told_within_s)
            return run(command, config, store, val_store, start, accelerator, heartbeat, opened)


def run(
    command: TrainCommand,
    config: RunConfig,
    store: shards.Store,
    val_store: shards.Store | None,
    start: checkpoint.Checkpoint | None,
    accelerator: Accelerator,
    heartbeat: Heartbeat,
    opened: ExitStack,
) -> int:
    """Set up model, data and everything that watches, and train; returns the exit code. On every process.

    What is to be closed goes to `opened`.
    """
    total = config.total_steps(len(store))
    steps_per_epoch = len(store) / config.pipeline.batch_global
    main = accelerator.is_main_process
    # numpy takes no larger seed; nothing of ours uses these generators but initial weights
    set_seed(config.seed % 2**32)
    loader = TrainingLoader(
        store,
        config.pipeline,
        seed=config.seed,
        rank=accelerator.process_index,
        ranks=accelerator.num_processes,
        device_id=loader_device_id(accelerator.device),
    )
    opened.callback(loader.close)
    net = as_configured(model.build(config.model, len(store.classes)), config).to(accelerator.device)
    optimizer: Any = make_optimizer(config.optim, net, scaled=accelerator.scaler is not None)
    bar = tqdm(total=total, disable=not (main and sys.stderr.isatty()), unit="step", dynamic_ncols=True)
    opened.callback(bar.close)

    def say(text: str) -> None:
        if main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    parameters = sum(p.numel() for p in net.parameters())
    say(
        f"{store.name}: {len(store)} images, {len(store.classes)} classes; {config.model.trunk}, {parameters:,} "
        f"parameters; {total} steps of {config.pipeline.batch_global} on {accelerator.num_processes} process(es), "
        f"{accelerator.device.type}, {config.precision}; code {checkpoint.code_version()}"
    )
    if command.dry_run:
        for name, value in flatten(config.model_dump(mode="json")).items():
            say(f"  {name} = {value}")
        return 0

    watchdog = opened.enter_context(
        Watchdog(warn_s=config.data_warn_s, stop_s=config.data_stop_s, stop=heartbeat.fail)
    )
    waiting = partial(watchdog.waiting, "training", loader.reading)
    net, optimizer = accelerator.prepare(net, optimizer)
    ema = Ema(accelerator.unwrap_model(net), config.optim.ema_decay) if config.optim.ema_decay else None
    progress, best, meter = Progress(), Best(), Meter(accelerator)
    codes, guard = CodeUsage(accelerator, net), FiniteGuard()
    state = TrainingState(
        accelerator,
        net,
        optimizer,
        ema,
        {"progress": progress, "stream": loader, "best": best, "meter": meter, "codes": codes},
    )
    changed = {}
    if start is not None:
        changed = changes(start, config) | circumstances(start, accelerator.num_processes)
        state.restore(start.path)
        progress.unvalidated = progress.unvalidated and val_store is not None
        say(f"resumed after step {progress.step} from {start.path}")
        for name, change in changed.items():
            say(f"  changed: {name}: {change}")
    else:
        learning_mode(accelerator.unwrap_model(net), config)
        start_codebook(
            accelerator,
            net,
            loader,
            lambda batch: torch.cat(batch.views),
            batches=config.model.init_batches,
            samples=len(store),
            waiting=waiting,
        )
    writer = Writer(
        accelerator,
        config.out / "checkpoints",
        config=config,
        classes=store.classes,
        keep=config.keep,
        background=config.checkpoint_async,
    )
    opened.callback(writer.finish)
    metrics = None
    if main:
        metrics = MetricsFile(config.out / "metrics.jsonl", progress.step, validated=not progress.unvalidated)
        opened.callback(metrics.close)
        if changed:
            metrics.write({"step": progress.step, "changed": changed})
    trackers = Trackers(accelerator, config.out, progress.step)
    opened.callback(trackers.close)
    audit = Audit(config.out, accelerator.process_index) if config.audit else None
    if audit is not None:
        opened.callback(audit.close)

    def report(record: dict[str, Any]) -> None:
        trackers.log({k: v for k, v in record.items() if k != "step"}, record["step"])
        if metrics is not None:
            metrics.write(record)

    def stopped(code: int, why: str) -> int:
        say(why)
        if main:
            write_status(config.out, {"exit_code": code, "step": progress.step, "total": total, "why": why})
        return code

    profile = StepProfile(net, optimizer, loader, steps=command.profile) if command.profile else None
    shown: list[TrainingBatch] = []

    def note(batch: TrainingBatch) -> None:
        """Look at a batch that is about to be trained on."""
        if audit is not None:
            audit.note(progress.step + 1, batch)
        if config.images_every and (progress.step + 1) % config.images_every == 0 and not shown:
            shown.append(batch)

    def over() -> bool:
        early = bool(config.monitor.patience) and best.since >= config.monitor.patience
        return early or progress.step >= total

    def save(*, last: bool = False) -> None:
        """Write a checkpoint; only of the last one is it an error if that fails."""
        snapshot = state.snapshot(copy=config.checkpoint_async)
        if not writer.save(snapshot, progress.step, best=best.step, last=last) and last:
            raise OSError(
                f"the run ends after step {progress.step} of {total} without its last checkpoint, which could not be "
                f"written to {config.out}; make room and say --resume auto to repeat what came after the previous one"
            )

    def validation(stop: StopRequest, *, saved: bool) -> Stop:
        """Score the monitor set, and save what follows from it; returns why to stop.

        Args:
            saved: whether this step has a checkpoint, which says that its validation is still to be done.
        """
        assert val_store is not None
        step, reason = progress.step, Stop.NO

        def stopped() -> bool:
            nonlocal reason
            reason = stop.agreed()
            return reason is not Stop.NO

        with ema.applied() if ema is not None else nullcontext():
            scores = validate(
                accelerator,
                net,
                val_store,
                monitor=config.monitor,
                pipeline=config.pipeline,
                precision=config.precision,
                seed=config.seed,
                waiting=partial(watchdog.waiting, "validation"),
                stopped=stopped,
                close_after_error=opened.callback,
            )
        if scores is None:
            if not saved or not writer.settled(0):
                save(last=True)
            return reason
        progress.unvalidated = False
        improved = best.update(scores["val_score_pct"], step)
        say(f"step {step}/{total}  {best.line(scores)}")
        report({"step": step, "epoch": step / steps_per_epoch, **scores})
        if over():
            save(last=True)  # with its score: nothing is left to do
        elif improved and not (saved and writer.settled(step)):
            save()
        return Stop.NO

    bar.update(progress.step)
    with StopRequest(patience_s=collective_timeout_s(config)) as stop:
        aside_s = time.perf_counter()
        reason = validation(stop, saved=False) if progress.unvalidated else Stop.NO
        began_s, began_step = time.perf_counter(), progress.step
        meter.exclude(began_s - aside_s)
        while reason is Stop.NO and not over():
            rate = learning_rate(config.optim, progress.step, total, steps_per_epoch)
            set_learning_rate(optimizer, rate)
            train_step(
                accelerator,
                net,
                optimizer,
                loader,
                meter,
                config,
                step=progress.step,
                waiting=waiting,
                note=note,
                guard=guard,
            )
            if profile is not None and profile.step():
                say(
                    profile.report(
                        config.pipeline.batch_global, config.out / "profile.json" if main else None
                    )
                )
                profile = None
            progress.step += 1
            step, done = progress.step, progress.step == total
            bar.update()
            if accelerator.optimizer_step_was_skipped:
                progress.skipped += 1
            elif ema is not None:
                ema.update(step)
            if shown:
                trackers.pictures(shown.pop(), config.pipeline, step)
                trackers.code_usage(codes.total(), step)

            if step % config.log_every == 0 or done:
                record: dict[str, Any] = {"step": step, "epoch": step / steps_per_epoch, "lr": rate}
                record |= meter.report(len(loader.damaged))
                record |= codebook_metrics(accelerator, net)
                record["skipped_steps"] = progress.skipped
                left_s = (time.perf_counter() - began_s) / (step - began_step) * (total - step)
                say(progress_line({**record, "eta_s": left_s}, total))
                report(record)
                if config.host_limit_gib is not None and record["host_gib"] > config.host_limit_gib:
                    stop.request(Stop.MEMORY)

            progress.unvalidated = val_store is not None and (step % config.val_every == 0 or done)
            saving = step % config.checkpoint_every == 0 or done
            if guard.bad_step is not None:
                stop.request(Stop.NOT_FINITE)
            reason = stop.agreed()
            if progress.unvalidated or saving or reason is not Stop.NO:  # nothing that is not finite is saved
                guard.drain()
                if guard.bad_step is not None:
                    stop.request(Stop.NOT_FINITE)
                reason = stop.agreed_now()
            if reason is Stop.NOT_FINITE:
                raise not_finite(accelerator, guard, config.out, loader, store, waiting)

            aside_s = time.perf_counter()
            stopping = reason is not Stop.NO
            if saving or stopping:  # before a validation, so that stopping need not wait for it
                save(last=stopping or (done and not progress.unvalidated))
            if progress.unvalidated and not stopping:
                reason = validation(stop, saved=saving)
            meter.exclude(time.perf_counter() - aside_s)
    if reason is not Stop.NO and (progress.unvalidated or not over()):
        why = f": a process holds more than {config.host_limit_gib} GiB" if reason is Stop.MEMORY else ""
        words = f"stopped after step {progress.step} of {total}{why}; go on with --resume auto"
        return stopped(reason.exit_code, words)
    early = f" (early, best score {best.score_pct:.2f}% at step {best.step})" if progress.step < total else ""
    return stopped(0, f"done: {progress.step} steps{early}, checkpoint in {config.out / 'checkpoints'}")


def main() -> None:
    """Run the command line; what the user got wrong is said in a line, without a traceback."""
    set_up_log()
    with signals_answered():
        end_with_launcher()
        try:
            code = train(parse_command(TrainCommand))
        except (ValueError, OSError, FloatingPointError) as error:
            sys.exit(f"train.py: {error}")
    sys.exit(code)


if __name__ == "__main__":
    main()
