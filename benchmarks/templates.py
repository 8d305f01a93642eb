"""Masks on real chat templates: for each template and conversation clean, refused or wrong.

    python benchmarks/templates.py [--shared ../shared] [--json benchmarks/results/templates.json]

The oracle (`shared/data/templates`) has the characters that a marked twin of each template says the
assistant wrote. It is compared with the supervised tokens of every example that `render_row` makes.
A pair is *wrong* if a supervised part is not one turn of the oracle, up to the parts on which the
oracle's README says conventions differ, if a turn is missing without a finding, or if the tokens
before it are not those of the prompt that the template itself renders for serving.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from sft.data import audit, template, tokens
from sft.data.files import Row
from sft.data.formats import normalise
from sft.data.rendering import MARKS, read_form
from sft.errors import DataError
from sft.runtime.console import make_console, table

BLANK = re.compile(r"(\s|</?think>)*")  # what stands in an empty block of thoughts
TODAY = re.compile(r"Current date: \d{4}-\d\d-\d\d")


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def stand_in(shared: Path, pair: dict[str, Any], vocabulary: str = "qwen2.5-instruct") -> Any:
    """Returns a tokenizer with the template of a row of the oracle and its tokens."""
    made = AutoTokenizer.from_pretrained(shared / "data/tokenizers" / vocabulary)
    special = [*pair["special_tokens"], *pair["end_of_turn"]]
    made.add_special_tokens(
        {"additional_special_tokens": special}, replace_extra_special_tokens=False
    )
    made.add_tokens(pair["plain_tokens"])
    made.eos_token = pair["eos"]
    made.bos_token = pair["bos"]
    folder = shared / "data/templates/templates"
    made.chat_template = (folder / f"{pair['template']}.jinja").read_text("utf-8")
    return template.prepare_tokenizer(made)


def judge(tokenizer: Any, pair: dict[str, Any], row: Row) -> tuple[str, str]:
    """Returns the verdict on a pair (clean, split, unlearnt, refused, wrong) and its reason."""
    try:
        made = template.render_row(tokenizer, row, 10**6)
    except DataError as error:
        return "refused", str(error)
    found = Counter[int]()
    for kept, example in made:
        kinds = [k for k in audit.examine(tokenizer, kept, example, 10**6) if k in audit.ERRORS]
        if kinds and kinds != ["unsupervised"]:
            return "wrong", f"findings {kinds}"
        turns = [
            n
            for n, m in enumerate(kept.messages)
            if m["role"] == "assistant" and m.get("weight", 1)
        ]
        runs = audit.supervised_runs(example.labels)
        for first, stop in runs:
            text = _text(tokenizer, example.ids, first, stop)
            could_be = [t for t in turns if _is_turn(pair, t, text)]
            if not could_be:
                return "wrong", f"supervised {text[:60]!r}"
            contexts = {t: _context(tokenizer, kept, t, example.ids[:first]) for t in could_be}
            turn = next((t for t, reason in contexts.items() if reason is None), None)
            if turn is None:
                return "wrong", str(contexts[could_be[0]])
            turns.remove(turn)
            found[turn] += 1
    if any(number > 1 for number in found.values()):
        return "wrong", "a turn is supervised twice"
    missing = set(pair["turns"]) - set(found)
    flags = {flag for _, example in made for flag in example.flags}
    if missing and not flags & {"thoughts_dropped", "no_prompt"}:
        return "wrong", f"turns {sorted(missing)} are not supervised"
    if not found:
        return "unlearnt", ", ".join(sorted(flags))
    return ("split" if len(made) > 1 else "clean"), ", ".join(sorted(flags))


def _text(tokenizer: Any, ids: list[int], first: int, stop: int) -> str:
    return tokens.decode_slice(tokenizer, ids, first, stop)


def _is_turn(pair: dict[str, Any], turn: int, text: str) -> bool:
    """Returns whether a supervised text is this turn of the oracle, give or take optional parts."""
    spans = [s for s, t in zip(pair["supervised"], pair["turns"], strict=True) if t == turn]
    if not spans:  # the oracle leaves the turn open: thoughts or words that the template drops
        return bool(pair["optional"])
    start, end = spans[0][0], spans[-1][1]
    core = pair["text"][start:end]
    if core not in text:  # what ends the turn may be added, or be another token (gpt-oss)
        ends = [e for e in pair["end_of_turn"] if core.endswith(e)]
        core = core.removesuffix(ends[0]) if ends else core.rstrip()
        if core not in text:
            return False
    before, _, after = text.partition(core)
    optional = [pair["text"][a:b] for a, b in pair["optional"]]
    lead = "".join(o for (a, _), o in zip(pair["optional"], optional, strict=True) if a < start)
    starts = BLANK.fullmatch(before) or lead.endswith(before) or before in lead
    closed = after.strip()
    for token in pair["end_of_turn"]:
        closed = closed.removesuffix(token).strip()
    return bool(starts) and (not closed or any(closed in o for o in optional))


def _context(tokenizer: Any, kept: Row, turn: int, ids: list[int]) -> str | None:
    """Returns how the tokens before a turn differ from the template's own prompt, or None."""
    messages = [{k: v for k, v in m.items() if k != "weight"} for m in kept.messages[:turn]]
    served = tokenizer.apply_chat_template(
        read_form(tokenizer).apply(messages),
        tools=kept.tools,
        add_generation_prompt=True,
        return_dict=False,
        sanitize_control_tokens=True,
        **(kept.template_kwargs or {}),
    )
    if served == ids:
        return None
    a, b = tokenizer.decode(served), tokenizer.decode(ids)
    at = next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
    return f"context differs at {a[at : at + 30]!r} / {b[at : at + 30]!r}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only")
    chosen = parser.parse_args()
    folder = chosen.shared / "data/templates"
    conversations = {c["name"]: c for c in read_lines(folder / "conversations.jsonl")}
    results, tokenizers = [], dict[str, Any]()
    for pair in read_lines(folder / "oracle.jsonl"):
        name = pair["template"]
        if chosen.only and not re.search(chosen.only, name):
            continue
        if name not in tokenizers:
            tokenizers[name] = stand_in(chosen.shared, pair)
        given = conversations[pair["conversation"]]
        read = normalise({key: given[key] for key in ("messages", "tools") if given[key]})
        row = Row(read.messages, read.tools, pair["conversation"], 1)
        verdict, reason = judge(tokenizers[name], pair, row)
        results.append(
            {
                "template": name,
                "conversation": pair["conversation"],
                "verdict": verdict,
                "reason": "".join(c for c in reason if c not in MARKS),
            }
        )
    verdicts = ("clean", "split", "unlearnt", "refused", "wrong")
    counts = {
        name: Counter(r["verdict"] for r in results if r["template"] == name) for name in tokenizers
    }
    counts["all"] = Counter(r["verdict"] for r in results)
    console = make_console()
    rows = [(name, *(str(c[v]) for v in verdicts)) for name, c in counts.items()]
    console.print(table("Masks on real chat templates", ("template", *verdicts), rows))
    for r in results:
        if r["verdict"] in ("refused", "wrong"):
            console.print(
                f"{r['template']} {r['conversation']}: {r['verdict']}: {r['reason'][:300]}"
            )
    if chosen.json:
        total = {v: counts["all"][v] for v in verdicts}
        chosen.json.write_text(json.dumps({"total": total, "pairs": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
