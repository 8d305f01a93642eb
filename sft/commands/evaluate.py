"""Measures the held-out loss of a finished run and scores its answers."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from sft import cli


def add_arguments(parser: cli.Parser) -> None:
    parser.add_argument("--run", type=Path, default=Path("outputs/nano"), help="folder of the run")
    parser.add_argument("--name", default="evaluate", help="results go to <run>/evaluation/<name>")
    parser.add_overrides("section")


def main(args: Namespace) -> int | None:
    """Writes the results into the run folder and prints them."""
    from sft.runtime import launcher

    if launcher.has_ranks_to_start():
        return launcher.launch_self(args.run / "evaluation" / args.name)
    from sft import run

    run.evaluate_run(args.run, args.name, args.overrides)
    return None
