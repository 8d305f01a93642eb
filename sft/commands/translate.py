"""The verb `import`: another program's configuration becomes one of this project."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from rich.text import Text
from ruamel.yaml import YAML

from sft import cli
from sft.config.load import load_config
from sft.config.read import Reader
from sft.config.translate import Line, merged, translate
from sft.errors import ConfigError, UserError
from sft.runtime.console import atomic_write, make_console, table


def import_config_options(parser: cli.Parser) -> None:
    parser.add_argument("--config", required=True, help="their YAML file")
    parser.add_argument("--output", type=Path, default=Path("configs/imported.yaml"))
    parser.add_argument("--num-processes", type=int, default=1, help="processes of their run")


def import_config(args: Namespace) -> None:
    """Prints what becomes of every key, and writes `--output`, which must not exist yet.

    Raises ConfigError if the file that was written cannot be used as it is.
    """
    if args.output.exists():
        raise UserError(f"{args.output} exists already; remove it, or give another OUTPUT")
    reader = Reader()
    tree = reader.read_file(Path(args.config))
    if reader.problems:
        raise ConfigError("\n  ".join(reader.problems))
    program, lines = translate(tree, args.num_processes)
    columns = (program, "value", "here", "note")
    rows = [tuple(map(Text, (line.key, line.theirs, _shown(line), line.note))) for line in lines]
    title = f"{args.config}, a configuration of {program}"
    make_console().print(table(title, columns, rows, left=4))
    _write(args.output, f"From {title}", lines)
    try:
        load_config(args.output)
    except ConfigError as error:
        raise ConfigError(f"{args.output} is written, and needs changes by hand: {error}") from None
    make_console().print(
        f"{args.output} is written; next: make check CONFIG={args.output}", markup=False
    )


def _shown(line: Line) -> str:
    return ", ".join(f"{key}: {value}" for key, value in line.ours.items())


def _write(path: Path, title: str, lines: list[Line]) -> None:
    """Writes the configuration, and above it the keys that have no equivalent."""
    left_out = [line for line in lines if not line.ours and "no equivalent" in line.note]
    comments = [title, *(f"not here: {line.key}: {line.theirs}" for line in left_out)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.writelines(f"# {comment}\n" for comment in comments)
        yaml = YAML()
        yaml.width = 10_000
        yaml.dump(merged(lines), file)
