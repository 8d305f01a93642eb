"""Tries everything that a configuration needs; exit code 2 if something is not ok."""

from __future__ import annotations

from argparse import Namespace

from sft import cli


def main(args: Namespace) -> int:
    """Prints one line for each check."""
    from sft import check

    return 0 if check.run(cli.config_file(args), args.overrides) else 2
