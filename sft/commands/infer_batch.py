"""Answers every row of a file, on one process or many; answers that are written survive a kill."""

from __future__ import annotations

import os
import shutil
from argparse import Namespace
from pathlib import Path

from sft import cli
from sft.config.load import parse_generation
from sft.errors import UserError


def add_arguments(parser: cli.Parser) -> None:
    cli.add_model(parser)
    parser.add_argument("--input", required=True, help="file, folder, glob or hub id of prompts")
    parser.add_argument("--output", required=True, type=Path, help="JSONL file to be written")


def main(args: Namespace) -> int:
    """Writes the answers to `--output`; continues what an earlier attempt began."""
    settings = parse_generation(args.overrides).model_dump()
    for name, value in (("INPUT", args.input), ("OUTPUT", args.output.name)):
        if not value:
            raise UserError(f"{name}: required: INPUT=rows.jsonl OUTPUT=answers.jsonl")
    folder = args.output.with_name(f"{args.output.name}.run")  # its status, while it runs
    from sft.runtime import launcher

    code = 0
    if launcher.has_ranks_to_start():
        code = launcher.launch_self(folder)
    else:
        from sft.serve import chat

        chat.answer_file(args.input, args.output, folder, cli.connector_arguments(args), settings)
    if code == 0 and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        shutil.rmtree(folder, ignore_errors=True)
    return code
