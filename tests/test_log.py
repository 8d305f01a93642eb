"""What a run reports: metrics.jsonl, TensorBoard, training.log and the console."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import tomllib
import types
from pathlib import Path

import pytest
from conftest import ROOT
from rich.table import Table
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sft.errors import UserError
from sft.runtime import trackers
from sft.runtime.console import WIDTH, duration, facts, write_json
from sft.runtime.log import Log


def metrics(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]  # NaN is no JSON


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    return {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def logged(folder: Path, after: int, steps: range, *, tensorboard: bool = False) -> None:
    """A run that continues after a step and logs a loss of step / 4 at each of `steps`."""
    log = Log(folder, tensorboard=tensorboard)
    log.open_metrics(after)
    for step in steps:
        log.log(step, {"train/loss": step / 4})
    log.close()


def expected(steps: range) -> list[dict]:
    return [{"step": step, "train/loss": step / 4} for step in steps]


# --- files of JSON -------------------------------------------------------------------------------


def test_json_is_there_as_a_whole_or_as_it_was(tmp_path, monkeypatch):
    path, values = tmp_path / "a.json", {"b": ["é", 1.5, None, "\udc80"]}
    write_json(path, values)
    assert json.loads(path.read_text("utf-8")) == values
    monkeypatch.setattr("os.fsync", lambda _: 1 / 0)  # killed before it has its name
    with pytest.raises(ZeroDivisionError):
        write_json(path, {}, sync=True)
    assert json.loads(path.read_text("utf-8")) == values
    monkeypatch.undo()
    write_json(path, {}, sync=True)
    assert [each.name for each in tmp_path.iterdir()] == ["a.json"]
    assert path.read_text() == "{}\n"


def test_json_goes_through_what_is_no_file(tmp_path):
    """`JSON=/dev/stdout` must not replace that name by a file."""
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_json(tmp_path / "link", [1], follow=True)
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "target").read_text()) == [1]
    os.mkfifo(tmp_path / "pipe")
    pipe = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_json(tmp_path / "pipe", [1], follow=True)
    assert json.loads(os.read(pipe, 100)) == [1]
    assert (tmp_path / "pipe").is_fifo()
    os.close(pipe)
    with pytest.raises(IsADirectoryError):
        write_json(tmp_path, [1], follow=True)


# --- metrics.jsonl -----------------------------------------------------------------------------


def test_each_step_is_one_line_of_json_on_disk_at_once(tmp_path):
    log = Log(tmp_path)
    log.open_metrics(0)
    log.log(1, {"train/loss": 0.5, "train/tokens": 7})
    log.log(1, {"eval/loss": 0.25})
    found = metrics(tmp_path)  # before close
    log.close()
    assert found == [
        {"step": 1, "train/loss": 0.5, "train/tokens": 7},
        {"step": 1, "eval/loss": 0.25},
    ]


def test_a_resumed_run_cuts_what_was_logged_after_its_checkpoint(tmp_path):
    logged(tmp_path, 0, range(1, 8))
    logged(tmp_path, 4, range(5, 7))
    assert metrics(tmp_path) == expected(range(1, 7))


def test_a_run_from_the_start_begins_anew(tmp_path):
    logged(tmp_path, 0, range(1, 8))
    logged(tmp_path, 0, range(1, 3))
    assert metrics(tmp_path) == expected(range(1, 3))


TORN = {
    "half a line": '{"step": 4, "train/lo',
    "a whole line without its end": '{"step": 4, "train/loss": 1.0}',
    "zeros after a power cut": "\0\0\0\0",
    "zeros and an end": "\0\0\0\0\n",
    "an empty line": "\n",
    "half a line with an end": '{"step": 4, "tra\n',
    "not an object": "4\n",
    "without a step": "{}\n",
    "two torn lines": '{"step": 4, "tra\n{"st',
}


@pytest.mark.parametrize("torn", TORN.values(), ids=TORN)
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    logged(tmp_path, 0, range(1, 4))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    logged(tmp_path, 4, range(5, 7))
    assert metrics(tmp_path) == [*expected(range(1, 4)), *expected(range(5, 7))]


def test_values_that_are_not_finite_stay_valid_json(tmp_path):
    log = Log(tmp_path)
    log.open_metrics(0)
    log.log(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.0})
    log.close()
    assert metrics(tmp_path) == [{"step": 1, "a": "nan", "b": "inf", "c": "-inf", "d": 1.0}]
    assert [float(metrics(tmp_path)[0][key]) for key in "bc"] == [math.inf, -math.inf]


# --- TensorBoard -------------------------------------------------------------------------------


def twice(losses: list[tuple[int, float]]) -> dict[str, list[tuple[int, float]]]:
    """The loss is a first card, too."""
    return {"0_overview/1_loss": losses, "train/loss": losses}


def test_scalars_are_in_tensorboard_and_a_resumed_run_purges_what_came_later(tmp_path):
    logged(tmp_path, 0, range(1, 6), tensorboard=True)
    assert scalars(tmp_path) == twice([(step, step / 4) for step in range(1, 6)])
    logged(tmp_path, 3, range(4, 8), tensorboard=True)
    assert scalars(tmp_path) == twice([(step, step / 4) for step in range(1, 8)])
    logged(tmp_path, 5, range(6, 7), tensorboard=True)
    assert scalars(tmp_path) == twice([(step, step / 4) for step in range(1, 7)])


def test_scalars_are_on_disk_at_once(tmp_path):
    log = Log(tmp_path, tensorboard=True)
    log.open_metrics(0)
    log.log(1, {"train/loss": 0.25})
    found = scalars(tmp_path)  # before close: SummaryWriter writes in a thread of its own
    log.close()
    assert found == twice([(1, 0.25)])


def test_without_tensorboard_none_is_written(tmp_path):
    logged(tmp_path, 0, range(1, 3))
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "training.log"}


def test_another_rank_writes_and_prints_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    log = Log(None, tensorboard=True)
    log.open_metrics(0)
    log.log(1, {"train/loss": 1.0})
    log.say("not reported")
    with log.progress("train", 3) as advance:
        advance()
        advance(2, "note")
    log.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


class Recorder:
    """Stands for a tracker: remembers what it was given."""

    def __init__(self):
        self.calls: list[tuple] = []

    def log(self, values, step):
        self.calls.append((step, values))

    def finish(self):
        self.calls.append(("finish",))


def test_a_tracker_gets_the_same_values_and_is_finished(tmp_path):
    recorder = Recorder()
    log = Log(tmp_path, trackers={"wandb": recorder})
    log.open_metrics(0)
    log.log(3, {"train/loss": 0.5})
    log.close()
    assert recorder.calls == [(3, {"train/loss": 0.5}), ("finish",)]


class Failing(Recorder):
    def log(self, values, step):
        raise ConnectionError("the service is away")

    def finish(self):
        raise SystemError("nor can it be ended")


def test_errors_of_a_tracker_cost_one_warning_and_no_other_tracker(tmp_path, capsys):
    other = Recorder()
    log = Log(tmp_path, trackers={"wandb": Failing(), "mlflow": other})
    log.open_metrics(0)
    for step in range(3):
        log.log(step, {"train/loss": 0.5})
    log.close()
    assert capsys.readouterr().out.count("warning: wandb cannot be written: the service is") == 1
    assert [call[0] for call in other.calls] == [0, 1, 2, "finish"]
    assert len(metrics(tmp_path)) == 3


class Refusing(types.ModuleType):
    """Stands for a tracker's package whose service refuses the key, and repeats it."""

    def __getattr__(self, name):
        raise ConnectionError(f"401 for {os.environ['WANDB_API_KEY']}.")


def test_a_tracker_that_cannot_start_is_a_mistake_to_mend_and_its_key_is_not_shown(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "ninetySix96")
    monkeypatch.setitem(sys.modules, "wandb", Refusing("wandb"))
    expected = "train.trackers: wandb cannot start: 401 for <WANDB_API_KEY>; log in as"
    with pytest.raises(UserError, match=re.escape(expected)):
        trackers.start_tracker("wandb", "run", {})


def test_each_missing_tracker_names_its_extra(monkeypatch):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda _: None)
    for name, package in trackers.PACKAGES.items():
        with pytest.raises(
            UserError, match=rf'{name} is not installed; pip install "\.\[{name}\]"'
        ):
            trackers.refuse_missing([name])
        (needed,) = extras["optional-dependencies"][name]
        assert needed.split(">=")[0].replace("-", "_") == package


def test_a_tracker_gets_numbers_and_texts_by_dotted_path():
    values = {"train": {"lr": 1e-3, "groups": None, "own": {"metric": "loss"}}, "data": {"a": [1]}}
    assert trackers._flatten(values) == {
        "train.lr": 1e-3,
        "train.groups": "None",
        "train.own.metric": "loss",
        "data.a": "[1]",
    }


def test_the_first_cards_are_loss_held_out_loss_and_scores_and_texts_wait_for_the_board(tmp_path):
    log = Log(tmp_path, tensorboard=True)
    log.text("plan", "    as it is")
    log.open_metrics(0)
    log.log(1, {"train/loss": 3.0, "train/grad_norm": 1.0, "memory/gib": 2.0})
    metrics = ["loss", "perplexity", "chrf", "f1/yes"]
    log.log(2, {f"eval/{name}": 1.0 for name in metrics})
    log.text("answers", "four")
    log.close()
    found = scalars(tmp_path)
    first = ["0_overview/1_loss", "0_overview/2_held_out_loss", "0_overview/3_chrf"]
    assert sorted(found)[:4] == [*first, "eval/chrf"]
    assert found[first[0]] == found["train/loss"] == [(1, 3.0)]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    texts = [(each, board.Tensors(each)[0].step) for each in board.Tags()["tensors"]]
    assert texts == [("plan/text_summary", 0), ("answers/text_summary", 2)]


def test_a_folder_in_the_place_of_a_log_file_costs_one_warning(tmp_path, capsys):
    for name in ("training.log", "metrics.jsonl"):
        (tmp_path / name).mkdir()
    log = Log(tmp_path)
    log.open_metrics(3)
    for step in range(4, 7):
        log.say("text")
        log.log(step, {"train/loss": 0.5})
    with log.optional("report"):
        (tmp_path / "no/folder").write_text("")
    log.close()
    reported = capsys.readouterr().out
    for name in ("training.log", "metrics.jsonl", "report"):
        assert reported.count(f"warning: {name} cannot be written") == 1
    assert reported.count("text\n") == 3


# --- text --------------------------------------------------------------------------------------

AS_IS = [
    "[bold]not bold[/bold] [red] [/] [0, 1] [link=x]",
    "rows[3].messages[/0]",
    "\\[x] C:\\data",
    "at 12:30:05, C:a:b, :warning: :x: {braces} %s <tag>",
    "ü 漢字 😀",
    "",
]


@pytest.mark.parametrize("text", AS_IS)
def test_text_is_reported_as_it_is_on_the_console_and_in_the_file(tmp_path, capsys, text):
    log = Log(tmp_path)
    log.say(text)
    log.close()
    assert capsys.readouterr().out == f"{text}\n"
    assert (tmp_path / "training.log").read_text("utf-8") == f"{text}\n"


@pytest.mark.parametrize("text", [text for text in AS_IS if text])
def test_text_in_a_table_is_reported_as_it_is(tmp_path, capsys, text):
    log = Log(tmp_path)
    log.say(facts("Title [x]", [("name [y]", text)]))
    log.close()
    title, row = capsys.readouterr().out.splitlines()
    assert title.rstrip() == "Title [x]"
    assert row.rstrip() == f"name [y]  {text}"


def test_no_table_is_wider_than_the_page(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    log = Log(tmp_path)
    table = Table(title="wide")
    table.add_column("words")
    table.add_row("word " * 200)
    log.say(table)
    log.say(facts("facts", [("name", "x" * 500)]))
    log.close()
    for text in (capsys.readouterr().out, (tmp_path / "training.log").read_text()):
        assert max(len(line) for line in text.splitlines()) <= WIDTH
        assert text.count("x") == 500


def test_the_log_file_holds_no_colour_codes(tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as many CI systems do
    log = Log(tmp_path)
    log.say(facts("title", [("name", "value")]))
    log.close()
    assert "\x1b" not in (tmp_path / "training.log").read_text("utf-8")


def test_the_log_file_is_continued_by_a_second_run(tmp_path):
    for text in ("first", "second"):
        log = Log(tmp_path)
        log.say(text)
        log.close()
    assert (tmp_path / "training.log").read_text("utf-8") == "first\nsecond\n"


def test_what_is_said_is_on_disk_at_once(tmp_path):
    log = Log(tmp_path)
    log.say("now")
    assert (tmp_path / "training.log").read_text("utf-8") == "now\n"
    log.close()


def test_off_a_terminal_no_progress_bar_is_drawn(tmp_path, capsys):
    log = Log(tmp_path)
    with log.progress("train", 3, done=1) as advance:
        advance(1, "loss [0.5]")
    log.close()
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_the_progress_bar_shows_count_and_note(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    log = Log(tmp_path)
    with log.progress("train", 10, done=4) as advance:
        advance(3, "loss 0.5")
    log.close()
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().out)
    assert "7/10" in shown
    assert "loss 0.5" in shown
    assert "ETA" in shown


@pytest.mark.parametrize(
    ("seconds", "reported"),
    [
        (0, "0 s"),
        (0.4, "0 s"),
        (41.2, "41 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 0 min"),
        (7800, "2 h 10 min"),
        (7859, "2 h 10 min"),
        (360_000, "100 h 0 min"),
    ],
)
def test_a_duration_is_reported_in_its_two_largest_units(seconds, reported):
    assert duration(seconds) == reported
