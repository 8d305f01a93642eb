"""Examines every row as training sees it; the exit code is 3 if a finding is an error."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from sft import cli
from sft.config.load import with_values


def main(args: Namespace) -> int:
    """Prints the findings, and writes them into outputs/audits."""
    config = cli.configuration(args)
    from sft.data import audit, audit_report, cache
    from sft.runtime.console import facts, make_console

    console = make_console()
    prepared = cache.prepare(with_values(config, {"data.audit": "warn"}))
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
    for what, why in (("rejected", "on_bad_row"), ("dropped", "on_long")):
        if count := prepared.audit[what]:
            console.print(f"{count:,} rows {what} (data.{why}: {getattr(config.data, why)})")
    folder = Path("outputs/audits", Path(config.train.output_dir).name)
    folder.mkdir(parents=True, exist_ok=True)
    cache.write_audit(prepared, folder)
    console.print(f"{folder}/audit.html shows the rows with the most findings in colour")
    return 3 if audit.count_errors(prepared.audit) else 0
