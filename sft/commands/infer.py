"""Talks to a model in the terminal: a run, a checkpoint, a base, an adapter on it, a merged one."""

from __future__ import annotations

import sys
from argparse import Namespace

from sft import cli
from sft.config.load import parse_generation
from sft.errors import UserError


def add_arguments(parser: cli.Parser) -> None:
    cli.add_model(parser)
    parser.add_argument("--prompt", help="answer this and stop")
    parser.add_argument("--system", help="system prompt")


def main(args: Namespace) -> None:
    """Answers `--prompt`, or whatever is typed until an empty line."""
    settings = parse_generation(args.overrides).model_dump()
    from sft.runtime import processes
    from sft.serve import chat
    from sft.serve.connector import AccelerateConnector

    if not processes.leave_process_group():  # of several processes the first one talks
        return
    if args.prompt == "":
        raise UserError('PROMPT is empty; ask something, as in PROMPT="set a timer"')
    connector = AccelerateConnector(**cli.connector_arguments(args))
    connector.load_model_once()
    conversation = chat.Conversation(connector, _write, args.system, **settings)
    if args.prompt is not None:
        conversation.ask(args.prompt)
        return
    print(f"{connector.model_name}: say something; /help lists commands, an empty line ends")
    while conversation.handle(_read()):
        pass


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _read() -> str:
    try:
        return input("> ")
    except EOFError:
        return ""
