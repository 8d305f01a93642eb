"""Looks at every row as training sees it: table, audit.json, audit.html; exit 3 on an error."""

from pathlib import Path

from sft import cli
from sft.config.load import with_values


def main() -> int:
    config = cli.configuration(cli.parser(__doc__).parse_args())
    from sft.data import audit, audit_report, cache
    from sft.runtime.console import facts, make_console

    console = make_console()
    prepared = cache.prepare(with_values(config, {"data.audit": "warn"}))
    for part in ("train", "held_out"):
        told = prepared.audit[part]
        rows = [
            ("examples", f"{told['rows']:,}"),
            ("tokens", f"{told['tokens']:,} ({told['supervised_tokens']:,} supervised)"),
            ("longest", f"{told['longest']:,} of at most {told['max_seq_len']:,} tokens"),
            ("findings", ", ".join(told["problems"]) or "none"),
        ]
        console.print(facts(part.replace("_", " "), rows))
        if told["problems"]:
            console.print(audit_report.findings_table(told))
    formats = (f"{count:,} {name}" for name, count in prepared.audit["formats"].items())
    console.print(f"formats of the rows: {', '.join(formats)}")
    for what, why in (("rejected", "on_bad_row"), ("dropped", "on_long")):
        if count := prepared.audit[what]:
            console.print(f"{count:,} rows {what} (data.{why}: {getattr(config.data, why)})")
    folder = Path("outputs/audits", Path(config.train.output_dir).name)
    folder.mkdir(parents=True, exist_ok=True)
    cache.write_audit(prepared, folder)
    console.print(f"{folder}/audit.html has the rows of most findings in colour")
    return 3 if audit.count_errors(prepared.audit) else 0


if __name__ == "__main__":
    cli.run(main)
