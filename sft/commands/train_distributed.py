"""Trains on several processes, of this machine or of several (docs/LAUNCH.md).

It starts the ranks; run by `accelerate launch`, `torchrun` or `srun`, it is one of them.
"""

from __future__ import annotations

import sys
from argparse import Namespace

from sft import cli


def add_arguments(parser: cli.Parser) -> None:
    parser.add_argument("--if-asked", action="store_true", help="only if NUM_PROCESSES is set")
    parser.add_argument("--requeue-after", type=int, metavar="CODE", help="of srun, in a SLURM job")
    parser.add_argument("--since", type=int, default=0, help="when srun started, seconds")


def main(args: Namespace) -> int | None:
    """Returns the exit code of the run."""
    config = cli.run_configuration(args)
    from sft.runtime import launcher, slurm

    if args.requeue_after is not None:
        return slurm.requeue(config.train, args.requeue_after, args.since)
    if launcher.has_ranks_to_start() or not (args.if_asked or launcher.is_rank()):
        program = [*launcher.this_program(), *sys.argv[1:]]
        return launcher.launch(config.train, program, trains=True)
    from sft import run

    run.train(config)
    return None
