"""Starts a run on several processes, of this machine or of several (docs/LAUNCH.md)."""

from sft import cli, launcher


def main() -> int:
    args = cli.parser(__doc__).parse_intermixed_args()
    train = cli.configuration(args).train
    return launcher.launch(train, ["--config", args.config, *args.overrides])


if __name__ == "__main__":
    cli.run(main)
