"""Compares the predictions of two runs on the same examples: better, worse or no difference."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from sft import cli


def add_arguments(parser: cli.Parser) -> None:
    run = "folder of a run, or its predictions.jsonl"
    parser.add_argument("--a", type=Path, required=True, help=run)
    parser.add_argument("--b", type=Path, required=True, help=run)
    parser.add_argument("--metric", help="'rouge_l,bleu' (default: evaluation.metrics of both)")
    parser.add_argument("--show", type=int, default=5, help="examples shown side by side")
    parser.add_argument("--json", type=Path, help="where to write everything")


def main(args: Namespace) -> None:
    """Prints the differences, and examples on which the two differ most."""
    from sft.evaluate import compare
    from sft.runtime.console import make_console

    names, labels = compare.agreed_metrics(args.a, args.b)
    if args.metric:
        names = args.metric.replace(",", " ").split()
    found, console = compare.compare(args.a, args.b, names, labels), make_console()
    title = f"B against A on {found.num_examples:,} examples"
    console.print(compare.difference_table(title, found.differences, "A", "B"))
    console.print(compare.wins_table(found))
    if found.differing and args.show > 0:
        console.print(compare.examples_table(found, args.show))
    if args.json:
        cli.write_json(args.json, compare.comparison_json(found))
        console.print(f"all of it: {args.json}")
