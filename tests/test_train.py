"""The training command as a user runs it: resume, interruption, several processes, bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import TWO_PROCESSES, finish, start, wait_for_step, write_pictures

import train
from shards.build import BuildOptions, build
from tools.runtime import checkpoint
from tools.runtime.config import RunConfig, differences, parse_command, validated
from tools.runtime.device import loader_device_id
from tools.runtime.metrics import MetricsFile, read_metrics
from tools.runtime.optim import learning_rate

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tests" / "tiny.toml"


def command(shards: Path, out: Path, *more: str) -> list[str]:
    return ["train.py", "--recipe", str(TINY), "--data", str(shards), "--out", str(out), *more]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return checkpoint.newest(out).model_state()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def losses(out: Path) -> list[float]:
    return [r["loss"] for r in read_metrics(out / "metrics.jsonl") if "loss" in r]


@pytest.fixture(scope="module")
def undisturbed(picture_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    output = finish(start(*command(picture_shards, out)))
    assert "done: 12 steps" in output
    assert "step 12/12" in output
    return out


def test_a_run_leaves_what_it_promises(undisturbed: Path) -> None:
    records = read_metrics(undisturbed / "metrics.jsonl")
    assert [r["step"] for r in records] == list(range(1, 13))
    for key in ("loss", "ce", "vq", "commit", "top1_pct", "rate_img_s", "data_wait_pct", "codes_used_pct",
                "perplexity", "memory_gib", "lr"):  # fmt: skip
        assert key in records[0]
    found = checkpoint.complete(undisturbed / "checkpoints")
    assert [c.step for c in found] == [8, 12]  # keep = 2
    assert found[-1].classes == ["class0", "class1", "class2"]
    assert list((undisturbed / "tensorboard").glob("events*"))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_run_ends_with_the_same_weights(
    undisturbed: Path, picture_shards: Path, tmp_path: Path, number: signal.Signals
) -> None:
    process = start(*command(picture_shards, tmp_path))
    wait_for_step(tmp_path, 6, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    if number == signal.SIGINT:
        assert process.returncode == 130, output
        assert "go on with --resume auto" in output
    else:
        assert process.returncode == -signal.SIGKILL
    assert "resumed after step" in finish(start(*command(picture_shards, tmp_path, "--resume", "auto")))
    assert same(weights(tmp_path), weights(undisturbed))
    assert losses(tmp_path) == losses(undisturbed)
    steps = [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")]
    assert steps == list(range(1, 13))


@pytest.mark.slow
def test_two_processes_train_on_the_same_batches(picture_shards: Path, tmp_path: Path) -> None:
    """Frozen statistics: 20 losses agree to 1e-4, learning rates are equal; so with gradient accumulation."""
    # With a running mean of 0 and variance of 1 kept, features grow fast: a small rate keeps 20 steps comparable.
    common = ("--steps", "20", "--model.freeze-bn", "--optim.lr", "1e-4")
    runs = {
        "one": [],
        "two": TWO_PROCESSES,
        "parts": [],
    }  # fmt: skip
    for name, launch in runs.items():
        more = ("--pipeline.batch-per-gpu", "4") if name == "parts" else ()
        output = finish(start(*launch, *command(picture_shards, tmp_path / name, *common, *more)))
        assert f"on {2 if launch else 1} process(es)" in output
    records = {name: read_metrics(tmp_path / name / "metrics.jsonl") for name in runs}
    for name in ("two", "parts"):
        assert len(records[name]) == 20
        for one, other in zip(records["one"], records[name], strict=True):
            assert one["lr"] == other["lr"]
            assert other["loss"] == pytest.approx(one["loss"], abs=1e-4)


@pytest.mark.slow
def test_two_processes_validate_the_model_they_save(picture_shards: Path) -> None:
    """Running statistics differ between processes while training; validation uses the first one's."""
    output = finish(start(*TWO_PROCESSES, "tests/validate_on_two_ranks.py", str(picture_shards)))
    assert "accuracy 33.33" in output


@pytest.mark.slow
def test_two_processes_stop_together_and_go_on(picture_shards: Path, tmp_path: Path) -> None:
    """Ctrl-C on a launcher: both finish the same step and save; another start makes the rest."""
    arguments = command(picture_shards, tmp_path, "--checkpoint-every", "4000", "--log-every", "3")
    process = start(*TWO_PROCESSES, *arguments, "--steps", "4000")  # it does not end before it is stopped
    wait_for_step(tmp_path, 3, process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert "stopped after step" in output
    (saved,) = checkpoint.complete(tmp_path / "checkpoints")
    assert saved.step >= 3
    total = saved.step + 5
    more = ("--steps", str(total), "--resume", "auto", "--allow-changes")
    output = finish(start(*TWO_PROCESSES, *arguments, *more))
    assert f"resumed after step {saved.step} from" in output
    assert f"done: {total} steps" in output
    records = read_metrics(tmp_path / "metrics.jsonl")
    # What changed stands in the log: the length, and the code's commit if it did meanwhile.
    assert [r["step"] for r in records if "changed" not in r] == [*range(3, total, 3), total]


def run_here(*arguments: str) -> int:
    return train.train(parse_command(train.TrainCommand, [*arguments[1:]]))


def test_the_loaders_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate gives a process that is alone "cuda" without a number; the graph must still run on the GPU."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    devices = {"cpu": None, "cuda": 0, "cuda:3": 3}
    assert {name: loader_device_id(torch.device(name)) for name in devices} == devices


def test_a_run_is_not_overwritten(undisturbed: Path, picture_shards: Path) -> None:
    with pytest.raises(ValueError, match="already holds a run; say --resume auto"):
        run_here(*command(picture_shards, undisturbed))


def test_a_checkpoint_of_another_configuration_is_refused(undisturbed: Path, picture_shards: Path) -> None:
    with pytest.raises(ValueError, match=r"another configuration \(model.codes: 16 -> 17; pipeline.law"):
        run_here(
            *command(
                picture_shards,
                undisturbed,
                "--resume",
                "auto",
                "--model.codes",
                "17",
                "--pipeline.law",
                "bag",
            )
        )


def test_length_and_rates_may_change_where_that_is_said(
    undisturbed: Path, picture_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    longer = (
        "--resume",
        "auto",
        "--steps",
        "14",
        "--optim.lr",
        "1e-5",
        "--optim.clip-norm",
        "0.5",
        "--optim.fused",
        "True",
    )
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    with pytest.raises(ValueError, match=r"optim.lr: .* -> 1e-05; steps: 12 -> 14\); .* say --allow-changes"):
        run_here(*command(picture_shards, run, *longer))
    with pytest.raises(ValueError, match=r"\(model.codes: 16 -> 17\); .* start a new run"):
        run_here(*command(picture_shards, run, *longer, "--allow-changes", "--model.codes", "17"))
    assert run_here(*command(picture_shards, run, *longer, "--allow-changes")) == 0
    said = capsys.readouterr().out
    assert "changed: steps: 12 -> 14" in said
    assert "changed: optim.clip_norm: None -> 0.5" in said
    records = read_metrics(run / "metrics.jsonl")
    assert [r["step"] for r in records if "lr" in r] == [*range(1, 15)]
    (record,) = [r for r in records if "changed" in r]
    assert (record["step"], record["changed"]["optim.lr"][-5:]) == (12, "1e-05")
    config = validated(RunConfig, checkpoint.newest(run).config, "test")
    rates = [r["lr"] for r in records if r["step"] > 12 and "lr" in r]
    assert rates == [learning_rate(config.optim, step, 14, 1) for step in (12, 13)]
    assert not same(weights(run), weights(undisturbed))
    newest = checkpoint.newest(run)
    saved = torch.load(newest.path / checkpoint.TRAINING_FILE, weights_only=True)
    assert saved["optimizer"]["param_groups"][0]["fused"], "of this run, not of the checkpoint"
    assert (newest.step, newest.config["optim"]["lr"]) == (14, 1e-5)
    with pytest.raises(ValueError, match=r"is of step 14, and the run would have 13; give it more"):
        run_here(*command(picture_shards, run, *longer, "--allow-changes", "--steps", "13"))


def test_a_finished_run_has_nothing_left_to_do(
    undisturbed: Path, picture_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = weights(undisturbed)
    assert run_here(*command(picture_shards, undisturbed, "--resume", "auto")) == 0
    assert "resumed after step 12" in capsys.readouterr().out
    assert same(weights(undisturbed), before)


def test_going_back_to_an_older_checkpoint_needs_another_folder(
    undisturbed: Path, picture_shards: Path, tmp_path: Path
) -> None:
    older = str(undisturbed / "checkpoints" / "step_000008")
    with pytest.raises(ValueError, match=r"holds other checkpoints \(step_000012\)"):
        run_here(*command(picture_shards, undisturbed, "--resume", older))
    finish(start(*command(picture_shards, tmp_path / "branch", "--resume", older)))
    assert same(weights(tmp_path / "branch"), weights(undisturbed))


def test_a_checkpoint_of_other_classes_is_refused(undisturbed: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path / "source", 90, classes=2)
    build(BuildOptions(source=tmp_path / "source", out=tmp_path / "set", name="other", workers=1))
    with pytest.raises(ValueError, match="has other classes than"):
        run_here(*command(tmp_path / "set", undisturbed, "--resume", "auto"))


def test_shard_sets_may_move(
    picture_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("here", "there"):
        shutil.copytree(picture_shards, tmp_path / name)
    out = tmp_path / "run"
    assert run_here(*command(picture_shards, out, "--steps", "3", "--extra", str(tmp_path / "here"))) == 0
    again = command(
        tmp_path / "here", out, "--steps", "3", "--extra", str(tmp_path / "there"), "--resume", "auto"
    )
    assert run_here(*again) == 0
    assert "resumed after step 3" in capsys.readouterr().out


def test_settings_that_change_nothing_may_differ_on_resume() -> None:
    was, now = ({"log_every": n, "pipeline": {"threads": 2 * n}} for n in (1, 5))
    assert differences(was, now) == {}


def test_fewer_samples_than_a_batch(picture_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fewer than one global batch"):
        run_here(*command(picture_shards, tmp_path, "--pipeline.batch-global", "128"))


def test_missing_data(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run_here(*command(tmp_path / "nowhere", tmp_path / "out"))


def test_a_run_without_a_length(picture_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="say epochs or steps"):
        run_here(*command(picture_shards, tmp_path, "--steps", "None"))


def test_a_dry_run_prints_the_configuration_and_writes_nothing(
    picture_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_here(*command(picture_shards, tmp_path / "out", "--dry-run")) == 0
    output = capsys.readouterr().out
    assert "12 steps of 8" in output
    assert "pipeline.batch_global = 8" in output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[pipeline]\nclean_fractoin = 0.5",
            "unknown key 'pipeline.clean_fractoin'; did you mean 'pipeline.clean_fraction'",
        ),
        ("[model]\ncodez = 3", "unknown key 'model.codez'; did you mean 'model.codes'"),
        ("stepz = 3", "unknown key 'stepz'; did you mean 'steps'"),
        ("[pipeline]\nlaw = 'bagg'", "pipeline.law"),
        ("[pipeline]\nkinds = ['gausian_noise']", "gaussian_noise"),
        ("steps = 3\nepochs = 2", "not both"),
        ("steps = ", "not valid TOML"),
    ],
)
def test_a_wrong_recipe_is_explained(tmp_path: Path, text: str, message: str) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        parse_command(train.TrainCommand, ["--recipe", str(recipe)])
    assert "mine.toml" in str(error.value)


def test_a_missing_recipe_names_the_ones_there_are() -> None:
    with pytest.raises(FileNotFoundError, match=r"recipes/paper\.toml"):
        parse_command(train.TrainCommand, ["--recipe", "papr.toml"])


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_the_projects_recipes_are_valid(recipe: Path) -> None:
    parse_command(train.TrainCommand, ["--recipe", str(recipe)])


def test_the_command_line_wins_over_the_recipe() -> None:
    parsed = parse_command(train.TrainCommand, ["--recipe", str(TINY), "--steps", "3", "--model.codes", "5"])
    assert (parsed.steps, parsed.model.codes, parsed.pipeline.image_size) == (3, 5, 32)


def test_a_damaged_checkpoint_is_skipped_aloud(
    undisturbed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    file = out / "checkpoints" / "step_000012" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert checkpoint.newest(out).step == 8
    assert "should have" in caplog.text
    with pytest.raises(
        ValueError, match=r"model\.safetensors should have \d+ bytes, found \d+; use an older"
    ):
        checkpoint.newest(out / "checkpoints" / "step_000012")
    (out / "checkpoints" / "step_000008" / "run.json").write_text('{"step": 8')
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        checkpoint.newest(out)


def test_metrics_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s}) + "\n" for s in range(1, 6)) + '{"step": 6, "lo')
    metrics = MetricsFile(path, step=3)
    metrics.write({"step": 4, "loss": 1.0})
    metrics.close()
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3, 4]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_does_not_end_the_run(undisturbed: Path, picture_shards: Path, tmp_path: Path) -> None:
    """A checkpoint does not fit on 12 MiB (it has about 60): said, nothing half-written left, run goes on."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.decode().strip()}")
    try:
        output = finish(start(*command(picture_shards, disk / "run", "--steps", "5")), code=1)
        assert "checkpoint of step 4 not written" in output
        assert "step 5/5" in output
        assert "without its last checkpoint" in output
        assert not list((disk / "run" / "checkpoints").iterdir())
    finally:
        subprocess.run(["umount", str(disk)], check=True)
