"""Proves a law on a configuration whose model is made small: `resume` or `invariance`."""

from __future__ import annotations

from argparse import Namespace

from sft import cli


def add_arguments(parser: cli.Parser) -> None:
    parser.add_argument("--law", choices=("resume", "invariance"), required=True)
    parser.add_argument("--num-processes", type=int, help="default: as configured, or by devices")


def main(args: Namespace) -> None:
    """Runs the proof and prints a table. Raises VerificationError if the law does not hold."""
    config = cli.run_configuration(args)
    from sft.runtime import hardware
    from sft.runtime.console import make_console
    from sft.verify import laws

    if args.law == "resume":
        world = args.num_processes or config.train.num_processes or 1
        laws.verify_resume(config, world, make_console())
    else:
        world = args.num_processes or hardware.default_num_processes(hardware.detect())
        laws.verify_invariance(config, world, make_console())
