"""Talks to the tuned model of a finished run: one --prompt, or a conversation in the terminal."""

import argparse
from pathlib import Path

from sft import cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("outputs/nano"), help="folder of the run")
    parser.add_argument("--prompt", help="answer this and stop")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_args()
    from sft import run
    from sft.log import visible

    answer = run.speaker(args.run, args.overrides)
    if args.prompt is not None:
        print(visible(answer(args.prompt)))
        return
    print(f"{args.run}: one question a line; an empty line ends")
    while question := _ask():
        print(visible(answer(question)))


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


if __name__ == "__main__":
    cli.run(main)
