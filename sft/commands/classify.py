"""Asks a model for the labels of texts; `--tune` also fine-tunes it, and compares both models."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path

from sft import cli
from sft.config.schema import Config, Train
from sft.errors import UserError


def add_arguments(parser: cli.Parser) -> None:
    parser.add_argument("--model", help="in place of model.name")
    parser.add_argument("--run", type=Path, help="a tuned model: the folder of its run")
    parser.add_argument("--tune", action="store_true", help="fine-tune, classify again, compare")


def main(args: Namespace) -> int:
    """Runs `strategies.classify`; with `--tune`, also trains and classifies with the result."""
    args.overrides += [f"model.name={args.model}"] if args.model else []
    config = cli.configuration(args)
    from sft.runtime import launcher
    from sft.serve.classify import rows

    rows.check_section(config, tune=args.tune)
    if args.tune and args.run:
        raise UserError("RUN is a tuned model: give TUNE=1, or RUN, not both")
    if launcher.has_ranks_to_start():
        rows.split_parts(
            rows.read_examples(config.classify), config.classify
        )  # errors in the rows are reported once
        return _launch(config, args)
    if args.tune and "WORLD_SIZE" in os.environ:
        raise UserError("TUNE=1 starts its processes itself: give NUM_PROCESSES, no launcher")
    if args.tune and config.train.engine != "ddp":
        raise UserError(
            f"TUNE=1 with train.engine={config.train.engine}: expected NUM_PROCESSES=2 or more, "
            "since this process cannot use that engine after it has classified; or set ddp"
        )
    from sft.serve.classify import strategies

    strategies.classify(config, args.run)
    if args.tune:
        from sft import run

        run.train(config)
        strategies.classify(config, Path(config.train.output_dir))
    return 0


def _launch(config: Config, args: Namespace) -> int:
    """Launches each part separately. Returns the exit code of the first part that fails, or 0."""
    from sft.runtime import launcher

    words = ["--config", args.config, *args.overrides]
    tuned, program = Path(config.train.output_dir), ["-m", "sft"]

    def classify(run: Path | None) -> int:
        folder = run / "classify" if run else Path(config.classify.output_dir)
        named = ["--run", str(run)] if run else []
        return launcher.launch(Train(output_dir=str(folder)), [*program, args.verb, *words, *named])

    code = classify(args.run)
    if args.tune:
        code = code or launcher.launch(config.train, [*program, "train", *words], trains=True)
        code = code or classify(tuned)
    return code
