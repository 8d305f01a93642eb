"""A model in use: a conversation in the terminal, and answers to all rows of files."""

from __future__ import annotations

import json
import select
import sys
import termios
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.table import Table

from sft.data.files import num_rows, read_all, sources
from sft.errors import Preempted, UserError
from sft.evaluate import answers
from sft.evaluate.predictions import Predictions, read_records
from sft.runtime.console import facts
from sft.runtime.output import visible
from sft.runtime.processes import end_processes
from sft.runtime.watchdog import Guard
from sft.serve.connector import AccelerateConnector

STALL_TIMEOUT = 1800.0  # seconds; the run ends if no process has answered a batch for so long

HELP = """\
/reset          forget the conversation
/system TEXT    start again with this system prompt; /system alone: without one
/save [FILE]    add the conversation to a JSONL file that training can read (conversations.jsonl)
/help           this list
Ctrl-C stops an answer; Ctrl-C twice, /quit or Ctrl-D ends. A pasted text is one message, with all
its lines."""


class Conversation:
    """A conversation with `connector`; lines that begin with a slash are commands."""

    def __init__(
        self,
        connector: AccelerateConnector,
        write: Callable[[str], None],
        system: str | None = None,
        **settings: Any,
    ):
        self.connector, self.write, self.settings = connector, write, settings
        self.restart(system)

    def restart(self, system: str | None) -> None:
        """Forgets all messages; `system` is the new system prompt."""
        self.system = system
        self.messages = [{"role": "system", "content": system}] if system else []

    def handle(self, line: str) -> bool:
        """Answers a line or does what it commands; returns whether the conversation goes on.

        Raises KeyboardInterrupt if Ctrl-C stopped the answer, which is kept as far as it came.
        """
        line = line.strip()
        if not line:
            return True
        if line in ("/quit", "/exit"):
            return False
        command, _, rest = line.partition(" ")
        commands: dict[str, Callable[[str], object]] = {
            "/help": lambda _: self.write(HELP + "\n"),
            "/reset": lambda _: self.restart(self.system),
            "/system": lambda text: self.restart(text.strip() or None),
            "/save": self.save,
        }
        if not line.startswith("/"):
            self.ask(line)
        elif action := commands.get(command):
            action(rest)
        else:
            self.write(f"unknown command {visible(command)}; /help lists them\n")
        return True

    def ask(self, line: str) -> None:
        """Writes the answer to a line, or why there is none."""
        asked = [*self.messages, {"role": "user", "content": line}]
        parts: list[str] = []

        def show(text: str) -> None:
            parts.append(text)
            self.write(visible(text))

        try:
            found = self.connector.complete(asked, show, **self.settings)
        except UserError as error:
            self.write(f"{visible(str(error))} (/reset forgets the conversation)\n")
            return
        except KeyboardInterrupt:
            self.write(" [stopped]\n")
            if answer := "".join(parts):
                self.messages = [*asked, {"role": "assistant", "content": answer}]
            raise
        cut = " [max_new_tokens reached]" if found.finish_reason == "length" else ""
        self.write(f"{cut}\n")
        answer = found.choices[0].message.content or ""
        self.messages = [*asked, {"role": "assistant", "content": answer}]

    def save(self, name: str) -> None:
        """Adds the conversation to the JSONL file of that name."""
        path = Path(name.strip() or "conversations.jsonl")
        if not any(message["role"] == "assistant" for message in self.messages):
            self.write("there is no answer to save yet\n")
            return
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        except OSError as error:
            self.write(f"cannot write {path}: {error.strerror}\n")
            return
        self.write(f"added to {path}\n")


def converse(conversation: Conversation) -> None:
    """Handles what is typed, pasted or piped, until /quit, the end of the input or Ctrl-C twice.

    On a terminal a pasted text is one message, whatever lines it has, and nothing that is left of
    the input reaches the shell.
    """
    if not sys.stdin.isatty():
        for line in sys.stdin:
            if not conversation.handle(line):
                return
        return
    from prompt_toolkit import PromptSession
    from prompt_toolkit.output import create_output

    # The prompt is for the terminal, also where the answers go into a file.
    session: PromptSession[str] = PromptSession(output=create_output(always_prefer_tty=True))
    try:
        with suppress(EOFError, KeyboardInterrupt):
            _handle_typed(conversation, session.prompt)
    finally:
        _discard_typed()


def _handle_typed(conversation: Conversation, read: Callable[[str], str]) -> None:
    """Handles lines until /quit; raises EOFError at Ctrl-D, KeyboardInterrupt at Ctrl-C twice."""
    is_interrupted = False
    while True:
        try:
            if is_interrupted:
                conversation.write("Ctrl-C again ends\n")
            line = read("> ")
            is_interrupted = False
            if not conversation.handle(line):
                return
        except KeyboardInterrupt:
            if is_interrupted:
                raise
            is_interrupted = True


def _discard_typed() -> None:
    """Drops what the terminal has sent and nobody has read, and what follows within 0.1 s."""
    with suppress(termios.error):  # the terminal is gone
        for _ in range(100):
            termios.tcflush(sys.stdin, termios.TCIFLUSH)
            if not select.select([sys.stdin], [], [], 0.1)[0]:
                return


def answer_file(
    source: str, output: Path, folder: Path, model: dict[str, Any], settings: dict[str, Any]
) -> None:
    """Writes the answer to every row of `source` into the JSONL file `output`. Collective.

    `source` is given as data.train_path is. A bad row gets a line with the reason. `folder` holds
    status, lock and heartbeats while it runs. `model`: arguments of AccelerateConnector.
    """
    if output.is_dir() or output.suffix not in (".jsonl", ".ndjson"):
        raise UserError(f"OUTPUT: expected a file that ends in .jsonl, found {output}")
    files = sources(source)  # a missing one is reported before a model is loaded
    if any(not each.on_hub and Path(each.file).resolve() == output.resolve() for each in files):
        raise UserError(f"OUTPUT: {output} is one of the files of INPUT; give another name")
    if Path(source).is_dir() and output.resolve().is_relative_to(Path(source).resolve()):
        raise UserError(f"OUTPUT: {output} lies in the folder INPUT, which is read whole; move it")
    with guarded_model(folder, model, output) as (connector, guard):
        total = num_rows(source)
        connector.answer(_questions(source, guard), Predictions(output), total, **settings)
        if connector.is_main_process:
            connector.log.say(_summarise(output, connector.num_processes))


@contextmanager
def guarded_model(
    folder: Path, model: dict[str, Any], output: Path
) -> Iterator[tuple[AccelerateConnector, Guard]]:
    """Yields a loaded model and its guard in `folder`, for answers into `output`. Collective."""
    with Guard(folder, STALL_TIMEOUT, trains=False) as guard:
        if guard.is_first:
            guard.status.begin()

        def stop_if_asked() -> None:
            """Raises Preempted between two batches, when all answers are on disk."""
            guard.tick()
            if guard.flags()[0]:
                raise Preempted(f"stopped; {output} has what is answered: run again to go on")

        connector = AccelerateConnector(**model, before_batch=stop_if_asked)
        with closing(connector):
            guard.join(connector.accelerator, None)
            connector.load_model_once()
            yield connector, guard
            connector.accelerator.wait_for_everyone()
    end_processes(connector.accelerator)


def _questions(source: str, guard: Guard) -> Iterator[answers.Question]:
    for row in read_all(source, to_answer=True):
        guard.tick()
        yield answers.make_question(row)


def _summarise(output: Path, num_processes: int) -> Table:
    """Returns a table of the numbers of a finished file of predictions."""
    count: Counter[str] = Counter()
    first_error = ""
    for record in read_records(output):
        count[record["finish_reason"]] += 1
        count["prompt_tokens"] += record["prompt_tokens"]
        count["completion_tokens"] += record["completion_tokens"]
        if "error" in record and not first_error:
            first_error = f", such as {visible(record['row'])}: {visible(record['error'])}"
    answered, asked = count["stop"] + count["length"], count["prompt_tokens"]
    rows = [
        ("answered", f"{answered:,} of {answered + count['error']:,} rows"),
        ("cut off", f"{count['length']:,} at generation.max_new_tokens or the model's context"),
        ("failed", f"{count['error']:,}{first_error}"),
        ("tokens", f"{asked:,} of prompts, {count['completion_tokens']:,} of answers"),
        ("processes", str(num_processes)),
        ("results", str(output)),
    ]
    return facts("Answers", rows)
