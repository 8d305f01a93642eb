"""A conversation in the terminal, and answers to files by real processes that are killed."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import forked
import pytest
from conftest import ROOT, clean_environment

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
    assert not any(map(conversation.handle, ("/quit", "/exit ")))
    assert all(map(conversation.handle, ("", "  ", "\n")))  # an empty line is no end
    assert conversation.messages == [{"role": "system", "content": "be kind"}]
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


# --- at a terminal -------------------------------------------------------------------------------


PROMPT = "\x1b[?2004h"  # with which the program asks for marks around what is pasted


class Terminal:
    """The other end of a terminal: what its user types and sees."""

    def __init__(self) -> None:
        self.end, self._inner = pty.openpty()
        self.name = os.ttyname(self._inner)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self.end, text.encode())

    def paste(self, text: str) -> None:
        """Pastes as terminals do where the program has asked for it (bracketed paste)."""
        self.type(f"\x1b[200~{text}\x1b[201~")

    def see(self, text: str, seconds: float = 60) -> None:
        """Returns when `text` appears after all that was seen before."""
        deadline = time.monotonic() + seconds
        while text not in self.shown:
            assert time.monotonic() < deadline, (text, self.shown)
            if select.select([self.end], [], [], 0.1)[0]:
                self.shown += os.read(self.end, 4096).decode(errors="replace")
        self.shown = self.shown.partition(text)[2]


@pytest.fixture
def terminal(tmp_path) -> Iterator[Terminal]:
    made = Terminal()
    worker = str(ROOT / "tests/support/chat_worker.py")
    process = forked.start(1, [worker, made.name], tmp_path / "log")
    try:
        made.see("begin")
        made.see(PROMPT)
        yield made
        process.join(30)
    finally:
        process.kill()
    assert process.exitcode == 0, (tmp_path / "log").read_text() + made.shown


def test_a_pasted_text_is_one_message_whatever_lines_it_has(terminal):
    terminal.paste("one\n\n/quit\nrm -rf x\n")
    terminal.type("\r")
    terminal.see(json.dumps(["one\n\n/quit\nrm -rf x"]))
    terminal.type("\r\r")
    terminal.type("two\r")
    terminal.see('"two"]')
    terminal.type("/quit\r")
    terminal.see("end")


def test_ctrl_c_stops_the_answer_and_the_history_survives(terminal):
    terminal.type("one\r")
    terminal.see('["one"]')
    terminal.type("slow\r")
    terminal.see("...")
    terminal.type("\x03")
    terminal.see("[stopped]")
    terminal.see("Ctrl-C again ends")
    terminal.see(PROMPT)
    terminal.type("three\r")
    terminal.see('"[\\"one\\"]", "slow", ')  # what the model sees of the conversation so far
    terminal.see('"three"]')
    terminal.type("\x1b[A\r")  # the arrow up: the line before
    terminal.see('"three"]')
    terminal.see(PROMPT)
    terminal.type("\x03")
    terminal.see("Ctrl-C again ends")
    terminal.see(PROMPT)
    terminal.type("\x03")
    terminal.see("end\r\n")


def test_the_end_of_the_input_ends(terminal):
    terminal.type("\x04")
    terminal.see("end")


@contextmanager
def shell(terminal: Terminal) -> Iterator[None]:
    """A shell at a terminal that does not mark what is pasted."""
    prompt = {"PS1": "$" + " ", "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
    streams: Any = dict.fromkeys(("stdin", "stdout", "stderr"), terminal._inner)
    command = ["setsid", "--ctty", "bash", "--norc", "--noediting", "-i"]
    process = subprocess.Popen(command, env=clean_environment(**prompt), cwd=ROOT, **streams)
    try:
        yield
    finally:
        process.kill()
        process.wait()


@pytest.mark.thorough("the same shell gets Ctrl-C")
@pytest.mark.slow
def test_the_rest_of_a_paste_is_not_run_by_the_shell(tmp_path):
    """With the real program, in a real shell."""
    made = Terminal()
    model = f"{sys.executable} -m sft infer --model nano/model generation.max_new_tokens=2"
    with shell(made):
        made.type(f"{model}\n")
        made.see("/quit or Ctrl-D ends")
        made.see(PROMPT)
        made.type(f"one\n\ntwo\n/quit\ntouch {tmp_path}/executed\n\ntouch {tmp_path}/executed\n")
        made.see("$ ")
        made.type("echo $((6 * 7))\n")
        made.see("42")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_ctrl_c_through_make_stops_the_answer_and_twice_ends():
    made = Terminal()
    endless = "generation.max_new_tokens=480 generation.temperature=100"
    with shell(made):
        made.type(f"make infer MODEL=nano/model ARGS='{endless}'\n")
        made.see("/quit or Ctrl-D ends")
        for _ in range(2):
            made.see(PROMPT)
            made.type("a story\r")
            made.see("\x1b[?2004l")  # the answer begins
            time.sleep(0.3)
            made.type("\x03")
            made.see("[stopped]")
            made.see("Ctrl-C again ends")
        made.see(PROMPT)
        made.type("\x03")
        made.see("$ ")
        made.type("echo $((6 * 7))\n")
        seen = made.shown
        made.see("42")
    assert "Traceback" not in seen + made.shown


@pytest.mark.slow
def test_ctrl_c_while_modules_are_imported_prints_no_traceback():
    command = [sys.executable, "-m", "sft", "infer", "--model", "nano/model"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, env=clean_environment())
    while "pydantic_core" not in Path(f"/proc/{process.pid}/maps").read_text():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, reported = process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGINT, 130)
    assert b"Traceback" not in reported


def test_lines_of_a_pipe_are_answered_until_its_end(connector, monkeypatch, capsys):
    read, write = os.pipe()
    os.write(write, b"hi\n\n\nagain \xff\n")
    os.close(write)
    monkeypatch.setattr(sys, "stdin", open(read, errors="replace"))  # noqa: SIM115
    conversation = chat.Conversation(connector, lambda _: None, max_new_tokens=2)
    chat.converse(conversation)
    asked = [each["content"] for each in conversation.messages if each["role"] == "user"]
    assert asked == ["hi", "again \ufffd"]


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
