"""Raw files of any known format -> one JSONL of normalised rows, with a report."""

from pathlib import Path

from sft import cli
from sft.errors import UserError


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--output", type=Path, required=True, help="JSONL to write")
    args = parser.parse_args()
    config = cli.configuration(args)
    from sft.data import files
    from sft.runtime.console import facts, make_console

    if args.output.exists():
        raise UserError(f"{args.output} exists already; remove it, or give another OUTPUT")
    report = files.process(config.data, args.output)
    make_console().print(facts(f"Written to {args.output}", report))


if __name__ == "__main__":
    cli.run(main)
