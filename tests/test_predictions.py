"""The file of predictions: whole lines from many processes, resumed, put in order."""

from __future__ import annotations

import json
import os
import signal
import time
import tracemalloc

import pytest
from accelerate import Accelerator

from sft.errors import UserError
from sft.evaluate.predictions import Predictions, ScoredPredictions, key_of, read_records


def record(index: int, key: str, **more) -> dict:
    return {"index": index, "key": key} | more


KEYS = [key_of("example", i) for i in range(6)]


def announced(path, keys=KEYS):
    """(the file, the numbers of the examples that are still to be done)."""
    found = Predictions(path)
    return found, [i for i, key in enumerate(keys) if found.expect(key)]


def test_no_examples_give_an_empty_file(tmp_path):
    Predictions(tmp_path / "predictions.jsonl").finish()
    assert list(read_records(tmp_path / "predictions.jsonl")) == []


def test_what_is_finished_is_not_asked_again_and_ends_in_order(tmp_path):
    path = tmp_path / "a/predictions.jsonl"
    first, todo = announced(path)
    assert todo == [0, 1, 2, 3, 4, 5]
    first.append([record(4, KEYS[4], answer="four"), record(1, KEYS[1], answer="één\n")])
    first.append([])
    second, todo = announced(path)
    assert todo == [0, 2, 3, 5]
    second.append([record(i, KEYS[i], answer=str(i)) for i in (5, 3, 0, 2)])
    second.finish()
    assert [each["index"] for each in read_records(path)] == [0, 1, 2, 3, 4, 5]
    assert [each["answer"] for each in read_records(path)][1] == "één\n"
    assert announced(path)[1] == []
    assert not list(path.parent.glob("*.tmp"))


def test_an_example_that_changed_is_asked_again_and_what_is_gone_is_dropped(tmp_path):
    path = tmp_path / "predictions.jsonl"
    made, _ = announced(path)
    made.append([record(i, KEYS[i], answer="old") for i in range(6)])
    changed = [*KEYS[:2], key_of("another"), KEYS[3]]
    again, todo = announced(path, changed)
    assert todo == [2]
    again.append([record(2, changed[2], answer="new")])
    again.finish()
    assert [each["answer"] for each in read_records(path)] == ["old", "old", "new", "old"]


def test_a_line_torn_by_a_kill_costs_that_line(tmp_path):
    path = tmp_path / "predictions.jsonl"
    made, _ = announced(path)
    made.append([record(i, KEYS[i]) for i in range(3)])
    whole = path.read_bytes()
    for cut in range(len(whole) - 2, len(whole) - 40, -7):
        path.write_bytes(whole[:cut])
        again, todo = announced(path)
        assert todo == [2, 3, 4, 5]
        again.append([record(i, KEYS[i]) for i in todo])
        again.finish()
        assert [each["index"] for each in read_records(path)] == [0, 1, 2, 3, 4, 5]


def test_a_last_line_that_lost_only_its_end_is_kept_whole(tmp_path):
    path = tmp_path / "predictions.jsonl"
    made, _ = announced(path, KEYS[:2])
    made.append([record(i, KEYS[i]) for i in (1, 0)])
    path.write_bytes(path.read_bytes()[:-1])
    again, todo = announced(path, KEYS[:2])
    assert todo == []
    again.finish()
    assert [each["index"] for each in read_records(path)] == [0, 1]


def test_many_processes_add_whole_lines(tmp_path):
    path = tmp_path / "predictions.jsonl"
    keys = [key_of(i) for i in range(400)]
    pids = []
    for rank in range(4):
        pids.append(os.fork())
        if not pids[-1]:
            mine, _ = announced(path, keys)
            for i in range(rank, 400, 4):
                mine.append([record(i, keys[i], answer="x" * (i * 37 % 9000))])
            os._exit(0)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 4
    made, todo = announced(path, keys)
    assert todo == []
    made.finish()
    assert [len(each["answer"]) for each in read_records(path)] == [
        i * 37 % 9000 for i in range(400)
    ]


def test_an_example_takes_less_than_a_hundred_bytes_of_memory(tmp_path):
    """Its key and its place, and what sorts them; a line of each, kept, would be seen."""

    def peak(number: int) -> int:
        path = tmp_path / f"{number}.jsonl"
        tracemalloc.start()
        try:
            for again in (False, True):
                made = Predictions(path)
                for first in range(0, number, 50):
                    own = [record(i, key_of(i), answer="x" * 99) for i in range(first, first + 50)]
                    assert [made.expect(each["key"]) for each in own] == [not again] * 50
                    made.append([] if again else own[::-1])
                made.finish()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(50)  # what is made once
    assert peak(4050) - peak(450) < 100 * 3600
    assert [each["index"] for each in read_records(tmp_path / "4050.jsonl")] == [*range(4050)]


def test_what_was_appended_survives_a_kill(tmp_path):
    path = tmp_path / "predictions.jsonl"
    pid = os.fork()
    if not pid:
        mine, _ = announced(path)
        mine.append([record(i, KEYS[i]) for i in range(4)])
        (tmp_path / "said").touch()
        time.sleep(60)
    while not (tmp_path / "said").exists():
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert announced(path)[1] == [4, 5]


def test_a_file_that_is_not_whole_cannot_be_finished(tmp_path):
    path = tmp_path / "predictions.jsonl"
    made, _ = announced(path)
    made.append([record(0, KEYS[0])])
    with pytest.raises(UserError, match=r"5 of 6 examples are missing, the first is number 2: all"):
        made.finish()
    assert [each["index"] for each in read_records(path)] == [0]


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"index": -1, "key": "0"}', '{"index": 0}'])
def test_a_line_that_is_none_is_named_by_file_and_number(tmp_path, line):
    path = tmp_path / "predictions.jsonl"
    path.write_text(json.dumps(record(0, KEYS[0])) + f"\n{line}\n")
    with pytest.raises(UserError, match=r"predictions\.jsonl:2: expected predictions"):
        list(read_records(path))
    if line in ("[]", "{}"):  # no beginning of a line of ours
        with pytest.raises(UserError, match=r"jsonl:2: expected predictions"):
            announced(path)
    else:
        assert announced(path)[1] == [1, 2, 3, 4, 5]
    with pytest.raises(UserError, match="cannot read"):
        list(read_records(tmp_path / "none.jsonl"))


def test_secrets_of_the_environment_are_not_written(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    made, _ = announced(tmp_path / "predictions.jsonl")
    made.append([record(0, KEYS[0], answer="it is hf_secretsecret")])
    assert "it is <HF_TOKEN>" in (tmp_path / "predictions.jsonl").read_text()


@pytest.mark.parametrize("line", ['{"prompt": "a row of data"}', "free text", "1,2,3"])
def test_a_file_that_is_something_else_is_not_written_over(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{line}\n" * 2)
    with pytest.raises(UserError, match=r"rows\.jsonl:1: expected predictions"):
        Predictions(path)
    assert path.read_text() == f"{line}\n" * 2


def test_a_folder_in_its_place_is_reported(tmp_path):
    with pytest.raises(UserError, match="it is not a plain file; make room, or give another file"):
        Predictions(tmp_path)


@pytest.mark.parametrize("fails", ["read", "garbage", "append 1", "append 2", "append 3", "finish"])
def test_answers_that_cannot_be_written_are_scored_all_the_same(tmp_path, monkeypatch, fails):
    Accelerator(cpu=True)
    path, count = tmp_path / "predictions.jsonl", [0]
    if fails == "read":
        path.mkdir()
    elif fails == "garbage":
        path.write_text("notes of the user\n")
    else:
        made, _ = announced(path)
        made.append([record(1, KEYS[1], answer="1"), record(2, key_of("old"), answer="old")])
    real = Predictions.append, Predictions.finish

    def append(self, records):
        count[0] += 1
        if fails == f"append {count[0]}":
            raise UserError("No space left")
        real[0](self, records)

    def finish(self):
        if fails == "finish":
            raise UserError("No space left")
        real[1](self)

    monkeypatch.setattr(Predictions, "append", append)
    monkeypatch.setattr(Predictions, "finish", finish)
    found = ScoredPredictions(path)
    todo = [i for i, key in enumerate(KEYS) if found.expect(key)]
    assert (1 in todo) == (fails in ("read", "garbage"))
    for i in todo[::-1]:
        found.append([record(i, KEYS[i], answer=str(i))])
    found.finish()
    records, reason = found.collect()
    assert reason
    assert [each["answer"] for each in records or ()] == ["0", "1", "2", "3", "4", "5"]
    if fails == "garbage":
        assert path.read_text() == "notes of the user\n"


def test_answers_that_are_written_are_read_from_their_file(tmp_path):
    Accelerator(cpu=True)
    found = ScoredPredictions(tmp_path / "predictions.jsonl")
    assert all(map(found.expect, KEYS))
    found.append([record(i, key) for i, key in enumerate(KEYS)])
    found.finish()
    assert found.collect() == (None, None)
