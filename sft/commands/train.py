"""Fine-tunes the model of a configuration, in this process or as a rank of any launcher."""

from __future__ import annotations

from argparse import Namespace

from sft import cli


def main(args: Namespace) -> None:
    """Trains the model, and writes the run folder."""
    config = cli.run_configuration(args)
    from sft import run  # imported last: an error in the configuration is reported at once

    run.train(config)
