"""Shows an audit as a table and as HTML, and the tokens of an example in colour."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase as Tokenizer

from sft.data import rendering, tokens
from sft.data.audit import KINDS, Sample
from sft.data.template import IGNORED, Example
from sft.runtime.console import table, visible

STYLES = {  # by (is added, is supervised)
    (True, True): "bold magenta underline",
    (True, False): "bold magenta",
    (False, True): "green",
    (False, False): "dim",
}
HEAD = """\
<!doctype html><html lang='en'><meta charset='utf-8'><title>audit</title><style>
body{font:15px/1.5 system-ui;max-width:60rem;margin:2rem auto;padding:0 1rem}
pre{white-space:pre-wrap;background:#f6f6f6;padding:.8rem;overflow-wrap:anywhere}
td,th{text-align:left;padding:.2rem .8rem;vertical-align:top}
.supervised{color:#0a7d32}.context{color:#777}.special{color:#a0218f}
.supervised{background:#e3f6e8}.error{color:#b00020}.warning{color:#8a5a00}</style>
<h1>Audit</h1><p>Supervised tokens are <b class='supervised'>green</b>, special ones
<b class='special'>purple</b>, context <span class='context'>grey</span>.</p>"""


def findings_table(part: dict[str, Any]) -> Table:
    """Returns a table of the findings in one part (train or held out), errors first."""
    rows = []
    for kind, found in sorted(part["problems"].items(), key=lambda item: [*KINDS].index(item[0])):
        style = "red" if found["severity"] == "error" else "yellow"
        first = ", ".join(found["rows"][:3]) + (", ..." if found["count"] > 3 else "")
        rows.append((Text(kind, style), KINDS[kind].meaning, first, f"{found['count']:,}"))
    return table("", ("finding", "meaning", "first rows", "rows"), rows, left=3)


def write_html(
    path: Path,
    tokenizer: Tokenizer,
    audited: dict[str, Any],
    samples: Sequence[Sample],
) -> None:
    """Writes a page without scripts: a table of findings, and the samples' tokens in colour."""
    lines = [HEAD]
    for name in ("train", "held_out"):
        lines += _part_as_html(name.replace("_", " "), audited[name])
    if ignored := audited.get("ignored_columns"):
        shares = (f"{escape(name)} ({share:.0%})" for name, share in ignored.items())
        lines.append(f"<p>Columns that are not used: {', '.join(shares)}</p>")
    lines.append("<h2>Samples</h2>")
    for row, example, kinds in samples:
        lines.append(
            f"<h3>{escape(row.place)}: {', '.join(kinds) or 'nothing found'}</h3>"
            f"<pre>{''.join(_tokens_as_html(tokenizer, example))}</pre>"
        )
    path.write_text("\n".join(lines), "utf-8")


def _part_as_html(title: str, part: dict[str, Any]) -> Iterator[str]:
    yield (
        f"<h2>{title}</h2><p>{part['rows']:,} examples, {part['tokens']:,} "
        f"tokens, {part['supervised_tokens']:,} supervised, longest {part['longest']:,}</p>"
        "<table><tr><th>finding<th>rows<th>meaning<th>what to do<th>first rows"
    )
    for kind, found in part["problems"].items():
        yield (
            f"<tr><td class='{found['severity']}'>{kind}<td>{found['count']:,}"
            f"<td>{KINDS[kind].meaning}<td>{KINDS[kind].remedy}"
            f"<td>{escape(', '.join(found['rows'][:5]))}"
        )
    yield "</table>" if part["problems"] else "<tr><td>nothing found</table>"


def _tokens_as_html(tokenizer: Tokenizer, example: Example) -> Iterator[str]:
    for text, is_added, is_supervised in _runs(tokenizer, example):
        classes = "special " * is_added + ("supervised" if is_supervised else "context")
        yield f"<span class='{classes}'>{escape(text)}</span>"


def colour_text(tokenizer: Tokenizer, example: Example) -> Text:
    """Returns the text for a terminal: supervised green, context dim, added tokens magenta."""
    result = Text()
    for text, is_added, is_supervised in _runs(tokenizer, example):
        result.append(visible(text), STYLES[is_added, is_supervised])
    return result


def list_tokens(tokenizer: Tokenizer, example: Example) -> Text:
    """Returns every token with its id, in the colours of `colour_text`, with visible blanks."""
    added, result = rendering.added_tokens(tokenizer), Text()
    for at, (token, label) in enumerate(zip(example.ids, example.labels, strict=True)):
        text = tokens.decode_slice(tokenizer, example.ids, at, at + 1)
        result.append(f"{token}", "dim")
        result.append(f"{text!r} ", STYLES[token in added, label != IGNORED])
    return result


def _runs(tokenizer: Tokenizer, example: Example) -> Iterator[tuple[str, bool, bool]]:
    """Yields (text, are its tokens added ones, are they supervised) of each run of tokens."""
    added, start = rendering.added_tokens(tokenizer), 0
    pairs = zip(example.ids, example.labels, strict=True)
    for kind, run in groupby(pairs, lambda pair: (pair[0] in added, pair[1] != IGNORED)):
        end = start + len(list(run))
        yield tokens.decode_slice(tokenizer, example.ids, start, end), *kind
        start = end
