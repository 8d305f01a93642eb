"""A run folder holds one lineage, whatever it is told and wherever it is killed.

A state machine starts, kills, resumes and changes a run. Each attempt is a forked process; it dies
as by SIGKILL, before the n-th change that it makes to a file. A checkpoint of these runs knows the
learning rate of every step that led to it, so it is known which steps belong together.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import tiny
import torch
from accelerate import Accelerator
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from safetensors.torch import load_file

from sft.config.schema import Train
from sft.data import batches
from sft.errors import CheckpointError, Preempted
from sft.run import _open_folder
from sft.runtime import checkpoint, run_folder
from sft.runtime.attempt import Lock, Status
from sft.runtime.checkpoint import fault
from sft.runtime.log import Log
from sft.runtime.run_folder import ABANDONED, newest_first, step_of
from sft.runtime.tensor_file import TensorFile, write_tensors
from sft.train.checkpoints import Best, Keeper, changed_settings, read_state, write_state

STEPS = 9
SAVE_STEPS, EVAL_STEPS = 2, 3
KILLED = 9
TENSORS = "rates.safetensors"
CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree", "open"}
History = list[float]  # the learning rate of each step


def value_of(history: History) -> float:
    """Returns the loss after these steps."""
    return int(sha256(repr(history).encode()).hexdigest()[:8], 16) / 2**32


def die_before(folder: Path, changes: int) -> None:
    """Ends this process, as SIGKILL would, before its n-th change in `folder`."""
    left = [changes]

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in CHANGES or not str(arguments[0]).startswith(str(folder)):
            return
        if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            return
        left[0] -= 1
        if not left[0]:
            os._exit(KILLED)

    sys.addaudithook(watch)


def attempt(
    folder: Path, resume: str | None, rate: float, until: int, *, behind: bool = False
) -> None:
    """Trains to step `until`: a loop like that of the engine, without a model.

    `behind`: checkpoints are written by a thread, and have a file of tensors.
    """
    train = tiny.config(
        folder,
        learning_rate=rate,
        resume_from_checkpoint=resume,
        save_steps=SAVE_STEPS,
        eval_steps=EVAL_STEPS,
        save_best="loss",
        save_total_limit=3,
        checkpoint_async=behind,
    ).train
    status = Status(folder)
    guard: Any = SimpleNamespace(status=status, lock=Lock(folder))
    found = _open_folder(train, guard)
    log, history = Log(folder), History()
    keeper = Keeper(train, Accelerator(cpu=True), log, status, 0)
    if found:
        state = read_state(found, {})
        history = json.loads((found / "history.json").read_text())
        keeper.continue_from(found, state, any(changed_settings(state, train, 1)))
    log.open_metrics(len(history))

    def write(staging: Path, best: Best | None = None, later: bool = False) -> list[TensorFile]:
        (staging / "history.json").write_text(json.dumps(history))
        counts = {"step": len(history), "evaluated": 0, "num_skipped": 0, "optimizer_updates": 0}
        write_state(staging, counts | {"world_size": 1}, train, {}, best)
        tensors = {"rates": torch.tensor(history)}
        return [write_tensors(staging / TENSORS, tensors, {}, later)] if behind else []

    while len(history) < until:
        history.append(rate)
        step, best = len(history), None
        log.log(step, {"train/loss": value_of(history)})
        keeper.agree(keeper.is_writing)
        keeper.settle(wait=step % EVAL_STEPS == 0)
        if step % EVAL_STEPS == 0:
            best = keeper.find_better(step, {"loss": value_of(history)})
        if best or step % SAVE_STEPS == 0:
            (keeper.try_to_save if behind else keeper.save)(step, write, best)
    keeper.settle()
    if until == STEPS:
        final = folder / run_folder.FINAL
        checkpoint.commit(final, write, keeper.accelerator, 0, keeper.lineage())
        status.end("finished", 0, None, 0, until)
    else:
        keeper.save(until, write)
        status.end("preempted", 75, None, 0, until)


attempt_behind = partial(attempt, behind=True)


def attempt_of_engine(folder: Path, resume: str | None, rate: float, until: int) -> None:
    """The same with the engine and a tiny model with dropout."""
    changed = {"learning_rate": rate, "resume_from_checkpoint": resume, "save_total_limit": 3}
    changed |= {"save_steps": SAVE_STEPS, "eval_steps": EVAL_STEPS, "save_best": "loss"}
    rows = tiny.examples(0, 11)
    given = tiny.config(folder, global_batch=4, max_steps=STEPS, schedule="constant", **changed)
    status = Status(folder)
    guard: Any = SimpleNamespace(status=status, lock=Lock(folder))
    found = _open_folder(given.train, guard)
    built = tiny.make_engine(
        tiny.llama(attention_dropout=0.3), rows, rows, given, batches.Budget(60, "padded")
    )
    built.keeper.status, history = status, History()
    built.log = built.keeper.log = Log(folder)
    if found:
        built.resume(found)
        history = json.loads((found / "history.json").read_text())
    real_log, real_step, real_save = built.log.log, built.optimizer_step, built.task.save

    def step() -> dict[str, float]:
        history.append(rate)
        if len(history) == until < STEPS:
            built.guard.agree(stop=1, save=0)
        return real_step()

    def save(staging: Path, weights: Any) -> list[TensorFile]:
        (staging / "history.json").write_text(json.dumps(history))
        return real_save(staging, weights)

    def log(step: int, values: dict[str, float]) -> None:
        if "train/loss" in values:  # the real one is known to be exact if the weights are
            real_log(step, {"train/loss": value_of(history)})

    built.log.log, built.optimizer_step, built.task.save = log, step, save  # type: ignore[method-assign]
    if built.step == until:
        built.log.open_metrics(until)
        built.save()
    else:
        with suppress(Preempted):
            built.run()
    if until == STEPS:
        built.save_final(0)
        status.end("finished", 0, None, 0, until)
    else:
        status.end("preempted", 75, None, 0, until)


def run_attempt(
    folder: Path,
    resume: str | None,
    rate: float,
    until: int,
    changes: int,
    attempt: Callable[..., None] = attempt,
) -> None:
    def target() -> None:
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        if changes:
            die_before(folder, changes)
        attempt(folder, resume, rate, until)

    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    process.join()
    assert process.exitcode in ((0, KILLED) if changes else (0,))


def history_of(folder: Path) -> History:
    return json.loads((folder / "history.json").read_text())


def metrics_of(path: Path) -> dict[int, float]:
    lines = path.read_bytes().splitlines(True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith(b"\n")]
    return {row["step"]: row["train/loss"] for row in rows}


def lineage(folder: Path) -> History:
    """Returns the steps that `auto` would continue, and asserts that nothing else is there."""
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(shutil.copytree(folder, Path(scratch, "run")))
        run_folder.complete_moves(run)
        found = run_folder.find(run, "auto", lambda _: None)
        tip = history_of(found) if found else []
        for each in newest_first(run):
            assert history_of(each) == tip[: step_of(each)], f"{each.name} is of another branch"
        logged = metrics_of(run / run_folder.METRICS)
        for step in range(1, len(tip) + 1):
            assert logged[step] == value_of(tip[:step]), f"step {step} is that of another branch"
        final = run / run_folder.FINAL
        if final.exists():
            assert history_of(final)[: len(tip)] == tip
        if (best := run_folder.read_json(run / run_folder.BEST)) and found:
            assert history_of(run / best["checkpoint"]) == tip[: best["step"]]
    return tip


def all_histories(folder: Path) -> set[str]:
    """Returns those of all committed checkpoints, also of abandoned ones."""
    found = folder.rglob("*/history.json")
    return {path.read_text() for path in found if checkpoint.SCRATCH not in path.parts}


def kept_step(folder: Path) -> int:
    """Returns the step after which a killed attempt began to move all checkpoints, if it did."""
    moving = folder.glob(f"{ABANDONED}/*{run_folder.MOVING}/{run_folder.BRANCH}")
    return min(
        (run_folder.read_json(path).get("after_step", STEPS) for path in moving), default=STEPS
    )


class Branches(RuleBasedStateMachine):
    """Starts, kills, resumes and changes one run; `expected` is the lineage that auto follows."""

    attempt = staticmethod(attempt)

    def __init__(self) -> None:
        super().__init__()
        self.scratch = Path(tempfile.mkdtemp(prefix="branches"))
        self.folder = self.scratch / "run"
        self.expected: History = []
        self.rate = 1.0

    def teardown(self) -> None:
        shutil.rmtree(self.scratch)

    def start(self, resume: str | None, base: History, ahead: int, changes: int) -> None:
        """Runs an attempt from `base`, and judges what it left."""
        until = min(STEPS, len(base) + ahead)
        before = all_histories(self.folder)
        later = {h for h in before if len(json.loads(h)) > len(base)}
        run_attempt(self.folder, resume, self.rate, until, changes, self.attempt)
        tip = lineage(self.folder)
        new = [*base, *[self.rate] * (until - len(base))]
        if not changes:
            assert tip == new if until < STEPS else tip == new[: len(tip)]
            assert metrics_of(self.folder / run_folder.METRICS) == {
                step: value_of(new[:step]) for step in range(1, until + 1)
            }
            status = Status(self.folder).read()
            assert not list(self.folder.glob(".*.json.*")), "of an attempt that was killed"
            newest = "final_checkpoint" if until == STEPS else f"checkpoint_step_{until}"
            assert status["checkpoint"] == newest
        else:
            is_new = tip == new[: len(tip)] and len(tip) >= len(base)
            assert is_new or tip == self.expected, "neither the old branch nor the new one"
        if base != self.expected:
            assert later <= all_histories(self.folder), "a branch was left, and is lost"
        self.expected = tip

    @initialize(ahead=st.integers(1, STEPS))
    def begin(self, ahead: int) -> None:
        self.start(None, [], ahead, 0)

    @rule(ahead=st.integers(0, 6))
    def resume(self, ahead: int) -> None:
        self.start("auto", self.expected, ahead, 0)

    @rule(ahead=st.integers(1, 6), changes=st.integers(1, 80))
    def resume_and_kill(self, ahead: int, changes: int) -> None:
        self.start("auto", self.expected, ahead, changes)

    @rule(pick=st.integers(0, 9), ahead=st.integers(0, 6), changes=st.sampled_from([0, *range(80)]))
    def resume_from(self, pick: int, ahead: int, changes: int) -> None:
        if found := newest_first(self.folder):
            wanted = found[pick % len(found)]
            if fault(wanted) is None and step_of(wanted) <= kept_step(self.folder):
                self.start(str(wanted), history_of(wanted), ahead, changes)

    @rule(rate=st.sampled_from([1.0, 2.0, 3.0]))
    def change_a_key(self, rate: float) -> None:
        self.rate = rate

    @invariant()
    def nothing_is_left_behind(self) -> None:
        assert not list(self.folder.glob("*.staging*")) + list(self.folder.glob("*.old"))


def test_auto_follows_the_branch_that_was_chosen(tmp_path):
    """The reported case: the old branch had later checkpoints, and auto continued from those."""
    run_attempt(tmp_path / "run", None, 1.0, 8, 0)
    run_attempt(tmp_path / "run", str(tmp_path / "run/checkpoint_step_4"), 2.0, 6, 0)
    status = Status(tmp_path / "run").read()
    assert (status["state"], status["checkpoint"]) == ("preempted", "checkpoint_step_6")
    assert lineage(tmp_path / "run") == [1.0] * 4 + [2.0] * 2
    moved = {path.name for path in (tmp_path / "run" / ABANDONED / "attempt_2").iterdir()}
    assert moved >= {"branch.json", "checkpoint_step_6", "checkpoint_step_8", "metrics.jsonl"}
    run_attempt(tmp_path / "run", "auto", 2.0, 7, 0)
    assert lineage(tmp_path / "run") == [1.0] * 4 + [2.0] * 3


@pytest.mark.parametrize(("rate", "is_moved"), [(1.0, False), (2.0, True)])
def test_results_stay_only_if_the_finished_run_goes_on_as_it_did(tmp_path, rate, is_moved):
    folder = tmp_path / "run"
    run_attempt(folder, None, 1.0, STEPS, 0)
    shutil.rmtree(folder / "checkpoint_step_9", ignore_errors=True)
    (folder / "evaluation").mkdir()
    for name in ("base.json", "metrics.json"):
        (folder / "evaluation" / name).write_text("{}")
    results = ("classify", "merged", "merged.failed.1", "merged_agent0")
    for name in (*results, "merged_notes"):
        (folder / name).mkdir()
    run_attempt(folder, "auto", rate, 8, 0)
    moved = folder / ABANDONED / "attempt_2"
    for name in (run_folder.FINAL, "evaluation/metrics.json", *results):
        assert (folder / name).exists() != is_moved
        assert (moved / name).exists() == is_moved
    assert (folder / "evaluation/base.json").exists()
    assert (folder / "merged_notes").exists(), "the user's"
    assert not is_moved or metrics_of(moved / run_folder.METRICS) == {9: value_of([1.0] * 9)}


def test_an_abandoned_branch_is_continued_in_another_folder(tmp_path):
    run_attempt(tmp_path / "run", None, 1.0, 8, 0)
    run_attempt(tmp_path / "run", str(tmp_path / "run/checkpoint_step_4"), 2.0, 6, 0)
    abandoned = str(tmp_path / "run" / ABANDONED / "attempt_2/checkpoint_step_8")
    guard: Any = SimpleNamespace(status=Status(tmp_path / "run"))
    train = tiny.config(tmp_path / "run", resume_from_checkpoint=abandoned).train
    with pytest.raises(CheckpointError, match=r"not in the lineage .* another train\.output_dir"):
        _open_folder(train, guard)
    with pytest.raises(CheckpointError, match=r"was moved to .*attempt_2/checkpoint_step_8; to"):
        run_folder.find(tmp_path / "run", str(tmp_path / "run/checkpoint_step_8"), print)
    run_attempt(tmp_path / "other", abandoned, 1.0, STEPS, 0)
    assert history_of(newest_first(tmp_path / "other")[0]) == [1.0] * STEPS


def test_a_link_to_a_checkpoint_is_that_checkpoint_wherever_the_link_is(tmp_path):
    run_attempt(tmp_path / "run", None, 1.0, 8, 0)
    (tmp_path / "latest").symlink_to(tmp_path / "run/checkpoint_step_6")
    run_attempt(tmp_path / "run", str(tmp_path / "latest"), 2.0, 7, 0)
    assert lineage(tmp_path / "run") == [1.0] * 6 + [2.0]


def test_metrics_that_are_older_than_the_checkpoint_are_named(tmp_path, capsys):
    """As an older backup of the file leaves them, copied over a run folder."""
    (tmp_path / run_folder.METRICS).write_text('{"step": 1}\n{"step": 2}\n{"step": 9}\n')
    for step, gap in ((4, "no steps 3 to 4, which"), (2, None), (0, None)):
        log = Log(tmp_path)
        log.open_metrics(step)
        log.close()
        shown = " ".join(capsys.readouterr().out.split())
        assert gap in shown if gap else shown == ""


@pytest.mark.parametrize("left", [run_folder.METRICS, run_folder.FINAL, "checkpoint_step_3"])
def test_a_run_whose_status_is_lost_is_moved_aside_all_the_same(tmp_path, left):
    kept = tmp_path / "run" / left
    kept.parent.mkdir()
    kept.write_text("{}\n") if left == run_folder.METRICS else kept.mkdir()
    run_attempt(tmp_path / "run", None, 1.0, 2, 0)
    assert (tmp_path / "run.1" / left).exists()
    assert lineage(tmp_path / "run") == [1.0] * 2


def test_temporary_files_of_killed_processes_are_removed_and_no_others(tmp_path):
    run_attempt(tmp_path / "run", None, 1.0, 2, 0)
    (tmp_path / "run/evaluation").mkdir()
    alive, dead = os.getpid(), 999_999_999
    left = [f".status.json.{dead}", f"..lock.{dead}", f"evaluation/.metrics.json.{dead}"]
    kept = [f".status.json.{alive}", f".notes.json.{dead}", f".status.json.{'9' * 30}"]
    for name in left + kept:
        (tmp_path / "run" / name).write_text("{")
    (tmp_path / f"run/.plan.json.{dead}").mkdir()
    run_attempt(tmp_path / "run", "auto", 1.0, 4, 0)
    assert [name for name in left + kept if (tmp_path / "run" / name).exists()] == kept
    assert (tmp_path / f"run/.plan.json.{dead}").is_dir()


def test_a_run_folder_that_holds_an_input_is_not_moved_aside(tmp_path):
    run_attempt(tmp_path / "run", None, 1.0, 2, 0)
    (tmp_path / "base").symlink_to(tmp_path / "run/merged")
    (tmp_path / "run/merged").mkdir()
    guard: Any = SimpleNamespace(status=Status(tmp_path / "run"), lock=None)
    train, found = tiny.config(tmp_path / "run").train, tmp_path / "run/checkpoint_step_2"
    guard.lock = Lock(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"base lies in .*run, which holds an"):
        _open_folder(train, guard, [tmp_path / "base"])
    assert found.exists()
    resumed = train.model_copy(update={"resume_from_checkpoint": str(found)})
    assert _open_folder(resumed, guard, [tmp_path / "base"]) == found
    guard.lock.release()


def test_a_move_that_cannot_be_completed_is_one_message(tmp_path, monkeypatch):
    moving = tmp_path / ABANDONED / "attempt_2.moving"
    moving.mkdir(parents=True)
    (moving / "branch.json").write_text('{"after_step": 3}')
    (tmp_path / run_folder.METRICS).write_text('{"step": 4}\n')

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        with pytest.raises(CheckpointError, match=r"cannot move .*attempt_2.*No space left"):
            run_folder.complete_moves(tmp_path)
    assert (tmp_path / run_folder.METRICS).read_text() == '{"step": 4}\n'
    assert run_folder.complete_moves(tmp_path)
    assert (tmp_path / ABANDONED / "attempt_2" / run_folder.METRICS).exists()


@pytest.mark.slow
def test_killed_before_each_change_a_branch_is_the_old_lineage_or_the_new_one(tmp_path, thorough):
    """Each kill is followed by an `auto` that is not killed; `make test` has every other change."""
    original = tmp_path / "original"
    run_attempt(original, None, 1.0, STEPS, 0)
    old, seen = lineage(original), set()
    assert len(old) == STEPS
    for changes in range(1, 200, 1 if thorough else 2):
        folder = Path(shutil.copytree(original, tmp_path / "run"))
        resumed = str(folder / "checkpoint_step_6")
        run_attempt(folder, resumed, 2.0, 7, changes)
        is_done = Status(folder).read()["state"] == "preempted"
        tip = lineage(folder)
        assert tip in (old, old[:6], [*old[:6], 2.0])
        seen.add(len(tip))
        run_attempt(folder, "auto", 2.0, len(tip), 0)
        assert lineage(folder) == tip
        if tip != old:
            (moved,) = (folder / ABANDONED).iterdir()
            assert metrics_of(moved / run_folder.METRICS) == {
                step: value_of([1.0] * step) for step in range(7, STEPS + 1)
            }
            assert history_of(moved / "checkpoint_step_8") == [1.0] * 8
            assert history_of(moved / run_folder.FINAL) == [1.0] * STEPS
        shutil.rmtree(folder)
        if is_done:
            break
    assert is_done
    assert seen == {6, 7, STEPS}


@pytest.mark.slow
def test_killed_before_each_change_while_a_thread_writes_a_checkpoint(tmp_path, thorough):
    """It costs that checkpoint; `make test` has every third change."""
    original, whole = tmp_path / "original", [1.0] * 7
    run_attempt(original, None, 1.0, 4, 0, attempt_behind)
    seen = set()
    for changes in range(1, 200, 1 if thorough else 3):
        folder = Path(shutil.copytree(original, tmp_path / "run"))
        run_attempt(folder, "auto", 1.0, 7, changes, attempt_behind)
        tip = lineage(folder)
        is_done = tip == whole and Status(folder).read()["state"] == "preempted"
        seen.add(len(tip))
        run_attempt(folder, "auto", 1.0, 7, 0, attempt_behind)
        assert lineage(folder) == whole
        assert not (folder / checkpoint.SCRATCH).exists()
        for each in newest_first(folder):
            assert load_file(each / TENSORS)["rates"].tolist() == history_of(each)
        shutil.rmtree(folder)
        if is_done:
            break
    assert is_done
    assert seen == {4, 6, 7}


@pytest.mark.thorough("the same of a run with checkpoints, killed before each change")
@pytest.mark.slow
def test_killed_before_its_first_checkpoint_a_run_begins_again_from_its_origin(tmp_path):
    """With a checkpoint of another folder; before each change, also where an earlier run lies."""
    run_attempt(tmp_path / "other", None, 1.0, 4, 0)
    given = tmp_path / "other/checkpoint_step_4"
    for is_used in (False, True):
        for changes in range(1, 100):
            folder = tmp_path / "run"
            if is_used:
                run_attempt(folder, None, 3.0, 2, 0)
            run_attempt(folder, str(given), 2.0, 6, changes)
            had_begun, left = Status(folder).read(), [*map(history_of, newest_first(folder))]
            run_attempt(folder, "auto", 2.0, 6, 0)
            found, new = history_of(newest_first(folder)[0]), [1.0] * 4 + [2.0] * 2
            if left and left[0] != new:  # the earlier run has not been moved aside
                assert found == [3.0] * 2 + [2.0] * 4
            else:
                assert found == new or not had_begun
            is_done = had_begun.get("state") == "preempted" and left[0] == new
            for each in tmp_path.glob("run*"):
                shutil.rmtree(each)
            if is_done:
                break
        assert is_done


def test_auto_says_so_if_the_origin_of_a_run_cannot_be_used(tmp_path, capsys):
    run_attempt(tmp_path / "other", None, 1.0, 4, 0)
    given, run = tmp_path / "other/checkpoint_step_4", tmp_path / "run"
    guard: Any = SimpleNamespace(status=Status(run), lock=None)
    train = tiny.config(run, resume_from_checkpoint="auto").train
    assert _open_folder(train, guard) is None
    assert "run has no checkpoint: training starts at step 0" in capsys.readouterr().out
    run_folder.record_origin(run, given)
    assert _open_folder(train, guard) == given
    manifest = given / checkpoint.MANIFEST
    text = manifest.read_text()
    manifest.write_text(text.replace('"attempt": 1', '"attempt": 2'))
    with pytest.raises(CheckpointError, match=r"checkpoint_step_4: it is another checkpoint now"):
        _open_folder(train, guard)
    shutil.rmtree(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"checkpoint_step_4: it has no MANIFEST.*or null to"):
        _open_folder(train, guard)
    (run / run_folder.ORIGIN).write_text("{")
    with pytest.raises(CheckpointError, match=r"cannot be used"):
        _open_folder(train, guard)
    anew = tiny.config(run).train
    assert _open_folder(anew, guard) is None
    assert _open_folder(train, guard) is None


def run_machine(machine: type[RuleBasedStateMachine], examples: int, steps: int) -> None:
    chosen = settings(
        max_examples=examples,
        stateful_step_count=steps,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],  # shrinking takes minutes of processes
    )
    run_state_machine_as_test(machine, settings=chosen)


def test_any_sequence_of_starts_kills_and_branches_leaves_one_lineage():
    run_machine(Branches, 2, 5)


@pytest.mark.thorough("the same with fewer examples")
@pytest.mark.slow
def test_the_same_for_longer():
    run_machine(Branches, 15, 10)


class EngineBranches(Branches):
    """With real weights, which are a function of the history (law 2)."""

    attempt = staticmethod(attempt_of_engine)
    weights: ClassVar[dict[str, str]] = {}

    @invariant()
    def weights_follow_from_the_history(self) -> None:
        for folder in newest_first(self.folder):
            digest = checkpoint.sha256(folder / "model.safetensors")
            history = (folder / "history.json").read_text()
            assert self.weights.setdefault(history, digest) == digest


@pytest.mark.thorough("the same with a history in place of a model")
@pytest.mark.slow
def test_the_same_with_the_engine_and_a_model():
    run_machine(EngineBranches, 4, 6)


@pytest.mark.parametrize("name", ["config.yaml", "training.log", "evaluation/metrics.json"])
def test_files_of_a_user_in_a_new_run_folder_are_not_overwritten(tmp_path, name):
    """As the configuration of an experiment whose output_dir is the folder that it lies in."""
    mine = tmp_path / "run" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    lock = Lock(tmp_path / "run")
    guard: Any = SimpleNamespace(status=Status(tmp_path / "run"), lock=lock)
    for resume in (None, "auto"):
        train = tiny.config(tmp_path / "run", resume_from_checkpoint=resume).train
        with pytest.raises(CheckpointError, match=f"{mine}: no run has written this"):
            _open_folder(train, guard)
    lock.release()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [mine]
    mine.rename(tmp_path / "elsewhere")
    (tmp_path / "run/notes.txt").write_text("mine")
    assert _open_folder(train, guard) is None


def test_a_key_that_is_newer_than_a_run_is_no_change_at_its_default(tmp_path):
    """Else `auto` would set the results of every finished run aside after an update."""
    train = tiny.config(tmp_path).train
    settings = train.model_dump()
    for key in settings.keys() - {"output_dir"}:
        state = {"settings": {k: v for k, v in settings.items() if k != key}, "world_size": 1}
        default = Train.model_fields[key].get_default(call_default_factory=True)
        done = False if default == "auto" else default  # what a run did that had no such choice
        same = train.model_copy(update={key: done})
        assert [*changed_settings(state, same, 1)] == []
    other = train.model_copy(update={"weight_decay": 0.123})
    del settings["weight_decay"]
    (found,) = changed_settings({"settings": settings, "world_size": 1}, other, 1)
    assert found == f"weight_decay was {Train.model_fields['weight_decay'].default}, is 0.123"
