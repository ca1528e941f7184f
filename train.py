"""Trains VQSA: the whole loop, top to bottom.

accelerate launch train.py --recipe recipes/paper.toml --data SHARDS --out runs/x --epochs 90 --resume auto
"""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from pydantic import Field
from tqdm import tqdm

import model
import shards
from pipeline.joined import join
from pipeline.loader import TrainingBatch, TrainingLoader
from tools.profiling.attached import StepProfile
from tools.runtime import checkpoint
from tools.runtime.audit import Audit
from tools.runtime.codebook import codebook_metrics, start_codebook
from tools.runtime.codes import CodeUsage
from tools.runtime.config import RunConfig, flatten, parse_command, validated
from tools.runtime.device import loader_device_id
from tools.runtime.ema import Ema
from tools.runtime.guard import FiniteGuard, save_batch
from tools.runtime.heartbeat import Heartbeat
from tools.runtime.interrupt import Stop, StopRequest, end_at_once_when_asked
from tools.runtime.launch import as_configured, make_accelerator, set_up_log
from tools.runtime.meter import Meter, device_memory_gib, host_memory_gib
from tools.runtime.metrics import MetricsFile, progress_line, write_status
from tools.runtime.monitor import Best, validate
from tools.runtime.optim import learning_rate, make_optimizer, set_learning_rate
from tools.runtime.resume import Progress, starting_point
from tools.runtime.state import TrainingState
from tools.runtime.step import learning_mode, train_step
from tools.runtime.trackers import Trackers
from tools.runtime.watchdog import Watchdog


class TrainCommand(RunConfig):
    """Train VQSA on a shard set. Starting values come from --recipe FILE; every setting can be overridden."""

    recipe: Path | None = None
    """TOML file with starting values, such as recipes/paper.toml."""

    resume: str = "no"
    """"auto": go on from the newest whole checkpoint in `out`, or start there if it has none. A path: go on
    from that checkpoint. "no": start; refuses a folder that already has checkpoints."""

    dry_run: bool = False
    """Check everything, print the resolved configuration and the length of the run, and stop."""

    profile: int = Field(0, ge=0)
    """Time the pieces of so many steps, after the first three, print them and write profile.json."""


def train(command: TrainCommand) -> int:
    """Run or continue a training; returns the exit code."""
    settings = command.model_dump(exclude={"recipe", "resume", "dry_run", "profile"})
    config = validated(RunConfig, settings, "command line")
    store = join([shards.open(path) for path in (config.data, *config.extra)])
    val_store = shards.open(config.val) if config.val is not None else None
    if val_store is not None and val_store.classes != store.classes:
        raise ValueError(
            f"{config.val} and {config.data} have different class lists; build both from the same classes"
        )
    config.total_steps(len(store))  # refuses a run without a length before anything is set up
    start = starting_point(command.resume, config, store.classes)
    accelerator = make_accelerator(config)
    with Heartbeat(lost_after_s=config.lost_after_s) as heartbeat:
        return run(command, config, store, val_store, start, accelerator, heartbeat)


def run(
    command: TrainCommand,
    config: RunConfig,
    store: shards.Store,
    val_store: shards.Store | None,
    start: checkpoint.Checkpoint | None,
    accelerator: Accelerator,
    heartbeat: Heartbeat,
) -> int:
    """Set up model, data and everything that watches, and train; returns the exit code. On every process."""
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
    net = as_configured(model.build(config.model, len(store.classes)), config)
    optimizer: Any = make_optimizer(config.optim, net)
    bar = tqdm(total=total, disable=not (main and sys.stderr.isatty()), unit="step", dynamic_ncols=True)

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
        loader.close()
        return 0

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
    if start is not None:
        state.restore(start.path)
        say(f"resumed after step {progress.step} from {start.path}")
    else:
        learning_mode(accelerator.unwrap_model(net), config)
        start_codebook(
            accelerator,
            net,
            loader,
            lambda batch: torch.cat(batch.views),
            batches=config.model.init_batches,
            samples=len(store),
        )
    writer = checkpoint.Writer(
        accelerator,
        config.out / "checkpoints",
        config=config,
        classes=store.classes,
        keep=config.keep,
        background=config.checkpoint_async,
    )
    metrics = MetricsFile(config.out / "metrics.jsonl", progress.step) if main else None
    trackers = Trackers(accelerator, config.out)
    audit = Audit(config.out, accelerator.process_index) if config.audit else None

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

    def not_finite(step: int) -> NoReturn:
        where = "on another process, which says more"
        if guard.bad_step is not None:
            step = guard.bad_step
            path, ids = save_batch(config.out, loader, step, accelerator.process_index, store)
            named = guard.bad_samples or ids
            where = f"samples {named[:16]} of this process's {len(ids)}; its batch is in {path}"
        raise FloatingPointError(
            f"loss or gradients of step {step} are not finite: {where}. Nothing was saved since; go on from an older "
            "checkpoint with a lower learning rate, optim.clip_norm or another precision"
        )

    def over() -> bool:
        early = bool(config.monitor.patience) and best.since >= config.monitor.patience
        return early or progress.step >= total

    bar.update(progress.step)
    began_s, began_step = time.perf_counter(), progress.step
    try:
        with (
            StopRequest() as stop,
            Watchdog(
                loader.reading, warn_s=config.data_warn_s, stop_s=config.data_stop_s, stop=heartbeat.fail
            ) as watchdog,
        ):
            while not over():
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
                    waiting=watchdog.waiting,
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
                    record |= meter.report()
                    record |= codebook_metrics(accelerator, net)
                    record["memory_gib"] = device_memory_gib(accelerator.device)
                    record["host_gib"] = host_memory_gib()
                    record["skipped_steps"] = progress.skipped
                    damaged = torch.tensor(len(loader.damaged), device=accelerator.device)
                    record["damaged"] = int(accelerator.reduce(damaged, "sum"))
                    left_s = (time.perf_counter() - began_s) / (step - began_step) * (total - step)
                    say(progress_line({**record, "eta_s": left_s}, total))
                    report(record)
                    if config.host_limit_gib is not None and record["host_gib"] > config.host_limit_gib:
                        stop.request(Stop.MEMORY)

                if guard.bad_step is not None:
                    stop.request(Stop.NOT_FINITE)
                validating = val_store is not None and (step % config.val_every == 0 or done)
                saving = step % config.checkpoint_every == 0 or done
                reason = stop.agreed()
                if validating or saving or reason is not Stop.NO:  # nothing that is not finite is saved
                    guard.drain()
                    if guard.bad_step is not None:
                        stop.request(Stop.NOT_FINITE)
                    reason = stop.agreed_now()
                if reason is Stop.NOT_FINITE:
                    not_finite(step)

                aside_s = time.perf_counter()
                if validating and val_store is not None:
                    with ema.applied() if ema is not None else nullcontext():
                        scores = validate(
                            accelerator,
                            net,
                            val_store,
                            monitor=config.monitor,
                            pipeline=config.pipeline,
                            precision=config.precision,
                            seed=config.seed,
                        )
                    improved = best.update(scores["val_score_pct"], step)
                    say(
                        f"step {step}/{total}  val top1 {scores['val_top1_pct']:.2f}%  "
                        f"top5 {scores['val_top5_pct']:.2f}%  score {scores['val_score_pct']:.2f}%"
                        + (
                            "  best so far"
                            if improved
                            else f"  best {best.score_pct:.2f}% at step {best.step}"
                        )
                    )
                    report({"step": step, "epoch": step / steps_per_epoch, **scores})
                    saving = saving or improved
                last = over() or reason is not Stop.NO
                if saving or last:
                    snapshot = state.snapshot(copy=config.checkpoint_async)
                    if not writer.save(snapshot, step, best=best.step, last=last) and last:
                        raise OSError(
                            f"the run ends after step {step} of {total} without its last checkpoint, which could not "
                            f"be written to {config.out}; make room and say --resume auto to repeat what came after "
                            "the previous one"
                        )
                    del snapshot
                meter.exclude(time.perf_counter() - aside_s)
                if reason is not Stop.NO and not over():
                    why = {Stop.MEMORY: f": a process holds more than {config.host_limit_gib} GiB"}.get(
                        reason, ""
                    )
                    return stopped(
                        reason.exit_code,
                        f"stopped after step {step} of {total}{why}; go on with --resume auto",
                    )
    finally:
        bar.close()
        loader.close()
        writer.finish()
        for file in (metrics, audit):
            if file is not None:
                file.close()
        trackers.close()
    early = f" (early, best score {best.score_pct:.2f}% at step {best.step})" if progress.step < total else ""
    return stopped(0, f"done: {progress.step} steps{early}, checkpoint in {config.out / 'checkpoints'}")


def main() -> None:
    """Run the command line; what the user got wrong is said in a line, without a traceback."""
    set_up_log()
    end_at_once_when_asked()
    try:
        code = train(parse_command(TrainCommand))
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"train.py: {error}")
    sys.exit(code)


if __name__ == "__main__":
    main()
