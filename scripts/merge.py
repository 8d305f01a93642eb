"""Merges the adapter of a finished run into its base, and proves the result."""

import argparse
import json
from pathlib import Path

from sft import cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("outputs/nano"), help="folder of the run")
    parser.add_argument("--output", type=Path, help="default: <run>/merged")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_args()
    from sft import export

    output = args.output or args.run / "merged"
    report = export.merge(args.run, output, args.dtype, args.overrides)
    print(json.dumps(report, indent=2))
    print(f"merged model, same as the adapter on its base: {output}")


if __name__ == "__main__":
    cli.run(main)
