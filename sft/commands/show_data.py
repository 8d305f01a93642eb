"""Shows a row's tokens in colour, as training sees them: supervised, context, special."""

from __future__ import annotations

from argparse import Namespace

from sft import cli
from sft.errors import UserError


def add_arguments(parser: cli.Parser) -> None:
    parser.add_argument("--row", default="1", help="line of a file, or file:line as in an audit")
    parser.add_argument("--ids", action="store_true", help="every token with its id")


def main(args: Namespace) -> None:
    """Prints the examples of every row that `--row` selects."""
    config = cli.configuration(args)
    from sft.data import audit, cache, files, template
    from sft.models import load
    from sft.runtime.console import make_console

    settings, console, shown = config.data, make_console(), 0
    tokenizer = template.prepare_tokenizer(load.load_tokenizer(config.model))
    limit = cache.max_length(config)
    view = template.list_tokens if args.ids else template.colour_text
    for path in (settings.train_path, settings.eval_path or []):
        for row in files.read_all(path, **files.read_options(settings)):
            if not f":{row.file}:{row.line}".endswith(f":{args.row}"):
                continue
            shown += 1
            if isinstance(row, files.BadRow):
                console.print(f"bad row {row}")
                continue
            made = template.render_row(
                tokenizer, row, limit, supervise=settings.supervise, on_long=settings.on_long
            )
            for kept, example in made:
                kinds = audit.examine(tokenizer, kept, example, limit, settings.supervise)
                console.print(
                    f"{row.place}: {len(example.ids)} tokens, {example.num_supervised} supervised; "
                    f"findings: {', '.join(kinds) or 'none'}"
                )
                console.print(view(tokenizer, example))
            if not made:
                console.print(f"{row.place}: dropped (data.on_long: {settings.on_long})")
    if not shown:
        raise UserError(f"no row {args.row!r}: expected a line number, or file:line")
