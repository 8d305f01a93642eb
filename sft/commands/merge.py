"""Merges the adapter of a finished run into its base, and proves the result."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from sft import cli
from sft.errors import UserError


def add_arguments(parser: cli.Parser) -> None:
    parser.add_argument("--run", type=Path, help="folder of the run")
    parser.add_argument("--output", type=Path, help="default: <run>/merged")
    parser.add_argument("--test", type=Path, metavar="FOLDER", help="only prove this merged model")
    parser.add_argument("--dtype", choices=["fp16", "bf16", "fp32"], default="bf16")
    parser.add_argument("--base", choices=["original", "dequantised"], help="weights to merge into")
    parser.add_argument("--gguf", type=Path, help="folder of llama.cpp: make a GGUF file as well")
    parser.add_overrides("section")


def main(args: Namespace) -> None:
    """Makes the merge (with `--test`: only its proof), and the GGUF file if requested."""
    if args.verb == "merge-test" and args.test is None:
        raise UserError("MERGED: required: MERGED=folder (with the command `sft`: --test FOLDER)")
    from sft.runtime.console import make_console
    from sft.serve import gguf, merge

    say = make_console().print
    if args.gguf:
        gguf.find_converter(args.gguf)
    if args.test:
        folder = args.test
        report = merge.retest(folder, say, args.run, args.base, args.overrides)
    else:
        run = args.run or Path("outputs/nano")
        folder = args.output or run / "merged"
        base = args.base or "original"
        report = merge.merge(run, folder, args.dtype, say, base, args.overrides)
    say(f"merged model, proven to be the one that was trained: {folder}")
    if args.gguf:
        say(f"GGUF: {gguf.convert(folder, report['dtype'], args.gguf)}")
