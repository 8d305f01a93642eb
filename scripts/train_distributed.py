"""Trains on several processes, of this machine or of several (docs/LAUNCH.md).

Run plainly, it starts the ranks; run by `accelerate launch`, `torchrun` or `srun`, it is one.
"""

import sys

from sft import cli


def main() -> int | None:
    parser = cli.parser(__doc__)
    parser.add_argument("--requeue-after", type=int, metavar="CODE", help="of srun, in a SLURM job")
    parser.add_argument("--since", type=int, default=0, help="when srun started, seconds")
    args = parser.parse_args()
    config = cli.run_configuration(args)
    from sft.runtime import launcher, slurm

    if args.requeue_after is not None:
        return slurm.requeue(config.train, args.requeue_after, args.since)
    if not launcher.is_rank():
        program = [*launcher.this_program(), *sys.argv[1:]]
        return launcher.launch(config.train, program, trains=True)
    from sft import run

    run.train(config)
    return None


if __name__ == "__main__":
    cli.run(main)
