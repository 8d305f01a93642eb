"""Fine-tunes the model of a configuration; alone or under any launcher of several processes."""

from sft import cli


def main() -> None:
    config = cli.run_configuration(cli.parser(__doc__).parse_args())
    from sft import run  # after the configuration: a mistake in it is told at once

    run.train(config)


if __name__ == "__main__":
    cli.run(main)
