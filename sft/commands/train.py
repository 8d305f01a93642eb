"""Verbs that fine-tune the model of a configuration and write its run folder."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from sft import cli
from sft.errors import UserError
from sft.runtime import launcher, slurm


def train(args: Namespace) -> None:
    """Trains in this process, or as a rank of any launcher."""
    if launcher.has_ranks_to_start():
        raise UserError(
            "NUM_PROCESSES and NUM_MACHINES: "
            f"`{args.verb}` is one process; use train-distributed, "
            "train-fsdp or train-deepspeed, or unset them"
        )
    config = cli.run_configuration(args)
    launcher.check_launch(config.train)
    _train(config)


def train_distributed_options(parser: cli.Parser) -> None:
    parser.add_argument("--if-asked", action="store_true", help="only if NUM_PROCESSES is set")
    parser.add_argument("--requeue-after", type=int, metavar="CODE", help="of srun, in a SLURM job")
    parser.add_argument("--since", help="without effect; in job scripts of earlier versions")


def train_distributed(args: Namespace) -> int | None:
    """Trains on several processes, of this machine or of several, and returns the exit code.

    It starts the ranks; run by `accelerate launch`, `torchrun` or `srun`, it is one of them.
    """
    config = cli.run_configuration(args)
    if args.requeue_after is not None:
        return slurm.requeue(config.train, args.requeue_after)
    if launcher.has_ranks_to_start() or not (args.if_asked or launcher.is_rank()):
        return launcher.launch(config.train, launcher.this_command(), trains=True)
    launcher.check_launch(config.train)
    _train(config)
    return None


def _train(config: Any) -> None:
    """Trains in this process; imports come last, so that errors before are reported at once."""
    from sft import run
    from sft.verify import share

    run.train(share.with_share(config))
