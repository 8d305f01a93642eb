"""Starts a run on several processes, of this machine or of several (docs/LAUNCH.md)."""

from sft import cli
from sft.runtime import launcher, slurm


def main() -> int:
    parser = cli.parser(__doc__)
    parser.add_argument("--requeue-after", type=int, metavar="CODE", help="of srun, in a SLURM job")
    parser.add_argument("--since", type=int, default=0, help="when srun started, seconds")
    args = parser.parse_args()
    train = cli.run_configuration(args).train
    if args.requeue_after is not None:
        return slurm.requeue(train, args.requeue_after, args.since)
    return launcher.launch(train, ["--config", args.config, *args.overrides])


if __name__ == "__main__":
    cli.run(main)
