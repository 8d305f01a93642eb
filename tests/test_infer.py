"""A conversation in the terminal, and answers to files by real processes that are killed."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import forked
import pytest
from conftest import ROOT

from sft.config.load import parse_generation
from sft.errors import ConfigError, UserError
from sft.evaluate import generate
from sft.runtime.log import Log
from sft.serve import chat
from sft.serve.connector import AccelerateConnector

MODEL = {"model_name": str(ROOT / "nano/model"), "mixed_precision": "no", "log": Log(None)}


@pytest.fixture(scope="module")
def connector() -> AccelerateConnector:
    return AccelerateConnector(**MODEL)


def talk(connector, *lines: str, system: str | None = None) -> tuple[chat.Conversation, str]:
    reported: list[str] = []
    conversation = chat.Conversation(connector, reported.append, system, max_new_tokens=8)
    for line in lines:
        assert conversation.handle(line), line
    return conversation, "".join(reported)


def test_a_conversation_has_a_history_that_the_model_sees(connector):
    conversation, reported = talk(connector, "repeat: one", "and again", system="be brief")
    assert [m["role"] for m in conversation.messages] == ["system"] + ["user", "assistant"] * 2
    asked = conversation.messages[:-1]
    answer = connector.complete(asked, max_new_tokens=8).choices[0].message.content
    assert conversation.messages[-1]["content"] == answer
    assert answer in reported


def test_commands(connector, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    conversation, reported = talk(connector, "/save", "hi", "/save", "/save other.jsonl", "/rest")
    assert reported.startswith("there is no answer to save yet\n")
    assert reported.endswith("unknown command /rest; /help lists them\n")
    saved = json.loads(Path("conversations.jsonl").read_text())
    assert (
        saved == {"messages": conversation.messages} == json.loads(Path("other.jsonl").read_text())
    )
    conversation.handle("/reset")
    assert conversation.messages == []
    conversation.handle("/system be kind")
    assert conversation.messages == [{"role": "system", "content": "be kind"}]
    assert not any(map(conversation.handle, ("", "/quit", "  ")))
    _, reported = talk(connector, "hi", "/save none/x.jsonl", "/help")
    assert "cannot write none/x.jsonl: No such file or directory" in reported
    assert all(command in reported for command in ("/reset", "/system", "/save"))


def test_a_conversation_that_is_too_long_says_so_and_goes_on(connector):
    conversation, reported = talk(connector, "long " * 400, "hi")
    assert "the model takes 512" in reported
    assert "/reset" in reported
    assert len(conversation.messages) == 2


def test_what_a_model_says_does_not_steer_the_terminal(connector, monkeypatch):
    def escaping(decoder, prompts, on_tokens):
        ids = connector.load_model_once().tokenizer("a\x1b[2Jb").input_ids
        for token in ids:
            on_tokens([token])
        return [generate.Answer(ids, "stop")]

    monkeypatch.setattr(generate.Decoder, "decode", escaping)
    assert "\x1b" not in talk(connector, "hi")[1]


def test_words_of_a_command_line_are_settings():
    assert parse_generation(["generation.top_k=3", "generation.temperature=0.5"]).top_k == 3
    for words, reported in (
        (["generation.top_p=2"], r"generation\.top_p: expected number > 0, ≤ 1, found 2"),
        (["train.seed=1"], r"train: expected generation\.key=value"),
        (["temperature=1"], "expected section.key=value"),
    ):
        with pytest.raises(ConfigError, match=reported):
            parse_generation(words)


# --- files ---------------------------------------------------------------------------------------


def rows_file(folder: Path, number: int = 40) -> Path:
    path = folder / "asked.jsonl"
    rows = [{"prompt": f"repeat: {'word ' * (i % 7 + 1)}"} for i in range(number)]
    lines = [json.dumps(row) for row in rows]
    lines[5] = "{"
    path.write_text("\n".join(lines) + "\n")
    return path


def command(source: Path, output: Path, *more: str) -> list[str]:
    fixed = ["scripts/infer_batch.py", "--model", "nano/model", "--input", str(source)]
    return [*fixed, "--output", str(output), "--batch-size", "2", *more]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, Path]:
    """(rows, answers to them by one process)."""
    folder = tmp_path_factory.mktemp("whole")
    source, output = rows_file(folder), folder / "answers.jsonl"
    status = folder / "answers.jsonl.run"
    settings = {"max_new_tokens": 16}
    chat.answer_file(str(source), output, status, MODEL | {"batch_size": 8}, settings)
    assert json.loads((status / "status.json").read_text())["state"] == "finished"
    return source, output


def test_a_file_has_an_answer_to_every_row(whole):
    found = [json.loads(line) for line in whole[1].read_text().splitlines()]
    assert [line["index"] for line in found] == list(range(40))
    assert [line["row"] for line in found] == [f"{whole[0]}:{i}" for i in range(1, 41)]
    assert [i for i, line in enumerate(found) if line["answer"] is None] == [5]
    assert "not valid JSON" in found[5]["error"]


@pytest.mark.slow
@pytest.mark.parametrize(("world", "how"), [(1, signal.SIGKILL), (2, signal.SIGTERM)])
def test_a_run_that_is_stopped_goes_on_where_it_was(whole, tmp_path, monkeypatch, world, how):
    monkeypatch.chdir(ROOT)
    source, expected = whole
    output, log = tmp_path / "answers.jsonl", tmp_path / "log"
    words = command(source, output, "generation.max_new_tokens=16", "--precision", "fp32")
    run = forked.start(world, words, log)
    deadline = time.monotonic() + 120
    while len(lines(output)) < 6:
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.002)
    for pid in forked.ranks(log) or [run.pid]:
        os.kill(pid, how)
    run.join()
    before = lines(output)
    assert 6 <= len(before) < 40, "it was stopped in the middle"
    if how == signal.SIGTERM:
        assert run.exitcode
        assert "run again to go on" in log.read_text()
    forked.start(world, words, log).join()
    kept = {json.loads(line)["index"]: line for line in before}
    after = lines(output)
    assert all(after[index] == line for index, line in kept.items())
    assert output.read_text() == expected.read_text()
    assert "39 of 40 rows" in log.read_text()


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize(
    ("source", "output", "reported"),
    [
        ("none.jsonl", "a.jsonl", "none.jsonl"),
        ("rows.jsonl", "a.txt", "OUTPUT: expected a file that ends in .jsonl, found a.txt"),
        ("rows.jsonl", "folder.jsonl", "expected a file that ends in .jsonl, found folder.jsonl"),
    ],
)
def test_files_that_cannot_be_are_reported_before_a_model_is_loaded(
    tmp_path, monkeypatch, source, output, reported
):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"prompt": "hi"}\n')
    Path("folder.jsonl").mkdir()
    with pytest.raises(UserError, match=reported):
        chat.answer_file(source, Path(output), Path("status"), {"model_name": "none"}, {})
    assert not Path("status").exists()


def test_answers_never_take_the_place_of_what_is_asked(tmp_path):
    source = tmp_path / "rows.jsonl"
    source.write_text('{"prompt": "hi"}\n')
    for asked in (source, tmp_path / "*.jsonl"):
        with pytest.raises(UserError, match="is one of the files of INPUT"):
            chat.answer_file(str(asked), source, tmp_path / "status", MODEL, {})
    with pytest.raises(UserError, match="lies in the folder INPUT"):
        chat.answer_file(str(tmp_path), tmp_path / "a.jsonl", tmp_path / "status", MODEL, {})
    assert source.read_text() == '{"prompt": "hi"}\n'


@pytest.mark.slow
@pytest.mark.parametrize(
    "given", [{"INPUT": "", "OUTPUT": "a.jsonl"}, {"INPUT": "a", "OUTPUT": ""}]
)
def test_a_batch_without_its_files_is_refused(given, run_script):
    words = ["--input", given["INPUT"], "--output", given["OUTPUT"]]
    done = run_script("infer_batch.py", *words)
    assert done.returncode == 2
    assert "required: INPUT=rows.jsonl OUTPUT=answers.jsonl" in done.stderr
    assert "Traceback" not in done.stderr
