"""Asks a model for the labels of texts; TUNE fine-tunes it on them, and compares the two."""

import os
from pathlib import Path

from sft import cli
from sft.config.schema import Config
from sft.errors import UserError


def main() -> int | None:
    parser = cli.parser(__doc__)
    parser.add_argument("--model", help="in place of model.name")
    parser.add_argument("--run", type=Path, help="a tuned model: the folder of its run")
    parser.add_argument("--tune", action="store_true", help="fine-tune, classify again, compare")
    args = parser.parse_args()
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
        )  # told once, by no rank
        return _launch(config, ["--config", args.config, *args.overrides], args.run, args.tune)
    if args.tune and "WORLD_SIZE" in os.environ:
        raise UserError("TUNE=1 starts its processes itself: give NUM_PROCESSES, no launcher")
    if args.tune and config.train.engine != "ddp":
        raise UserError(
            f"TUNE=1 with train.engine={config.train.engine}: expected NUM_PROCESSES=2 or more, "
            "since a process that has answered cannot become one of that engine; or set ddp"
        )
    from sft.serve.classify import strategies

    strategies.classify(config, args.run)
    if args.tune:
        from sft import run

        run.train(config)
        strategies.classify(config, Path(config.train.output_dir))
    return None


def _launch(config: Config, own: list[str], run: Path | None, tune: bool) -> int:
    """The same, each part a launch of its own."""
    from sft.config.schema import Train
    from sft.runtime import launcher

    def classify(run: Path | None) -> int:
        folder = run / "classify" if run else Path(config.classify.output_dir)
        named = ["--run", str(run)] if run else []
        program = [*launcher.this_program(), *own, *named]
        return launcher.launch(Train(output_dir=str(folder)), program)

    code = classify(run)
    if tune:
        code = code or launcher.launch(
            config.train, [str(Path(__file__).with_name("train.py")), *own], trains=True
        )
        code = code or classify(Path(config.train.output_dir))
    return code


if __name__ == "__main__":
    cli.run(main)
