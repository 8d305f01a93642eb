"""Sums up an audit, shows it as a table and as HTML, and the tokens of an example in colour."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase as Tokenizer

from sft.data import rendering, tokens
from sft.data.audit import BIT, KINDS, template_sha256, to_kinds, tokenizer_sha256
from sft.data.examples import Examples
from sft.data.files import Row
from sft.data.template import IGNORED, Example
from sft.errors import DataError
from sft.runtime import plain
from sft.runtime.console import table
from sft.runtime.output import visible

Sample = tuple[Row, Example, list[str]]  # a row, its example, the kinds of its findings
LISTED = 1000  # rows of a finding that audit.json names; all are counted
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


def summarise_part(tokenizer: Tokenizer, examples: Examples, max_seq_len: int) -> dict[str, Any]:
    """Returns totals, digests, and under `problems` the rows (`file:line`) of each kind of finding.

    A row that is used more than once is counted once.
    """
    index, order, lengths = examples.arrays.index, examples.order, np.asarray(examples.lengths)
    places = np.sort(np.unique(order, return_index=True)[1])  # where each example stands first
    found, problems = index["findings"][order[places]], {}
    for kind, k in BIT.items():
        mine = places[(found >> np.uint32(k) & 1).astype(bool)]
        if len(mine):
            rows = [examples.row(i).place for i in mine[:LISTED].tolist()]
            severity = KINDS[kind].severity
            problems[kind] = {"severity": severity, "count": len(mine), "rows": rows}
    return {
        "rows": len(examples),
        "tokens": int(lengths.sum()),
        "supervised_tokens": int(index["supervised"][order].sum()),
        "longest": int(lengths.max(initial=0)),
        "max_seq_len": max_seq_len,
        "problems": problems,
        "template_sha256": template_sha256(tokenizer),
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
    }


def _problems(audited: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yields (part, kind, what was found) of each kind of finding in both parts."""
    for part in ("train", "held_out"):
        yield from ((part, kind, found) for kind, found in audited[part]["problems"].items())


def refuse(audited: dict[str, Any]) -> None:
    """Raises DataError with every finding of both parts that is an error."""
    problems = [
        f"{kind}: {found['count']} of {audited[part]['rows']} {part} rows ({_first(found, 5)}): "
        f"{KINDS[kind].meaning}; {KINDS[kind].remedy}"
        for part, kind, found in _problems(audited)
        if found["severity"] == "error"
    ]
    if problems:
        limit, longest = audited["train"]["max_seq_len"], audited["train"]["longest"]
        raise DataError(
            f"the data cannot be trained on as it is (limit {limit} tokens, longest row {longest})"
            ":\n  " + "\n  ".join(problems) + "\nlook at them with `make audit` and `make "
            "show-data`; data.audit: warn trains nevertheless"
        )


def _first(found: dict[str, Any], num: int) -> str:
    """Returns the first rows of a finding."""
    return ", ".join(found["rows"][:num]) + (", ..." if found["count"] > num else "")


def count_errors(audited: dict[str, Any]) -> int:
    """Counts the kinds of findings that a run refuses, in both parts."""
    return sum(found["severity"] == "error" for _, _, found in _problems(audited))


def summarise(audited: dict[str, Any]) -> str:
    """Returns one line: the number of examples, their formats, the findings, and rows left out."""
    rows = audited["train"]["rows"] + audited["held_out"]["rows"]
    found = [f"{kind} {problem['count']:,}" for _, kind, problem in _problems(audited)]
    found += [f"{audited[what]:,} {what}" for what in ("rejected", "dropped") if audited[what]]
    found += [
        f"{count:,} left out ({why.split(':')[0]})" for why, count in audited["left_out"].items()
    ]
    if split := audited["split"]:
        found.append(
            f"{split['rows']:,} rows split into {split['examples']:,} examples (one per turn, "
            f"{split['further_tokens']:,} further tokens)"
        )
    findings = f"{', '.join(found)} (audit.html)" if found else "nothing found"
    line = f"{rows:,} examples ({', '.join(audited['formats'])}), {findings}"
    return "; ".join([line, *describe_new_tokens(audited)])


def describe_new_tokens(audited: dict[str, Any]) -> list[str]:
    """Returns how often the training rows teach each of `model.new_tokens`, as text."""
    counts = audited.get("new_tokens", {}).items()
    often = {0: "never", 1: "once"}
    return [
        f"new token {visible(token)} is {often.get(number, f'{number:,} times')} supervised"
        for token, number in counts
    ]


def pick_samples(examples: Examples, most: int = 20) -> list[Sample]:
    """Picks up to three rows of each combination of findings, most severe first, and then the
    longest three rows without findings."""
    found = examples.arrays.index["findings"][examples.order]
    by_severity = sorted(np.unique(found[found != 0]).tolist(), key=lambda bits: bits & -bits)
    flagged = [i for bits in by_severity for i in np.flatnonzero(found == bits)[:3].tolist()]
    clean = np.flatnonzero(found == 0)
    longest = np.argsort(-np.asarray(examples.lengths)[clean], kind="stable")[:3]
    chosen = [*flagged, *clean[longest].tolist()][:most]
    return [(examples.row(i), examples[i], to_kinds(int(found[i]))) for i in chosen]


def findings_table(part: dict[str, Any]) -> Table:
    """Returns a table of the findings in one part (train or held out), errors first."""
    rows = []
    for kind, found in sorted(part["problems"].items(), key=lambda item: [*KINDS].index(item[0])):
        style = "red" if found["severity"] == "error" else "yellow"
        meaning, first = KINDS[kind].meaning, _first(found, 3)
        rows.append((Text(kind, style), meaning, first, f"{found['count']:,}"))
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
    plain.write_text(path, "\n".join(lines))


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
