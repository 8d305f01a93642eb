"""Held-out loss and scored answers of a finished run, with overrides (another file, more rows)."""

from pathlib import Path

from sft import cli


def main() -> int | None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--run", type=Path, default=Path("outputs/nano"), help="folder of the run")
    parser.add_argument("--name", default="evaluate", help="results go to <run>/evaluation/<name>")
    args = parser.parse_args()
    from sft.runtime import launcher

    if launcher.has_ranks_to_start():
        return launcher.launch_self(args.run / "evaluation" / args.name)
    from sft import run

    run.evaluate_run(args.run, args.name, args.overrides)
    return None


if __name__ == "__main__":
    cli.run(main)
