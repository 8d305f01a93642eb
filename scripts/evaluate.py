"""Held-out loss and exact match of a finished run, with overrides (another file, more examples)."""

import argparse
from pathlib import Path

from sft import cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("outputs/nano"), help="folder of the run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_args()
    from sft import run

    run.evaluate_run(args.run, args.overrides)


if __name__ == "__main__":
    cli.run(main)
