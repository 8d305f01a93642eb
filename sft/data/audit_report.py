"""Shows an audit as a table and as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from sft.data import rendering, template
from sft.data.audit import KINDS, Sample
from sft.data.template import IGNORED, Example

# --- what people see ---------------------------------------------------------------------------


def findings_table(told: dict[str, Any]) -> Table:
    """The findings of one part (train or held out), errors first."""
    result = Table(box=None, pad_edge=False, show_header=bool(told["problems"]))
    for column in ("finding", "rows", "what", "first rows"):
        result.add_column(column, overflow="fold", justify="right" if column == "rows" else "left")
    order = list(KINDS)
    for kind, found in sorted(told["problems"].items(), key=lambda item: order.index(item[0])):
        style = "red" if found["severity"] == "error" else "yellow"
        first = ", ".join(found["rows"][:3]) + (", ..." if found["count"] > 3 else "")
        result.add_row(Text(kind, style), f"{found['count']:,}", KINDS[kind].meaning, first)
    return result


STYLES = {"supervised": "#0a7d32", "context": "#777", "special": "#a0218f"}


def write_html(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    audited: dict[str, Any],
    samples: Sequence[Sample],
) -> None:
    """The report as a page without scripts: a table, and the worst rows' tokens in colour."""
    lines = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>audit</title><style>",
        "body{font:15px/1.5 system-ui;max-width:60rem;margin:2rem auto;padding:0 1rem}",
        "pre{white-space:pre-wrap;background:#f6f6f6;padding:.8rem;overflow-wrap:anywhere}",
        "td,th{text-align:left;padding:.2rem .8rem;vertical-align:top}",
        *(f".{name}{{color:{colour}}}" for name, colour in STYLES.items()),
        ".supervised{background:#e3f6e8}.error{color:#b00020}.warning{color:#8a5a00}</style>",
        "<h1>Audit</h1><p>Supervised tokens are <b class='supervised'>green</b>, special ones ",
        "<b class='special'>purple</b>, context <span class='context'>grey</span>.</p>",
    ]
    for part in ("train", "held_out"):
        told = audited[part]
        lines.append(
            f"<h2>{part.replace('_', ' ')}</h2><p>{told['rows']:,} examples, {told['tokens']:,} "
            f"tokens, {told['supervised_tokens']:,} supervised, longest {told['longest']:,}</p>"
            "<table><tr><th>finding<th>rows<th>what<th>what to do<th>first rows"
        )
        for kind, found in told["problems"].items():
            places = escape(", ".join(found["rows"][:5]))
            lines.append(
                f"<tr><td class='{found['severity']}'>{kind}<td>{found['count']:,}"
                f"<td>{KINDS[kind].meaning}<td>{KINDS[kind].remedy}<td>{places}"
            )
        lines.append("</table>" if told["problems"] else "<tr><td>nothing found</table>")
    lines.append("<h2>Samples</h2>")
    for row, example, kinds in samples:
        said = ", ".join(kinds) or "nothing found"
        lines.append(f"<h3>{escape(row.place)}: {said}</h3><pre>{_html(tokenizer, example)}</pre>")
    path.write_text("\n".join(lines), "utf-8")


def _html(tokenizer: PreTrainedTokenizerBase, example: Example) -> str:
    added = rendering.added_tokens(tokenizer, len(tokenizer))
    pairs = zip(example.ids, example.labels, strict=True)
    parts, done = [], 0
    for names, run in groupby(
        pairs,
        lambda pair: (
            ("special " if pair[0] in added else "")
            + ("supervised" if pair[1] != IGNORED else "context")
        ),
    ):
        end = done + len(list(run))
        text = escape(template.decode_slice(tokenizer, example.ids, done, end))
        parts.append(f"<span class='{names}'>{text}</span>")
        done = end
    return "".join(parts)
