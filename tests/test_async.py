"""A checkpoint that is written behind the steps (`train.checkpoint_async`) is that of its step.

Two ranks that keep parts of a model are in test_shards.py, SIGKILL in test_branches.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import tiny

from sft.config.load import with_values
from sft.data import batches
from sft.errors import CheckpointError, NonFiniteError, Preempted
from sft.runtime import checkpoint, run_folder
from sft.runtime.tensor_file import TensorFile
from sft.train.engine import Engine

BUDGET = batches.Budget(60, "padded")


@pytest.fixture
def may_write(monkeypatch) -> Iterator[threading.Event]:
    """Threads write nothing until this is set. It is set in the end, so that they end."""
    event, finish = threading.Event(), TensorFile.finish

    def finish_late(file: TensorFile) -> Any:
        if threading.current_thread() is not threading.main_thread():
            event.wait()
        return finish(file)

    monkeypatch.setattr(TensorFile, "finish", finish_late)
    yield event
    event.set()


def make(folder: Path, kind: str = "full", **train: Any) -> Engine:
    rows = tiny.examples(0, 11)
    values = {"global_batch": 4, "max_steps": 6, "save_steps": 2, "save_total_limit": 9}
    values |= {"checkpoint_async": True} | train
    settings = tiny.config(folder, **values)
    if kind == "lora":
        settings = with_values(settings, {"tuning.mode": "lora", "tuning.r": 4})
    if kind == "crowd":
        settings = tiny.crowd_config(folder, train=values)
    model = tiny.llama() if kind == "full" else tiny.adapted(settings)
    made = tiny.make_engine(model, rows, rows, settings, BUDGET)
    made.log = made.keeper.log = tiny.Said()
    return made


def tree(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def at_step(built: Engine, actions: dict[int, Callable[[], Any]]) -> None:
    """Does something in the forward pass of these steps (from 0)."""
    real = built.task.loss

    def loss(*given: Any) -> Any:
        actions.pop(built.step, lambda: None)()
        return real(*given)

    built.task.loss = loss  # type: ignore[method-assign]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("checkpoint_step_*")}


@pytest.mark.parametrize(
    ("kind", "optimizer"),
    [("full", "adamw"), ("full", "schedule_free"), ("lora", "adamw"), ("crowd", "adamw")],
)
def test_every_byte_is_that_of_a_save_that_waits(tmp_path, may_write, kind, optimizer):
    """The first one is written when another step has changed weights and state."""
    given = {"optimizer": optimizer, "eval_steps": 5, "save_best": "loss", "schedule": "constant"}
    folder, seen = tmp_path / "run", list[set[str]]()
    waits = make(folder, kind, **given)
    waits.keeper.train = waits.train.model_copy(update={"checkpoint_async": False})
    waits.run()
    expected = tree(folder)
    folder.rename(tmp_path / "before")
    behind = make(folder, kind, **given)

    def look() -> None:
        seen.append(names(folder))
        may_write.set()

    at_step(behind, {3: look})
    behind.run()
    assert seen == [{"checkpoint_step_0"}]
    assert names(folder) == {f"checkpoint_step_{step}" for step in (0, 2, 4, 5)}
    found = tree(folder)
    assert found.keys() == expected.keys()
    assert {name for name in found if found[name] != expected[name]} == set()
    lines = [line for line in behind.log.lines if "of which training waited" in str(line)]
    assert [line[:23] for line in lines] == [f"saved checkpoint_step_{n}" for n in (2, 4, 5)]


def test_a_checkpoint_is_committed_by_the_step_that_finds_it_written(tmp_path, may_write):
    built = make(tmp_path, max_steps=8, save_steps=4)
    seen = list[set[str]]()

    def write() -> None:
        may_write.set()
        thread = next(each for each in threading.enumerate() if each.name == "save")
        thread.join()

    def look() -> None:
        seen.append(names(tmp_path))

    # Step 5 asks before its forward pass, when the thread still waits; step 6 finds it done.
    at_step(built, {4: write, 5: look, 6: look})
    built.run()
    assert seen == [{"checkpoint_step_0"}, {"checkpoint_step_0", "checkpoint_step_4"}]


@pytest.mark.parametrize("ends", ["signal", "nan", "last step"])
def test_a_run_that_ends_commits_what_is_being_written(tmp_path, may_write, ends):
    built = make(tmp_path, max_steps=4, save_steps=3)

    def end() -> None:
        threading.Timer(0.2, may_write.set).start()  # while the run waits for it
        if ends == "signal":
            built.guard.agree(stop=1, save=0)
        elif ends == "nan":
            next(built.model.parameters()).data.fill_(float("nan"))

    at_step(built, {3: end})
    with suppress(Preempted, NonFiniteError):
        built.run()
    assert built.step == (3 if ends == "nan" else 4)
    steps = {0, 3, 4} if ends == "signal" else {0, 3}
    assert names(tmp_path) == {f"checkpoint_step_{step}" for step in steps}
    assert all(checkpoint.fault(each) is None for each in run_folder.newest_first(tmp_path))
    assert not (tmp_path / checkpoint.SCRATCH).exists()


@pytest.mark.parametrize("failing", ["copy", "write", "commit"])
def test_a_save_that_fails_behind_costs_that_checkpoint(tmp_path, monkeypatch, failing):
    built = make(tmp_path, save_steps=1)
    owner, name = {
        "copy": (TensorFile, "write"),
        "write": (TensorFile, "finish"),
        "commit": (checkpoint, "seal"),
    }[failing]
    real = getattr(owner, name)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    def fill() -> None:
        built.keeper.settle()
        monkeypatch.setattr(owner, name, fail)

    def make_room() -> None:
        built.keeper.settle()
        monkeypatch.setattr(owner, name, real)

    at_step(built, {2: fill, 3: make_room})
    built.run()
    (warning,) = [line for line in built.log.lines if str(line).startswith("warning")]
    assert f"cannot save {tmp_path}/checkpoint_step_" in warning
    assert "No space left on device" in warning
    assert "Training goes on; this is failed save 1 in a row" in warning
    assert built.step == 6
    assert len(names(tmp_path)) == 5, "of 6"
    assert not (tmp_path / checkpoint.SCRATCH).exists()


def test_after_so_many_failed_saves_in_a_row_the_run_ends(tmp_path, monkeypatch):
    built = make(tmp_path, save_steps=1, max_failed_saves=2)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    def fill() -> None:
        built.keeper.settle()
        monkeypatch.setattr(TensorFile, "finish", fail)

    at_step(built, {2: fill})
    with pytest.raises(CheckpointError, match=r"step_4: .*failed save 2 in a row") as error:
        built.run()
    assert error.value.exit_code == 4
    assert names(tmp_path) == {f"checkpoint_step_{step}" for step in (0, 1, 2)}
