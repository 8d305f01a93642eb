"""A row's tokens in colour, as training sees them: supervised, context, special."""

from sft import cli
from sft.config import UserError, with_values


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--row", default="1", help="line of a file, or file:line as audits say it")
    parser.add_argument("--ids", action="store_true", help="every token with its id")
    args = parser.parse_intermixed_args()
    config = cli.configuration(args)
    from sft import audit, chat, prepare
    from sft.log import make_console

    prepared = prepare.prepare(with_values(config, {"data.audit": "warn"}))
    parts = (
        ("train", prepared.train_rows, prepared.train),
        ("held out", prepared.held_out_rows, prepared.held_out),
    )
    console, shown = make_console(), 0
    for part, rows, examples in parts:
        for row, example in zip(rows, examples, strict=True):
            if not f":{row.place}".endswith(f":{args.row}"):
                continue
            shown += 1
            found = ", ".join(
                audit.examine(
                    prepared.tokenizer,
                    row,
                    example,
                    prepared.audit["train"]["max_seq_len"],
                    config.data.supervise,
                )
            )
            console.print(
                f"{row.place} ({part}): {len(example.ids)} tokens, "
                f"{example.num_supervised} supervised; findings: {found or 'none'}"
            )
            view = chat.with_ids if args.ids else chat.coloured
            console.print(view(prepared.tokenizer, example))
    if not shown:
        raise UserError(
            f"no row {args.row!r}: expected a line number or file:line, for example "
            f"{prepared.train_rows[0].place}"
        )


if __name__ == "__main__":
    cli.run(main)
