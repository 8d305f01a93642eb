"""Tries everything that a configuration needs; one line a finding; exit code 2 if one is not ok."""

from pathlib import Path

from sft import cli

REQUIREMENTS = Path(__file__).parent.parent / "requirements.txt"


def main() -> int:
    args = cli.parser(__doc__).parse_args()
    from sft import check

    return 0 if check.run(args.config, args.overrides, REQUIREMENTS) else 2


if __name__ == "__main__":
    cli.run(main)
