"""What is trained is proven before it is trained: every row is looked at, and what is wrong has a
name, a meaning and a remedy.

`examine` does not trust the renderer. It renders and tokenises each row again by itself and holds
the example against it: the same ids, the supervised runs exactly the assistant turns, each with its
end, and before the last one the very prompt that inference will give. `report` adds what only all
rows together tell: duplicates, leaks into the held-out rows, outliers of length.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from sft import chat, data
from sft.chat import IGNORED, Example, Span, Supervise
from sft.data import DataError, Row


@dataclass(frozen=True)
class Kind:
    """A kind of finding. An error stops the run; a warning is told."""

    severity: Literal["error", "warning"]
    meaning: str
    remedy: str


KINDS = {
    "not_the_template": Kind(
        "error",
        "the ids are not those of the chat template's text",
        "prepare the data again with this tokenizer and template, through sft/chat.py",
    ),
    "labels_differ": Kind(
        "error", "a label is another token than the one in its place", "labels are not shifted"
    ),
    "unsupervised": Kind(
        "error", "no token can be learnt from", "give it an answer, or remove the row"
    ),
    "turns_differ": Kind(
        "error", "the supervised parts are not the assistant turns", "supervise whole turns"
    ),
    "answer_differs": Kind(
        "error",
        "a supervised part is not the answer and its end of turn",
        "correct the chat template or the row",
    ),
    "no_end_of_turn": Kind(
        "error",
        "a turn does not end in a token at which generation can stop",
        "correct the chat template: a model would not learn to stop",
    ),
    "repeated_bos": Kind(
        "error", "begins with two bos tokens", "the template and the tokenizer both write one"
    ),
    "too_long": Kind(
        "error",
        "has more tokens than data.max_seq_len or the model's positions",
        "raise data.max_seq_len, or set data.on_long to drop, truncate_left_turns or truncate",
    ),
    "prompt_mismatch": Kind(
        "error",
        "what stands before the last answer is not the prompt of inference",
        "correct the chat template: add_generation_prompt must write what training has",
    ),
    "special_in_content": Kind(
        "error",
        "a content holds the text of a special token, which becomes the real token",
        "write it otherwise, or remove the row",
    ),
    "content_altered": Kind(
        "error",
        "the template drops or changes what a message says",
        "use a role and a form that the template knows",
    ),
    "tools_dropped": Kind(
        "error",
        "the template does not write the row's tools",
        "use a model whose template knows tools, or remove them from the row",
    ),
    "leaked": Kind(
        "error", "a held-out row is also a training row", "remove it from one of the two files"
    ),
    "boundary_merge": Kind(
        "warning",
        "one token holds the end of the prompt and the begin of the answer",
        "end the template's header in a special token or a newline",
    ),
    "thoughts_dropped": Kind(
        "warning",
        "the template drops the thoughts of an earlier turn, which is therefore not supervised",
        "end the row at that turn if it is to be learnt",
    ),
    "answer_cut": Kind(
        "warning", "cut at data.max_seq_len: an answer lost its end", "data.on_long: drop"
    ),
    "turns_dropped": Kind(
        "warning", "its oldest turns were removed to fit data.max_seq_len", "raise it to keep them"
    ),
    "duplicate": Kind(
        "warning", "says the same as an earlier row", "set data.duplicates: drop, if not meant"
    ),
    "near_duplicate": Kind("warning", "says nearly the same as an earlier row", "look at the pair"),
    "near_leak": Kind(
        "warning",
        "a held-out row is nearly a training row, or has the prompt of one",
        "look at the pair",
    ),
    "length_outlier": Kind(
        "warning", "over 8 times as long as 95 % of the rows", "look at it, or lower max_seq_len"
    ),
}
OUTLIER = 8


# --- one row -----------------------------------------------------------------------------------


def examine(
    tokenizer: PreTrainedTokenizerBase,
    row: Row,
    example: Example,
    max_seq_len: int,
    supervise: Supervise = "all",
) -> list[str]:
    """The kinds of everything wrong with an example, from the row it claims to be."""
    found = [*example.flags, *_of_tokens(tokenizer, example, max_seq_len)]
    if not chat.is_document(row.messages):
        found += _of_row(tokenizer, row, example, supervise)
    return sorted(set(found), key=list(KINDS).index)


def _of_tokens(
    tokenizer: PreTrainedTokenizerBase, example: Example, max_seq_len: int
) -> Iterator[str]:
    ids, labels, bos = example.ids, example.labels, tokenizer.bos_token_id
    pairs = zip(ids, labels, strict=False)
    if len(ids) != len(labels) or any(b not in (a, IGNORED) for a, b in pairs):
        yield "labels_differ"
    if not example.num_supervised:
        yield "unsupervised"
    if bos is not None and ids[:2] == [bos, bos]:
        yield "repeated_bos"
    if len(ids) > max_seq_len:
        yield "too_long"


def _of_row(
    tokenizer: PreTrainedTokenizerBase, row: Row, example: Example, supervise: Supervise
) -> Iterator[str]:
    text = chat.text_of(tokenizer, row.messages, row.tools)
    yield from _of_text(tokenizer, row, text)
    ids, offsets = chat.tokens_of(tokenizer, text)
    is_cut = "answer_cut" in example.flags
    if example.ids != (ids[: len(example.ids)] if is_cut else ids):
        yield "not_the_template"
        return
    supervised = runs(example.labels)
    if supervise == "everything" or is_cut:
        return
    turns = [m for m in row.messages if m["role"] == "assistant"]
    learnt = [turn for turn in turns if turn.get("weight", 1)]
    learnt = learnt[-1:] if supervise == "last" else learnt
    dropped = "thoughts_dropped" in example.flags
    if len(supervised) > len(learnt) or (len(supervised) < len(learnt) and not dropped):
        yield "turns_differ"
        return
    ends = {*chat.added_tokens(tokenizer, len(tokenizer)), tokenizer.eos_token_id}
    if any(example.ids[stop - 1] not in ends for _, stop in supervised):
        yield "no_end_of_turn"
    spans = [text[offsets[first][0] : offsets[stop - 1][1]] for first, stop in supervised]
    ends_of_turn = [
        c.strip() for c in chat.frame(tokenizer, tokenizer.get_chat_template()).closings
    ]
    merged = "boundary_merge" in example.flags
    said = (_says(*pair, ends_of_turn, merged) for pair in zip(spans, learnt, strict=False))
    if not dropped and not all(said):
        yield "answer_differs"
    last_is_learnt = bool(supervised and learnt) and learnt[-1] is row.messages[-1]
    if last_is_learnt and chat.prompt_mismatch(tokenizer, row.messages, example, row.tools):
        yield "prompt_mismatch"


def _says(span: str, turn: dict[str, Any], ends_of_turn: list[str], merged: bool) -> bool:
    """Whether a supervised text is that turn and nothing else: blanks or thoughts, the content, the
    calls, the end of turn. `merged`: its first token holds some of the prompt too."""
    content, calls = chat.split_thinking(turn["content"])[1].strip(), chat.calls_of(turn)
    before, _, after = span.partition(content) if content else ("", "", span)
    if content not in span:
        return False
    if calls:
        return all(chat.name_of(call) in after for call in calls)
    begins = merged or not before.strip() or chat.THOUGHTS_END.fullmatch(before.lstrip())
    return bool(begins) and after.strip() in ends_of_turn


def runs(labels: Sequence[int]) -> list[Span]:
    """The supervised runs, as token indices."""
    bounds, inside = [], False
    for index, label in enumerate([*labels, IGNORED]):
        if (label != IGNORED) != inside:
            bounds.append(index)
            inside = not inside
    return list(zip(bounds[::2], bounds[1::2], strict=True))


def _of_text(tokenizer: PreTrainedTokenizerBase, row: Row, text: str) -> Iterator[str]:
    """What the rendered text did to the contents and the tools."""
    special = _special(tokenizer, len(tokenizer))
    contents = [message["content"] for message in row.messages]
    if special and any(special.search(content) for content in contents):
        yield "special_in_content"
    at = 0
    for message in row.messages:
        content = chat.split_thinking(message["content"])[1].strip()
        quoted = json.dumps(content, ensure_ascii=False)[1:-1]  # some templates write JSON
        places = [place for form in (content, quoted) if (place := text.find(form, at)) >= 0]
        if not places:
            yield "content_altered"
            break
        at = min(places) + (len(content) if message["role"] == "assistant" else 0)
    if any(chat.name_of(tool) not in text for tool in row.tools or []):
        yield "tools_dropped"


@lru_cache(maxsize=8)
def _special(tokenizer: PreTrainedTokenizerBase, size: int) -> re.Pattern[str] | None:
    """Finds the special tokens, which a content must not hold: typed, they would be real ones."""
    written = chat.special_tokens(tokenizer, size)
    return re.compile("|".join(map(re.escape, written))) if written else None


# --- all rows ----------------------------------------------------------------------------------


Sample = tuple[Row, Example, list[str]]  # a row, its example, the kinds of its findings


def report(
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    max_seq_len: int,
    against: Sequence[Row] = (),
) -> dict[str, Any]:
    """Totals, digests, and under `problems` the rows (`file:line`) of each kind of finding.

    `against`: the training rows, if these are the held-out ones.
    """
    found: dict[str, list[str]] = {kind: [] for kind in KINDS}
    lengths = np.array([len(example.ids) for _, example, _ in samples] or [0])
    usual = np.quantile(lengths, 0.95)
    for (row, _, kinds), length in zip(samples, lengths, strict=False):
        outlying = ["length_outlier"] if length > OUTLIER * usual else []
        for kind in [*kinds, *outlying]:
            found[kind].append(row.place)
    rows = list({row.place: row for row, _, _ in samples}.values())  # however often it is used
    exact, near = data.duplicates(rows)
    found["duplicate"] = [rows[i].place for group in exact for i in group[1:]]
    found["near_duplicate"] = [rows[later].place for _, later, _ in near]
    if against:
        leaked, nearly = data.leakage(against, rows)
        found["leaked"] = [rows[i].place for i in leaked]
        found["near_leak"] = [rows[i].place for i in nearly]
    return {
        "rows": len(samples),
        "tokens": int(lengths.sum()),
        "supervised_tokens": sum(example.num_supervised for _, example, _ in samples),
        "longest": int(lengths.max()),
        "max_seq_len": max_seq_len,
        "problems": {
            kind: {"severity": KINDS[kind].severity, "count": len(places), "rows": places}
            for kind, places in found.items()
            if places
        },
        "template_sha256": _sha256(tokenizer.get_chat_template()),
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
    }


def refuse(audited: dict[str, Any]) -> None:
    """Raises DataError with every finding of both parts that is an error."""
    problems = []
    for part in ("train", "held_out"):
        for kind, found in audited[part]["problems"].items():
            if found["severity"] == "error":
                first = ", ".join(found["rows"][:5]) + (", ..." if found["count"] > 5 else "")
                problems.append(
                    f"{kind}: {found['count']} of {audited[part]['rows']} {part} rows ({first}): "
                    f"{KINDS[kind].meaning}; {KINDS[kind].remedy}"
                )
    if problems:
        limit, longest = audited["train"]["max_seq_len"], audited["train"]["longest"]
        raise DataError(
            f"the data cannot be trained on as it is (limit {limit} tokens, longest row {longest})"
            ":\n  " + "\n  ".join(problems) + "\nlook at them with `make audit` and `make "
            "show-data`; data.audit: warn trains nevertheless"
        )


def num_errors(audited: dict[str, Any]) -> int:
    """Kinds of findings that a run refuses, in both parts."""
    found = [*audited["train"]["problems"].values(), *audited["held_out"]["problems"].values()]
    return sum(problem["severity"] == "error" for problem in found)


def summary(audited: dict[str, Any]) -> str:
    """One line: what was looked at, what was found, and what was left out."""
    rows = audited["train"]["rows"] + audited["held_out"]["rows"]
    found = [
        f"{kind} {problem['count']:,}"
        for part in ("train", "held_out")
        for kind, problem in audited[part]["problems"].items()
    ]
    left_out = [f"{audited[what]:,} {what}" for what in ("rejected", "dropped") if audited[what]]
    told = ", ".join(found + left_out)
    return f"{rows:,} examples, " + (f"{told} (audit.html)" if told else "nothing found")


def worst(samples: Sequence[Sample], most: int = 20) -> list[Sample]:
    """Up to three rows of each combination of findings, the gravest first; else the longest few."""
    groups: dict[tuple[str, ...], list[Sample]] = {}
    for sample in samples:
        groups.setdefault(tuple(sample[2]), []).append(sample)
    clean = sorted(groups.pop((), []), key=lambda sample: -len(sample[1].ids))
    order = list(KINDS)
    gravest = sorted(groups, key=lambda kinds: min(map(order.index, kinds)))
    return [*(s for kinds in gravest for s in groups[kinds][:3]), *clean[:3]][:most]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of vocabulary, merges, normalisation and special tokens; not of the padding last used."""
    state = tokenizer.backend_tokenizer.to_str().partition('"added_tokens":')[2]
    return _sha256(state + json.dumps(tokenizer.special_tokens_map, sort_keys=True))


# --- what people see ---------------------------------------------------------------------------


def table(told: dict[str, Any]) -> Table:
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
    added = chat.added_tokens(tokenizer, len(tokenizer))
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
        text = escape(chat.decoded(tokenizer, example.ids, done, end))
        parts.append(f"<span class='{names}'>{text}</span>")
        done = end
    return "".join(parts)
