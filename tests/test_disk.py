"""Real small file systems that fill up, limits and permissions; which checkpoints stay."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import subprocess
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import forked
import pytest
import tiny
from accelerate import Accelerator
from conftest import ROOT, representatives

from sft.config.load import load_config
from sft.config.optimizers import OPTIMIZERS
from sft.config.schema import Config
from sft.data import batches
from sft.errors import CheckpointError
from sft.plan import plan
from sft.runtime import checkpoint, disk, run_folder
from sft.runtime.attempt import Lock, Status
from sft.runtime.log import Log

BUDGET = batches.Budget(60, "padded")
ROWS = ["data.max_rows=600", "data.eval_path=null", "data.eval_fraction=0.05"]
ROWS += ["train.global_batch=8"]


def make(folder, **train):
    rows = tiny.examples(0, 11)
    settings = tiny.config(folder, **({"global_batch": 4, "max_steps": 8} | train))
    made = tiny.make_engine(tiny.llama(), rows, rows, settings, BUDGET)
    made.log = made.keeper.log = tiny.Said()
    return made


def names(folder):
    return {path.name for path in folder.glob("checkpoint_step_*")}


def steps_of(folder):
    return {int(path.name.split("_")[-1]) for path in run_folder.newest_first(folder)}


def at_step(built, actions):
    """Does something in the forward pass of these steps (from 0)."""
    real = built.task.loss

    def loss(model, batch):
        actions.pop(built.step, lambda: None)()
        return real(model, batch)

    built.task.loss = loss


# --- real file systems ---------------------------------------------------------------------------


@contextmanager
def mounted(*arguments):
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount a file system here: {done.stderr.strip()}")
    try:
        yield Path(arguments[-1])
    finally:
        subprocess.run(["umount", "--lazy", arguments[-1]], check=True)


@pytest.fixture
def small(tmp_path):
    """A file system of 4 MiB; a checkpoint of the tiny model takes 0.2."""
    folder = tmp_path / "small"
    folder.mkdir()
    with mounted("-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)) as result:
        yield result


def fill(folder, leave):
    """Everything but so many bytes; a run that writes at the same time may be faster."""
    free = shutil.disk_usage(folder).free
    with suppress(OSError):
        (folder / "ballast").write_bytes(b"x" * max(0, free - leave))


def test_a_disk_that_fills_up_during_a_save_costs_that_checkpoint_only(small):
    folder = small / "run"
    built = make(folder, save_steps=1)
    seen = []

    def look():
        seen.append((names(folder), run_folder.find(folder, "auto", pytest.fail).name))
        (small / "ballast").unlink()

    at_step(built, {2: lambda: fill(small, 100_000), 3: look, 4: lambda: None})
    built.run()
    assert built.step == 8
    (warning,) = [line for line in built.log.lines if line.startswith("warning")]
    assert "cannot save" in warning
    assert "No space left on device" in warning
    assert "need " in warning
    need, have = (int(warning.split(word)[1].split(" KiB")[0]) for word in ("need ", ", have "))
    assert need > have == pytest.approx(100_000 / 1024, abs=20)
    assert "Training goes on" in warning
    ((left, newest),) = seen
    assert left == {"checkpoint_step_1", "checkpoint_step_2"}, "no staging"
    assert newest == "checkpoint_step_2"
    assert steps_of(folder) == {6, 7}, "saves succeed again"


def test_after_so_many_failed_saves_in_a_row_the_run_ends(small):
    folder = small / "run"
    built = make(folder, save_steps=1, max_failed_saves=2)
    at_step(
        built,
        {
            1: lambda: fill(small, 50_000),
            2: (small / "ballast").unlink,
            4: lambda: fill(small, 50_000),
        },
    )
    with pytest.raises(CheckpointError, match="failed save 2 in a row") as error:
        built.run()
    assert error.value.exit_code == 4
    assert built.step == 6
    assert steps_of(folder) == {3, 4}
    assert all(checkpoint.fault(path) is None for path in run_folder.newest_first(folder))
    assert names(folder) == {"checkpoint_step_3", "checkpoint_step_4"}


def test_a_limit_on_the_size_of_files(tmp_path):
    built = make(tmp_path, save_steps=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    at_step(built, {2: lambda: limit(40_000), 4: lambda: limit(soft)})
    try:
        built.run()
    finally:
        limit(soft)
    warnings = [line for line in built.log.lines if line.startswith("warning")]
    assert len(warnings) == 2
    assert all("File too large" in line and "ulimit -f" in line for line in warnings)
    assert names(tmp_path) == {"checkpoint_step_6", "checkpoint_step_7"}


def test_a_folder_that_becomes_read_only(tmp_path):
    """As root permissions do not bind; a read-only mount does."""
    folder = tmp_path / "run"
    folder.mkdir()
    built = make(folder, save_steps=1)
    with mounted("--bind", str(folder), str(folder)):

        def remount(how):
            command = ["mount", "-o", f"remount,{how},bind", str(folder)]
            subprocess.run(command, check=True, capture_output=True)

        at_step(built, {2: lambda: remount("ro"), 3: lambda: remount("rw")})
        built.run()
    (warning,) = [line for line in built.log.lines if line.startswith("warning")]
    assert "Read-only file system" in warning
    assert "must be writable" in warning
    assert names(folder) == {"checkpoint_step_6", "checkpoint_step_7"}


def test_a_run_folder_that_takes_no_files_is_refused_at_start(tmp_path):
    with mounted("-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", str(tmp_path)) as folder:
        with pytest.raises(CheckpointError, match=r"cannot write to .*: Read-only") as error:
            disk.refuse_if_unwritable(folder / "new/run")
        with pytest.raises(CheckpointError, match=r"cannot write to .*: Read-only"):
            Lock(folder / "new/run")
    assert error.value.exit_code == 4


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_how_a_run_ended_is_recorded_on_a_full_disk(small):
    status = Status(small)
    status.begin()
    fill(small, 0)
    assert status.end("failed", 4, "cannot save " + "x" * 300, 0, 7)
    found = json.loads((small / "status.json").read_text())
    assert (found["state"], found["exit_code"], found["step"]) == ("failed", 4, 7)
    assert status.read() == found


def test_full_disks_cost_logs_one_warning_each_and_the_run_goes_on(small, capsys, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)  # not that of pytest
    log = Log(small, tensorboard=True)
    log.open_metrics(0)
    log.say("at the start")
    log.log(1, {"train/loss": 1.0})
    fill(small, 0)
    for step in range(2, 40):
        log.say(f"in between {step} " + "x" * 400)
        log.log(step, {"train/loss": 2.0, **{f"more/{i}": 1.0 for i in range(20)}})
    (small / "ballast").unlink()
    log.say("in the end")
    log.log(40, {"train/loss": 3.0})
    log.close()
    reported, errors = capsys.readouterr()
    assert "Traceback" not in errors
    for name in ("training.log", "metrics.jsonl", "tensorboard"):
        assert reported.count(f"warning: {name} cannot be written") == 1, name
    steps = [
        json.loads(line)["step"] for line in (small / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps[0] == 1
    assert steps[-1] == 40
    lines = (small / "training.log").read_text().splitlines()
    assert "at the start" in lines[0]
    assert "in the end" in lines
    assert "in between 30" not in "".join(lines)


@pytest.mark.slow
@pytest.mark.parametrize("world", representatives([1, 2]))
def test_a_disk_that_fills_up_after_training_costs_files_but_no_result(tmp_path, world):
    """It fills while the final answers are written: the model is there already."""
    folder, log = tmp_path / "small", tmp_path / "log"
    folder.mkdir()
    settings = [*ROWS, "data.eval_fraction=0.1", "train.max_steps=2"]
    settings += ["evaluation.num_examples=48", "evaluation.batch_size=4"]
    settings += ["evaluation.max_new_tokens=8", f"train.output_dir={folder}/run"]
    # So small that it is full at once: else all answers are written meanwhile.
    with mounted("-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)) as small:
        process = forked.start(world, ["scripts/train.py", *settings], log)
        while not (small / "run/evaluation/predictions.jsonl").exists():
            assert process.is_alive(), log.read_text()
            time.sleep(0.001)
        fill(small, 0)
        process.join()
        final, status = small / "run/final_checkpoint", Status(small / "run").read()
        assert checkpoint.fault(final) is None
        assert not list(small.rglob(checkpoint.SCRATCH))
    assert (process.exitcode, status["state"], status["checkpoint"]) == (0, "finished", final.name)
    reported = "".join(log.read_text().split())  # a long path is cut into lines
    for message in (
        "evaluation/predictions.jsonl: No space left on device",
        "All answers are scored, but the file lacks some; `make evaluate RUN=",
        "after: loss",
        "warning: README.md cannot be written",
    ):
        assert message.replace(" ", "") in reported
    assert "Traceback" not in reported


@pytest.mark.thorough("files that cannot be written since the disk is full")
@pytest.mark.slow
def test_a_file_system_that_turns_read_only_in_the_middle_of_a_run(tmp_path):
    """As ext4 does after an error of its disk: files that are open cannot be written either."""
    image, folder, log = tmp_path / "image", tmp_path / "disk", tmp_path / "log"
    folder.mkdir()
    image.write_bytes(b"")
    os.truncate(image, 64 * 2**20)
    if subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=False).returncode:
        pytest.skip("cannot make a file system here")
    mount, run = ["-o", "loop,errors=remount-ro", str(image), str(folder)], folder / "run"
    settings = [*ROWS, "train.max_steps=12"]
    settings += ["train.save_steps=2", "evaluation.num_examples=0"]
    command = ["scripts/train.py", *settings, f"train.output_dir={run}"]
    with mounted(*mount):
        process = forked.start(1, command, log)
        while not (run / "checkpoint_step_4").exists():
            assert process.is_alive(), log.read_text()
            time.sleep(0.001)
        options = ["mount", "-o", "remount,abort", str(folder)]
        if subprocess.run(options, check=False).returncode:
            pytest.skip("cannot make this file system read-only")
        process.join()
    reported = " ".join(log.read_text().split())
    assert process.exitcode == 4, reported
    for name in ("training.log", "metrics.jsonl", "tensorboard"):
        assert reported.count(f"warning: {name} cannot be written") == 1, name
    assert "Training goes on; this is failed save 2 in a row" in reported
    assert "(the file system must be writable); earlier checkpoints are untouched" in reported
    assert "Traceback" not in reported
    with mounted(*mount):
        resumed = forked.run(*command, "train.resume_from_checkpoint=auto")
        assert resumed.returncode == 0, resumed.stderr
        assert checkpoint.fault(run / "final_checkpoint") is None
        steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").open()]
    assert sorted(set(steps)) == list(range(1, 13))


def test_a_file_is_added_to_a_sealed_folder_that_is_valid_at_any_instant(tmp_path, monkeypatch):
    def write(staging):
        (staging / "model.safetensors").write_bytes(b"x")

    final, faults = tmp_path / "final_checkpoint", []
    checkpoint.commit(final, write, Accelerator(cpu=True))
    real = Path.rename

    def rename(path, target):
        faults.append(checkpoint.fault(final))
        real(path, target)
        faults.append(checkpoint.fault(final))

    monkeypatch.setattr(Path, "rename", rename)
    checkpoint.add_file(final, "README.md", "# card")
    assert faults == [None] * 4
    assert checkpoint.is_ours(final)
    assert (final / "README.md").read_text() == "# card"
    assert not (tmp_path / checkpoint.SCRATCH).exists()
    (final / "README.md").write_text("# card of another")
    assert "README.md" in (checkpoint.fault(final) or "")


# --- at any instant ------------------------------------------------------------------------------


@pytest.mark.parametrize("again", [False, True], ids=["a new step", "the only one again"])
def test_there_is_a_valid_checkpoint_at_any_instant(tmp_path, monkeypatch, again):
    """Before and after every change of the folder a kill would leave one that is found."""
    accelerator = Accelerator(cpu=True)
    folder, looks = tmp_path / "run", []

    def write(staging):
        (staging / "trainer.json").write_text("{}")

    def look():
        copy = tmp_path / "copy"  # finding may put one back
        shutil.rmtree_real(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        found = run_folder.find(copy, "auto", lambda _: None)
        looks.append(found is not None and checkpoint.fault(found) is None)

    checkpoint.commit(folder / "checkpoint_step_1", write, accelerator)
    monkeypatch.setattr(shutil, "rmtree_real", shutil.rmtree, raising=False)

    def watched(real):
        def call(*arguments, **options):
            if str(tmp_path / "copy") in str(arguments[0]):
                return real(*arguments, **options)
            look()
            result = real(*arguments, **options)
            look()
            return result

        return call

    monkeypatch.setattr(checkpoint.shutil, "rmtree", watched(shutil.rmtree))
    monkeypatch.setattr(Path, "rename", watched(Path.rename))
    for step in (1,) if again else (2, 3, 4):
        checkpoint.commit(folder / f"checkpoint_step_{step}", write, accelerator)
        run_folder.prune(folder, 1)
    assert len(looks) >= 6
    assert all(looks)


# --- the best ------------------------------------------------------------------------------------


def evaluated(built, values, metric="loss"):
    numbers = iter(values)
    built.task.evaluate = lambda model: {metric: next(numbers)}


def best_of(folder):
    return json.loads((folder / "best.json").read_text())


def test_the_best_evaluated_checkpoint_stays_beside_the_newest(tmp_path):
    built = make(tmp_path, save_steps=1, eval_steps=1, save_best="loss", max_steps=8)
    evaluated(built, [5, 3, 2, math.nan, 4, 6, 2.5])
    built.run()
    assert steps_of(tmp_path) == {3, 6, 7}
    expected = {"metric": "loss", "value": 2, "step": 3, "checkpoint": "checkpoint_step_3"}
    found = best_of(tmp_path)
    assert found.pop("held_out_sha256") == built.task.held_out_sha256
    assert found == expected
    assert not list(tmp_path.glob(".best.json*"))


def test_without_save_steps_only_what_is_better_is_saved(tmp_path):
    built = make(tmp_path, eval_steps=2, save_best="token_accuracy", max_steps=9)
    evaluated(built, [0.3, 0.5, 0.5, 0.4], "token_accuracy")
    built.run()
    assert steps_of(tmp_path) == {2, 4}, "more is better; as good is not better"
    assert best_of(tmp_path)["step"] == 4


def test_the_best_survives_a_resume(tmp_path):
    settings = {"save_steps": 1, "eval_steps": 1, "save_best": "loss"}
    built = make(tmp_path, max_steps=4, **settings)
    evaluated(built, [5, 1, 4])
    built.run()
    resumed = make(tmp_path, max_steps=8, **settings)
    resumed.resume(tmp_path / "checkpoint_step_3")
    evaluated(resumed, [3, 2, 2, 2])
    resumed.run()
    assert steps_of(tmp_path) == {2, 6, 7}
    assert best_of(tmp_path)["value"] == 1


@pytest.mark.parametrize(
    ("reported", "found"),
    [
        ('{"metric": "loss", "value": 1.0, "step": 3}', 3),
        ('{"metric": "perplexity", "value": 1.0, "step": 3}', None),
        ('{"metric": "loss", "value": 1.0, "step": 4}', None),  # after the resumed one
        ('{"metric": "loss", "value": 1.0, "step": 2}', None),  # is not there
        ('{"metric": "loss", "value": 1.0, "step": 3, "held_out_sha256": "others"}', None),
        ('{"metric": "loss"', None),
        ("[]", None),
    ],
)
def test_only_a_best_that_is_there_and_was_before_is_recalled(tmp_path, reported, found):
    """From best.json for checkpoints of earlier versions, else from the checkpoint itself."""
    built = make(tmp_path, save_steps=1, eval_steps=1, save_best="loss")
    built.step = 3
    folder = built.save()
    state = built.read(folder)
    del state["best"]
    (tmp_path / "best.json").write_text(reported)
    built.keeper.continue_from(folder, state, False)
    assert (built.keeper.best and built.keeper.best.step) == found
    with suppress(ValueError):
        state["best"] = json.loads(reported)
        (tmp_path / "best.json").unlink()
        built.keeper.continue_from(folder, state, False)
        assert (built.keeper.best and built.keeper.best.step) == found
        assert (tmp_path / "best.json").exists() == bool(found)


def test_a_best_that_was_committed_but_not_recorded_is_not_lost(tmp_path, monkeypatch):
    settings = {"save_steps": 1, "eval_steps": 1, "save_best": "loss"}
    built = make(tmp_path, max_steps=4, **settings)
    evaluated(built, [5, 3, 4])
    monkeypatch.setattr(built.keeper, "_record", lambda best: None)  # as if killed before each
    built.run()
    resumed = make(tmp_path, max_steps=4, **settings)
    resumed.resume(tmp_path / "checkpoint_step_3")
    assert best_of(tmp_path)["step"] == resumed.keeper.best.step == 2


# --- before the first step -----------------------------------------------------------------------


def test_step_0_is_saved_read_back_and_changes_nothing(tmp_path):
    plain, saving = make(tmp_path / "a"), make(tmp_path / "b", save_steps=100)
    losses = {}
    for name, built in (("plain", plain), ("saving", saving)):
        reported = losses[name] = []
        real = built.optimizer_step

        def step(real=real, reported=reported):
            values = real()
            reported.append(values["train/loss"].hex())
            return values

        built.optimizer_step = step
        built.run()
    assert losses["plain"] == losses["saving"]
    assert steps_of(tmp_path / "b") == {0}
    resumed = make(tmp_path / "b", save_steps=100)
    resumed.resume(tmp_path / "b/checkpoint_step_0")
    assert resumed.optimizer_step()["train/loss"].hex() == losses["plain"][0]


def test_the_time_and_size_of_a_checkpoint_are_reported(tmp_path):
    built = make(tmp_path, save_steps=4)
    built.log.folder = tmp_path
    built.run()
    (reported,) = [line for line in built.log.lines if line.startswith("a checkpoint takes")]
    size = disk.folder_bytes(tmp_path / "checkpoint_step_0")
    assert f"{size / 1024:,.0f} KiB (step 0, read back; " in reported


def test_a_disk_that_does_not_keep_what_was_written_ends_the_run_before_step_1(tmp_path):
    built = make(tmp_path, save_steps=4)
    real = built.task.read

    def read(folder):
        for name, value in real(folder):
            yield name, value + 1e-3

    built.task.read = read
    with pytest.raises(
        CheckpointError, match="read back differ from those that were saved"
    ) as error:
        built.run()
    assert error.value.exit_code == 4
    assert built.step == 0


def test_a_full_disk_ends_the_run_before_step_1(small):
    fill(small, 50_000)
    built = make(small / "run", save_steps=4)
    with pytest.raises(CheckpointError, match=r"need \d+ KiB, have \d+ KiB"):
        built.run()
    assert built.step == 0
    assert not names(small / "run")


# --- how much ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "optimizer", representatives(list(OPTIMIZERS), ["adamw", "adamw_8bit", "adafactor"])
)
def test_a_checkpoint_takes_what_is_forecast(tmp_path, optimizer):
    large = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 5000}
    rows = tiny.examples(0, 4)
    settings = tiny.config(tmp_path, global_batch=4, optimizer=optimizer)
    built = tiny.make_engine(tiny.llama(**large), rows, rows, settings, BUDGET)
    built.optimizer_step()
    built.step += 1
    taken = disk.folder_bytes(built.save())
    assert taken <= built.keeper.need_bytes < 1.1 * taken


def train(**changes):
    values = {"output_dir": "outputs/x", "save_steps": 10} | changes
    return Config.model_validate(
        {"model": {"name": "m"}, "data": {"train_path": "d"}, "train": values}
    ).train


@pytest.mark.parametrize(
    ("changes", "copies"),
    [
        ({}, 3),  # two that stay, one that is being written
        ({"save_total_limit": 5}, 6),
        ({"save_best": "loss", "eval_steps": 5}, 4),
        ({"save_total_limit": 50}, 12),  # steps 0, 10, ... 100: there are no more
        ({"save_steps": None}, 1),  # when a signal stops the run
        ({"save_steps": None, "save_best": "loss", "eval_steps": 5}, 3),
    ],
)
def test_so_many_checkpoints_lie_on_the_disk_at_once(changes, copies):
    needed = disk.estimate_need(train(**changes), 10**6, 8 * 10**6, 0, 100, 50)
    assert needed.copies == copies
    assert needed.checkpoint == pytest.approx(12 * 10**6, rel=0.01)
    assert needed.final == pytest.approx(4 * 10**6, rel=0.02)
    assert needed.total > copies * needed.checkpoint + needed.final


def test_a_run_that_cannot_fit_is_refused_and_what_lies_there_counts_as_room(small):
    settings = train(output_dir=str(small / "run"))
    disk.refuse_if_full(disk.estimate_need(settings, 10_000, 80_000, 0, 10, 10), settings)
    needed = disk.estimate_need(settings, 40_000, 320_000, 0, 10, 10)
    reported = r"need 2.8 MiB: 3 checkpoints of .*; have .* Make room, lower train.save_total_limit"
    fill(small, needed.total - 200_000)
    with pytest.raises(CheckpointError, match=reported) as error:
        disk.refuse_if_full(needed, settings)
    assert error.value.exit_code == 4
    (small / "ballast").unlink()
    (small / "run/checkpoint_step_5").mkdir(parents=True)
    (small / "run/checkpoint_step_5/model.safetensors").write_bytes(b"x" * 250_000)
    fill(small, needed.total - 200_000)
    disk.refuse_if_full(needed, settings)


def test_room_for_the_run_but_not_for_a_merge_after_it_is_reported(small):
    settings = train(output_dir=str(small / "run"))
    needed = replace(disk.estimate_need(settings, 10_000, 80_000, 0, 10, 10), merged=2**30)
    reported = disk.refuse_if_full(needed, settings)
    assert reported
    assert "not for `make merge` after it (1,024 MiB more, have" in reported
    assert "merged later 1,024 MiB more" in str(needed)


@pytest.mark.parametrize(("mode", "weights"), [("lora", 1_771_200), ("full", 0)])
def test_a_merged_model_is_forecast_where_there_will_be_an_adapter(mode, weights):
    config = load_config(ROOT / "configs/nano.yaml", [f"tuning.mode={mode}"])
    merged = plan.predict_disk(config, 100).merged
    assert merged == (2 * weights + 1024 * disk.TOKENIZER_BYTES if weights else 0)


@pytest.mark.slow
def test_make_train_refuses_a_disk_on_which_the_run_will_not_fit(tmp_path, run_script):
    folder = tmp_path / "small"
    folder.mkdir()
    with mounted("-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)):
        settings = [f"train.output_dir={folder}/run", "train.save_steps=10", "data.max_rows=64"]
        done = run_script("train.py", *settings, "train.save_total_limit=20")
    assert done.returncode == 4, done.stderr
    assert "lower train.save_total_limit (now 20" in done.stderr
    assert "Traceback" not in done.stderr
