"""Verbs for rows: `process` normalises them, `audit` examines them, `show-data` prints tokens."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from sft import cli
from sft.config.load import with_values
from sft.errors import UserError
from sft.runtime.console import facts, make_console
from sft.runtime.output import visible


def process_options(parser: cli.Parser) -> None:
    parser.add_argument("--output", type=Path, required=True, help="JSONL to write")


def process(args: Namespace) -> None:
    """Writes the rows of any known format into `--output`, which must not exist yet."""
    config = cli.configuration(args)
    if not args.output.name:
        raise UserError("OUTPUT: required: OUTPUT=rows.jsonl")
    if args.output.exists():
        raise UserError(f"{args.output} exists already; remove it, or give another OUTPUT")
    from sft.data import files

    report = files.process(config.data, args.output)
    make_console().print(facts(f"Written to {args.output}", report))


def audit(args: Namespace) -> int:
    """Prints the findings, and writes them into outputs/audits. Returns 3 if one is an error."""
    config = cli.configuration(args)
    from sft.data import audit_report, cache
    from sft.tasks.sft import replay

    console = make_console()
    config = with_values(replay.with_base_answers(config), {"data.audit": "warn"})
    prepared = cache.prepare(config)
    for part in ("train", "held_out"):
        found = prepared.audit[part]
        rows = [
            ("examples", f"{found['rows']:,}"),
            ("tokens", f"{found['tokens']:,} ({found['supervised_tokens']:,} supervised)"),
            ("longest", f"{found['longest']:,} of at most {found['max_seq_len']:,} tokens"),
            ("findings", ", ".join(found["problems"]) or "none"),
        ]
        console.print(facts(part.replace("_", " "), rows))
        if found["problems"]:
            console.print(audit_report.findings_table(found))
    formats = (f"{count:,} {name}" for name, count in prepared.audit["formats"].items())
    console.print(f"formats of the rows: {', '.join(formats)}")
    for line in audit_report.describe_new_tokens(prepared.audit):
        console.print(line, markup=False)
    if ignored := prepared.audit["ignored_columns"]:
        shares = (f"{visible(name)} ({share:.0%} of the rows)" for name, share in ignored.items())
        console.print(f"columns that are not used: {', '.join(shares)}", markup=False)
    if adds := prepared.audit["template_adds"]:
        console.print(f"the chat template adds by itself: {visible(adds)}", markup=False)
    for why, count in prepared.audit["left_out"].items():
        console.print(f"{count:,} rows left out: {why}")
    if split := prepared.audit["split"]:
        console.print(
            f"{split['rows']:,} rows are split into {split['examples']:,} examples, one per turn "
            f"(data.turns), which costs {split['further_tokens']:,} further tokens"
        )
    for what, why in (("rejected", "on_bad_row"), ("dropped", "on_long")):
        if count := prepared.audit[what]:
            console.print(f"{count:,} rows {what} (data.{why}: {getattr(config.data, why)})")
    folder = Path("outputs/audits", Path(config.train.output_dir).name)
    folder.mkdir(parents=True, exist_ok=True)
    cache.write_audit(prepared, folder)
    console.print(f"{folder}/audit.html shows the rows with the most findings in colour")
    return 3 if audit_report.count_errors(prepared.audit) else 0


def show_data_options(parser: cli.Parser) -> None:
    parser.add_argument(
        "--row", help="line of a file, or file:line as in an audit; the first row without it"
    )
    parser.add_argument("--ids", action="store_true", help="every token with its id")


def show_data(args: Namespace) -> None:
    """Prints the examples of every row that `--row` selects, as training sees them."""
    from sft.data import audit, audit_report, cache, files, template
    from sft.tasks.sft import replay

    config = replay.with_base_answers(cli.configuration(args))

    settings, console, num_shown = config.data, make_console(), 0
    tokenizer = cache.load_tokenizer(config)
    limit = cache.max_length(config)
    view = audit_report.list_tokens if args.ids else audit_report.colour_text
    for row in files.select_rows(settings, args.row):
        num_shown += 1
        if isinstance(row, files.BadRow):
            console.print(f"bad row {row}")
            continue
        made = template.render_row(tokenizer, row, limit, **cache.render_options(settings))
        for kept, example in made:
            kinds = audit.examine(tokenizer, kept, example, limit, settings.supervise)
            console.print(
                f"{row.place}: {len(example.ids)} tokens, {example.num_supervised} supervised; "
                f"findings: {', '.join(kinds) or 'none'}"
            )
            console.print(view(tokenizer, example))
        if not made:
            console.print(f"{row.place}: dropped (data.on_long: {settings.on_long})")
    if not num_shown:
        raise UserError(f"no row {args.row!r}: expected a line number, or file:line")
