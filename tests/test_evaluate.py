"""Answers into a file and their scores: every example once, the same for every cut."""

from __future__ import annotations

import json
import time
import tracemalloc
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from conftest import ROOT
from transformers import AutoTokenizer

from sft.config.load import load_config
from sft.config.schema import Evaluation, Generation
from sft.data import cache, template, workers
from sft.data.files import BadRow, Row
from sft.errors import UserError
from sft.evaluate import answers, generate
from sft.evaluate.predictions import Predictions, key_of, read_records
from sft.models import load, pretrained
from sft.runtime import processes
from sft.runtime.processes import Context
from sft.tasks.base import Results
from sft.tasks.sft.task import FineTune

SHORT = Generation(max_new_tokens=8)


@pytest.fixture(scope="module")
def nano():
    config = load_config(ROOT / "configs/nano.yaml")
    tokenizer = template.prepare_tokenizer(pretrained.load_tokenizer(config.model))
    base = load.load_base(config.model, "full", "fp32", torch.device("cpu")).eval()
    stop = generate.stop_ids(tokenizer, base.generation_config)
    model = answers.AnswerModel(base, stop, SHORT, tokenizer=tokenizer, identity="nano")
    return model, Context(processes.start_processes(config.train))


def row(text: str, reference: str | None = None, line: int = 1) -> Row:
    messages = [{"role": "user", "content": text}]
    messages += [{"role": "assistant", "content": reference}] if reference else []
    return Row(messages, None, "file", line)


WORDS = ("one", "two", "three", "four")
ROWS = [row(f"repeat: {word}", word, i) for i, word in enumerate(WORDS, 1)]


def answered(nano, asked, path, settings=SHORT, rows=None, **options):
    model, context = nano
    model = replace(model, settings=settings, batch_size=rows)
    questions = map(answers.make_question, asked)
    answers.answer_all(model, questions, Predictions(path), context, **options)
    return list(read_records(path))


def test_every_row_has_its_line_in_order_also_those_that_cannot_be_asked(nano, tmp_path):
    bad = BadRow("file", 3, "not valid JSON", "{...")
    rows = [ROWS[0], row("x " * 600, "y"), bad, ROWS[1], row("no reference")]
    found = answered(nano, rows, tmp_path / "predictions.jsonl", rows=2)
    assert [line["index"] for line in found] == [0, 1, 2, 3, 4]
    assert [line["finish_reason"] == "error" for line in found] == [0, 1, 1, 0, 0]
    assert found[1]["error"].endswith(
        "the model takes 512 including the answer: shorten the prompt"
    )
    assert (found[2]["row"], found[2]["error"]) == ("file:3", "not valid JSON")
    assert found[0]["row"] == "file:1"
    assert found[0]["reference"] == "one"
    assert "reference" not in found[4]
    assert found[0]["prompt_tokens"] > 5
    assert found[0]["completion_tokens"] > 0


def test_a_row_is_asked_with_its_variables_and_as_its_parts_say(nano):
    model, _ = nano
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "nano/model")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
        "{% endfor %}{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
        "{{ '(think)' if enable_thinking is not false and add_generation_prompt }}"
    )
    model = replace(model, tokenizer=tokenizer)
    variables = {"enable_thinking": False}
    plain, quiet = (
        answers.make_question(replace(ROWS[0], template_kwargs=given))
        for given in (None, variables)
    )
    prompts = [str(tokenizer.decode(model.render_prompt(each))) for each in (plain, quiet)]
    assert prompts[0] == prompts[1] + "(think)"
    assert model.key(plain, 0) != model.key(quiet, 0)
    parts = [{"type": "text", "text": text} for text in ("repeat", ": one")]
    asked = [{"role": "user", "content": parts}, {"role": "assistant", "content": parts[1:]}]
    question = answers.make_question(Row(asked, None, "file", 1))
    assert question.fields == {"row": "file:1", "prompt": "repeat: one", "reference": ": one"}
    assert model.render_prompt(question) == model.render_prompt(plain)


def test_windows_and_batches_change_nothing(nano, tmp_path, monkeypatch):
    rows = ROWS * 3
    once = answered(nano, rows, tmp_path / "once.jsonl", rows=100)
    assert len({line["answer"] for line in once}) > 1
    monkeypatch.setattr(answers, "WINDOW", 5)
    assert answered(nano, rows, tmp_path / "windows.jsonl", rows=2) == once


def test_what_is_drawn_follows_the_number_of_the_example(nano, tmp_path, monkeypatch):
    drawn = Generation(max_new_tokens=8, temperature=1.5)
    once = answered(nano, [ROWS[0]] * 6, tmp_path / "once.jsonl", drawn)
    assert len({line["answer"] for line in once}) > 2
    monkeypatch.setattr(answers, "WINDOW", 2)
    assert answered(nano, [ROWS[0]] * 6, tmp_path / "windows.jsonl", drawn) == once


def test_a_stop_between_batches_loses_nothing_that_was_answered(nano, tmp_path):
    path, calls = tmp_path / "predictions.jsonl", []

    def stop_at_the_third() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise UserError("stopped")

    with pytest.raises(UserError, match="stopped"):
        answered(nano, ROWS * 2, path, rows=2, before_batch=stop_at_the_third)
    assert len(list(read_records(path))) == 4
    calls[:] = [1] * 9  # not again
    found = answered(nano, ROWS * 2, path, rows=2, before_batch=lambda: calls.append(1))
    assert len(calls) == 9 + 2
    assert found == answered(nano, ROWS * 2, tmp_path / "whole.jsonl")


def written(path, pairs, groups=""):
    with path.open("w") as file:
        for i, (answer, reference) in enumerate(pairs):
            reported = {"index": i, "key": key_of(i), "prompt": "", "answer": answer}
            reported |= {"group": groups[i % len(groups)]} if groups else {}
            file.write(json.dumps(reported | {"reference": reference}) + "\n")
    return path


def test_scores_count_what_failed(nano, tmp_path):
    pairs = [("a", "a"), ("b ", "b"), ("c", "x"), (None, "d")]
    path = written(tmp_path / "predictions.jsonl", pairs)
    found = answers.score_records(read_records(path), ["exact_match"], nano[1].accelerator)
    assert found.tally.values() == {"exact_match": 0.5}
    assert (found.num_examples, found.num_failed) == (4, 1)
    low, high = found.tally.intervals()["exact_match"]
    assert 0 <= low < 0.5 < high <= 1


def test_ranks_together_have_the_scores_of_one(nano, tmp_path, monkeypatch):
    pairs = [("a b c d", "a b c d" if i % 3 else "a c d") for i in range(20)]
    path = written(tmp_path / "predictions.jsonl", pairs, groups="xxxyz")
    names = ["exact_match", "bleu", "rouge_l"]
    whole = answers.score_records(read_records(path), names, nano[1].accelerator).tally.report()
    assert {name: own["num_examples"] for name, own in whole["groups"].items()} == {
        "x": 12,
        "y": 4,
        "z": 4,
    }
    parts: dict[int, list] = {}

    class Ranks:
        """Three ranks, one after another; the last one sees the parts of all, as all would."""

        num_processes = 3

        def __init__(self, rank: int):
            self.process_index, self.calls = rank, 0

        def gather(self, own: list) -> list:
            self.calls += 1
            parts.setdefault(self.calls, []).extend(own)
            return parts[self.calls]

    for rank in range(3):
        ranks = Ranks(rank)
        monkeypatch.setattr(answers, "gather_object", ranks.gather)
        found = answers.score_records(read_records(path), names, ranks)
    assert found.tally.report() == whole


class Quick(answers.AnswerModel):
    """Has prompts without a renderer."""

    def render_prompt(self, question: answers.Question) -> list[int]:
        return [5] * (3 + len(question.fields["reference"]) % 7)


def ask_and_score(nano, folder, number: int, names: list[str]) -> answers.Scores:
    """Answers so many questions with a Quick model, reads them as a resumed run does, and returns
    their scores. Every fourth text is another one."""
    model, context = nano
    named = {"tokenizer": model.tokenizer, "identity": "quick"}
    quick = Quick(model.model, model.stop, SHORT, answers.WINDOW, **named)
    for _ in range(2):
        asked = (
            answers.make_question(row(f"say {i:09d}", f"it is {i // 4:09d}"), None)
            for i in range(number)
        )
        predictions = Predictions(folder / "predictions.jsonl")
        answers.answer_all(quick, asked, predictions, context)
    found = read_records(folder / "predictions.jsonl")
    return answers.score_records(found, names, context.accelerator)


def test_no_question_or_answer_stays_in_memory(nano, tmp_path, monkeypatch):
    """A question or an answer of each example, kept anywhere, would be seen."""
    monkeypatch.setattr(answers, "WINDOW", 50)
    answer = generate.Answer([7, 8], "stop")
    monkeypatch.setattr(
        generate.Decoder, "decode", lambda _, prompts, **options: [answer] * len(prompts)
    )

    def peak(number: int) -> int:
        (tmp_path / str(number)).mkdir()
        tracemalloc.start()
        try:
            found = ask_and_score(nano, tmp_path / str(number), number, ["exact_match"])
            assert found.num_examples == number
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(50)  # what is made once
    assert peak(1400) - peak(200) < 100 * 1200


def test_a_slow_rank_is_reported(monkeypatch):
    class World:
        num_processes = 4

    reported = tiny.Said()
    seconds = [20.0, 61.0, 21.0, 24.0]
    monkeypatch.setattr(answers, "gather_object", lambda _: [(each, 900) for each in seconds])
    answers._warn_of_slow_ranks(20.0, 900, Context(World(), reported))
    [line] = reported.lines
    assert line.startswith("warning: rank 1 took 1 min 01 s for 900 tokens, others 21 s")


def test_waiting_for_others_is_not_counted_as_work(nano, tmp_path, monkeypatch):
    seconds: list[float] = []
    monkeypatch.setattr(answers, "_warn_of_slow_ranks", lambda busy, *_: seconds.append(busy))
    waited = 0.5 * 4
    answered(nano, ROWS, tmp_path / "a.jsonl", rows=1, before_batch=lambda: time.sleep(0.5))
    started = time.perf_counter()
    answered(nano, ROWS, tmp_path / "b.jsonl", rows=1)
    whole = time.perf_counter() - started
    assert 0 < seconds[1] <= whole
    assert seconds[0] < whole + waited / 2


def test_the_reference_of_a_call_is_what_the_template_writes_for_it(shared):
    path = str(shared / "data/tokenizers/qwen2.5-instruct")
    tokenizer = template.prepare_tokenizer(AutoTokenizer.from_pretrained(path))
    call = {"type": "function", "function": {"name": "wait", "arguments": {"seconds": 3}}}
    turns = [
        {"role": "user", "content": "wait"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    found = answers.make_question(Row(turns, None, "file", 1), tokenizer).fields["reference"]
    assert "<tool_call>" in found
    assert '{"name": "wait", "arguments": {"seconds": 3}}' in found


def test_a_column_that_no_row_has_is_reported_before_any_is_rendered(tmp_path, monkeypatch):
    config = load_config(
        ROOT / "configs/nano.yaml",
        ["evaluation.group=mesages", f"data.cache_dir={tmp_path}", "data.max_rows=64"],
    )
    monkeypatch.setattr(workers, "render_rows", None)
    reported = (
        r"nano/test\.jsonl: no column 'mesages', which evaluation\.group names; did you mean messa"
    )
    with pytest.raises(UserError, match=reported):
        cache.prepare(config)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_reference_that_a_metric_cannot_use_is_reported_before_anything_is_answered():
    config = load_config(
        ROOT / "configs/nano.yaml", ["evaluation.metrics=[numeric_match]", "data.max_rows=64"]
    )
    with pytest.raises(UserError, match=r"nano/test\.jsonl:\d+: .*numeric_match"):
        FineTune.refuse_unusable(config, cache.prepare(config))


def test_a_resumed_run_measures_the_base_again_on_other_held_out_rows(tmp_path):
    """Else `before` and `after` would be scores of different rows."""
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation/base.jsonl").touch()
    measured: list[str] = []
    log = SimpleNamespace(folder=tmp_path, optional=lambda _: nullcontext())
    engine: Any = SimpleNamespace(folder=tmp_path, digest=str, model=None)
    for rows in ("a", "a", "b"):

        def measure(*_: Any, rows: str = rows) -> Results:
            measured.append(rows)
            return Results({"loss": 1.0}, {"metrics": {"loss": 1.0}})

        task: Any = SimpleNamespace(_held_out_rows_sha256=rows, log=log, _measure=measure)
        task.config = SimpleNamespace(evaluation=Evaluation())
        assert FineTune.measure_base(task, engine, "fp32", True).metrics == {"loss": 1.0}
    assert measured == ["a", "b"]
