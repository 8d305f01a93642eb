"""A console that takes no text: streams that lose it, and whole trainings that go on."""

from __future__ import annotations

import ast
import io
import json
import logging
import os
import re
import sys
import warnings

import forked
import pytest
from conftest import ROOT, representatives, run
from console_worker import CASES, dead_reader
from hypothesis import given
from hypothesis import strategies as st
from rich.text import Text

from sft.runtime import console, output


@pytest.fixture
def protected(monkeypatch):
    """Returns a function that protects a stream of this descriptor, as standard output."""
    for name, value in (("_outputs", []), ("_warnings", []), ("_runs", [])):
        monkeypatch.setattr(output, name, value)

    def protect(fd: int, *, encoding: str = "utf-8") -> io.TextIOWrapper:
        stream = open(fd, "w", encoding=encoding, closefd=False)  # noqa: SIM115
        return output._protected(stream, fd, "stdout")

    return protect


def test_what_cannot_be_written_is_lost_and_reported_once_on_the_other_stream(protected):
    read, write = os.pipe()
    full, other = protected(os.open("/dev/full", os.O_WRONLY)), protected(write)
    for _ in range(3):
        print("text", file=full)
    print("here", file=other)
    reported = os.read(read, 1000).decode()
    assert reported == (
        "warning: standard output cannot be written: No space left on device; its lines are lost\n"
        "here\n"
    )
    assert output.take_warnings() == [reported.split("\n")[0]]
    assert output.take_warnings() == []


def test_lines_that_are_missing_are_marked_when_there_is_room_again(protected, monkeypatch):
    read, write = os.pipe()
    stream, real = protected(write), os.write
    print("one", file=stream)
    monkeypatch.setattr(os, "write", fail)
    print("two", file=stream)
    monkeypatch.setattr(os, "write", real)
    print("three", file=stream)
    print("four", file=stream)
    assert os.read(read, 1000).decode() == (
        "one\n\n[lines are missing here: No space left on device]\nthree\nfour\n"
    )


def fail(*_):
    raise OSError(28, os.strerror(28))


def test_a_run_does_not_wait_for_a_reader_that_has_stopped_reading(protected, monkeypatch):
    monkeypatch.setattr(output, "PATIENCE", 0.05)
    read, write = os.pipe()
    stream = protected(write)
    output.begin_run()
    for number in range(40):
        print(f"{number} " + "x" * 4000, file=stream)  # a pipe takes 64 KiB
    assert os.read(read, 1 << 20).decode().startswith("0 xx")
    print("again", file=stream)
    assert os.read(read, 1 << 20).decode() == (
        "\n[lines are missing here: its reader has stopped reading]\nagain\n"
    )


def test_a_table_that_is_read_slowly_is_waited_for(protected):
    """A pager such as `less` reads when its user scrolls."""
    read, write = os.pipe()
    stream, text = protected(write), "y" * 300_000
    reader = os.fork()
    if reader == 0:
        os.close(write)
        number = 0
        while piece := os.read(read, 1000):
            number += len(piece)
        os._exit(int(number != len(text) + 1))
    print(text, file=stream)
    os.close(write)
    os.close(read)
    assert os.waitstatus_to_exitcode(os.waitpid(reader, 0)[1]) == 0


def test_a_stream_that_another_process_made_non_blocking_takes_all(protected):
    read, write = os.pipe()
    os.set_blocking(write, False)
    stream = protected(write)
    reader = os.fork()
    if reader == 0:
        os.close(write)
        number = 0
        while piece := os.read(read, 10_000):
            number += len(piece)
        os._exit(int(number != 200_001))
    print("z" * 200_000, file=stream)
    os.close(write)
    os.close(read)
    assert os.waitstatus_to_exitcode(os.waitpid(reader, 0)[1]) == 0


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_text_that_the_encoding_lacks_is_written_as_escapes(protected, encoding):
    read, write = os.pipe()
    print("漢 \udc80", file=protected(write, encoding=encoding))
    shown = os.read(read, 100).decode()
    assert shown == ("漢 \\udc80\n" if encoding == "utf-8" else "\\u6f22 \\udc80\n")


# --- control characters --------------------------------------------------------------------------

HOSTILE = "a\x1b[2J\x1b]0;title\x07\r\x08b\x9bc\u202ed\u2066[/x][bold]\x7f"


@given(st.text(st.characters(codec="utf-8") | st.sampled_from(HOSTILE), max_size=30))
def test_no_text_steers_the_terminal(text):
    shown = io.StringIO()
    printer = console.make_console(shown)
    printer.print(text)
    printer.print(Text(text), Text.assemble((text, "red")))
    printer.print(console.facts(text, [(text, text), (text, Text(text))]))
    printer.print(console.table(text, (text, text), [(text, Text(text))], lines=True))
    assert not output.CONTROL.search(shown.getvalue())


def test_a_terminal_gets_only_the_programs_own_codes(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    shown = io.StringIO()
    printer = console._Console(file=shown, force_terminal=True, markup=False, width=100)
    printer.print(HOSTILE, Text(HOSTILE, "red"), console.facts(HOSTILE, [(HOSTILE, HOSTILE)]))
    with console.bar(printer, f"fetch {HOSTILE}", 3) as advance:
        advance(1, f"loss {HOSTILE}")
    own = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", shown.getvalue())
    assert not output.CONTROL.search(own)
    assert "\x1b[2J" not in shown.getvalue()
    assert "\x1b[31m" in shown.getvalue()
    assert "[/x][bold]" in own


def test_what_is_shown_is_visible(capsys):
    output.show(HOSTILE)
    output.show(HOSTILE, error=True, end="")
    for text in capsys.readouterr():
        assert text.startswith("a\\x1b[2J\\x1b]0;title\\x07\\r\\x08b\\x9bc\\u202ed\\u2066[/x]")


def test_what_libraries_log_and_warn_of_steers_no_terminal_and_holds_no_secret(monkeypatch):
    """A model's files name keys that a library repeats in a warning, and addresses have tokens."""
    monkeypatch.setattr(logging, "_logRecordFactory", logging.LogRecord)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setenv("HF_TOKEN", "hf_12345678")
    output.cover_libraries()
    stream = io.StringIO()
    handler, logger = logging.StreamHandler(stream), logging.getLogger("a.library")
    monkeypatch.setattr(logger, "handlers", [handler])
    hostile = "\x1b[31m hf_12345678 https://x.org/a?token=mine"
    logger.warning("unknown keys %s", {hostile: 1})
    logger.warning(hostile + " 100 %")
    stream.write(warnings.formatwarning(UserWarning(hostile), UserWarning, "a.py", 1, line=""))
    shown = stream.getvalue()
    assert shown.count("<HF_TOKEN>") == shown.count("token=<hidden>") == 3
    assert "\x1b" not in shown
    assert shown.endswith("\n")


@pytest.mark.parametrize(
    "path", sorted((ROOT / "sft").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_only_one_function_prints(path):
    """Everything else goes through it, or through a console that shows control characters."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    printing = {"print", "input", "sys.stdout.write", "sys.stderr.write", "Console"}
    found = [ast.unparse(call.func) for call in calls if ast.unparse(call.func) in printing]
    assert found == (["print"] if path.name == "output.py" else [])


# --- commands whose result is what they print ----------------------------------------------------


def shell(line: str) -> tuple[int, str]:
    done = run("bash", "-c", f'sft() {{ {sys.executable} -m sft "$@"; }}; {line}')
    return done.returncode, done.stdout + done.stderr


def test_a_command_whose_result_is_lost_ends_with_1():
    code, reported = shell("sft --help >/dev/full")
    assert (code, reported.count("warning: standard output cannot be written")) == (1, 1)
    assert "Traceback" not in reported


def test_a_command_whose_reader_has_seen_enough_ends_with_0_and_says_nothing():
    assert shell("set -o pipefail; sft --help | true") == (0, "")


@pytest.mark.parametrize("closed", ["2>&-", "1>&-", "0<&- 1>&- 2>&-"])
def test_a_closed_stream_is_no_error_and_no_other_file_gets_its_number(closed, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\nfrom sft import cli\n"
        f"def main():\n    file = open({str(tmp_path / 'file')!r}, 'w')\n"
        "    os.write(1, b'out'); os.write(2, b'err')\n    file.write(str(file.fileno() > 2))\n"
        "    print('text'); print('text', file=sys.stderr)\n"
        "cli.run(main)\n"
    )
    done = run("bash", "-c", f"{sys.executable} {script} {closed}")
    assert done.returncode == 0
    assert (tmp_path / "file").read_text() == "True"


ROWS = ROOT / "nano/train.jsonl"

# --- trainings -----------------------------------------------------------------------------------

FEW = [(1, "both on a full disk"), (1, "a reader that goes"), (1, "all closed")]
FEW += [(2, "a reader that goes")]
BRIEF = ["data.max_rows=60", "data.eval_path=null", "data.eval_fraction=0.1"]
BRIEF += ["evaluation.num_examples=2"]
BRIEF += ["evaluation.max_new_tokens=4", "train.max_steps=2", "train.global_batch=4"]
BRIEF += ["train.save_steps=1", "train.log_steps=1", "tuning.mode=lora"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "case"),
    representatives(
        [
            *((1, case) for case in CASES),
            *((2, case) for case in ("a reader that goes", "all closed")),
        ],
        FEW,
    ),
)
def test_a_training_goes_on_without_its_console(tmp_path, world, case):
    command = [str(ROOT / "tests/support/console_worker.py"), case, *BRIEF]
    process = forked.start(world, [*command, f"train.output_dir={tmp_path}/run"], tmp_path / "log")
    process.join()
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("finished", 0)
    assert world > 1 or process.exitcode == 0
    assert (tmp_path / "run/final_checkpoint/MANIFEST.json").exists()
    log = (tmp_path / "run/training.log").read_text()
    assert "step     2/2" in log
    warned = [line for line in log.splitlines() if "cannot be written" in line]
    assert len(warned) == len(set(warned))
    expected = {"both on a full disk": 2, "a reader that is gone": 2, "a reader that goes": 2}
    assert len(warned) == expected.get(case, int("closed" not in case))


@pytest.mark.thorough("two ranks whose reader goes, forked")
@pytest.mark.slow
def test_a_launched_training_goes_on_when_its_reader_goes(tmp_path):
    words = " ".join([*BRIEF, f"train.output_dir={tmp_path}/run"])
    line = f"set -o pipefail; export NUM_PROCESSES=2; sft train-distributed {words} 2>&1 | head -1"
    code, _ = shell(line)
    assert code == 0
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "finished"


POOR = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}


@pytest.mark.thorough("ASCII consoles and names of all characters in other tests here")
@pytest.mark.slow
def test_a_training_in_a_poor_environment(tmp_path):
    """Two processes with 64 open files, no home, an ASCII console, and names of all characters."""
    folder = tmp_path / "a b ü漢$(id);'\"x"
    folder.mkdir()
    rows = folder / "ro ws\nü.jsonl"
    rows.write_text("".join(ROWS.read_text().splitlines(True)[:60]))
    words = [f"data.train_path={rows}", f"data.cache_dir={folder}/cache", *BRIEF[1:]]
    command = [sys.executable, "-m", "sft", "train-distributed", *words]
    shell = ["bash", "-c", 'ulimit -n 64; unset HOME; exec "$@"', "-"]
    done = run(*shell, *command, f"train.output_dir={folder}/run", NUM_PROCESSES="2", **POOR)
    assert done.returncode == 0, done.stdout + done.stderr
    status = json.loads((folder / "run/status.json").read_text("utf-8"))
    assert (status["state"], status["exit_code"]) == ("finished", 0)
    assert done.stdout.isascii()
    assert "\\u6f22" in done.stdout
    assert "漢" in (folder / "run/training.log").read_text("utf-8")


def test_dead_reader_is_one():
    with pytest.raises(BrokenPipeError):
        os.write(dead_reader(), b"x")
