"""Writes raw files of any known format as one JSONL of normalised rows, with a report."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from sft import cli
from sft.errors import UserError


def add_arguments(parser: cli.Parser) -> None:
    parser.add_argument("--output", type=Path, required=True, help="JSONL to write")


def main(args: Namespace) -> None:
    """Writes `--output`, which must not exist yet."""
    config = cli.configuration(args)
    from sft.data import files
    from sft.runtime.console import facts, make_console

    if args.output.exists():
        raise UserError(f"{args.output} exists already; remove it, or give another OUTPUT")
    report = files.process(config.data, args.output)
    make_console().print(facts(f"Written to {args.output}", report))
