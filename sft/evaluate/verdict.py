"""Says what a fine-tuning was worth: what was learnt, what was lost, what it cost.

A verdict is one JSON object. The table, the page and the picture are functions of it.

Scores and the loss on general texts are better or worse than the base's. A divergence has no such
sign, since a distribution that has moved may be a better one. So drift is judged by the limit that
the user sets (`evaluation.max_drift`): above or below it, if the interval does not hold it.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from html import escape
from typing import Any

from rich.table import Table
from rich.text import Text

from sft.errors import redact
from sft.evaluate.drift import Drift
from sft.evaluate.intervals import ALPHA, Interval, holm, sign_test, unbounded
from sft.evaluate.scores import Difference
from sft.runtime.console import WIDTH, duration, facts, make_console, size, table
from sft.runtime.output import visible

Verdict = dict[str, Any]
TEXTS = "loss on general texts"
UNCLEAR = "not distinguishable"
STYLES = {"better": "green", "below": "green", "worse": "red", "above": "red"}
HEAD = """\
<!doctype html><html lang='en'><meta charset='utf-8'><title>verdict</title><style>
body{font:15px/1.5 system-ui;max-width:60rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse}td,th{text-align:right;padding:.2rem .8rem}
td:first-child,th:first-child{text-align:left}tr{border-bottom:1px solid #ddd}
.better,.below,.open{color:#0a7d32}.worse,.above,.closed{color:#b00020}p{color:#555}</style>"""


def judge_scores(
    differences: Mapping[str, Difference],
    losses: tuple[Sequence[float], Sequence[float]] | None,
) -> list[dict[str, Any]]:
    """Returns a line for each score and for the loss on texts, judged together (Holm).

    `losses`: those of the base and of the tuned model, by text.
    """
    lines: list[dict[str, Any]] = [
        {
            "name": name,
            "base": each.value_a,
            "tuned": each.value_b,
            "difference": each.difference,
            "interval": None if each.low is None else (each.low, each.high),
            "p_value": each.p_value,
            "num": None,
        }
        for name, each in differences.items()
    ]
    if losses is not None:
        by_text = [tuned - base for base, tuned in zip(*losses, strict=True)]
        base, tuned = (sum(each) / len(each) for each in losses)
        lines.append(
            {
                "name": TEXTS,
                "base": base,
                "tuned": tuned,
                "difference": tuned - base,
                "interval": unbounded(by_text),
                "p_value": sign_test(by_text),
                "num": len(by_text),
            }
        )
    adjusted = holm({number: line["p_value"] for number, line in enumerate(lines)})
    for number, line in enumerate(lines):
        is_better = (line["difference"] > 0) != (line["name"] == TEXTS)
        line["adjusted_p"] = adjusted[number]
        line["verdict"] = "better" if is_better else "worse"
        if adjusted[number] >= ALPHA:
            line["verdict"] = UNCLEAR
    return lines


def judge_drift(found: Mapping[str, Drift], limit: float | None) -> list[dict[str, Any]]:
    """Returns a line for all prompts together and for each domain, judged by the limit."""
    return [
        {"name": name, **asdict(drift), "verdict": _place(drift, limit)}
        for name, drift in found.items()
    ]


def _place(drift: Drift, limit: float | None) -> str:
    """Returns on which side of the limit a divergence is, if its interval leaves no doubt."""
    if limit is None:
        return "no limit"
    low, high = drift.divergence_interval or (drift.divergence, drift.divergence)
    return "below" if high < limit else "above" if low > limit else UNCLEAR


def judge_gate(drift: Sequence[Mapping[str, Any]], limit: float | None) -> dict[str, Any] | None:
    """Returns the gate: it is open if no measured divergence exceeds the limit; None without one.

    The measured values decide, not their intervals: the prompts are fixed, so the same model always
    gives the same answer.
    """
    if limit is None:
        return None
    over = [each["name"] for each in drift if each["divergence"] > limit]
    return {"max_drift": limit, "open": not over, "over": over}


def show(found: Verdict) -> Iterator[Table | Text]:
    """Yields the tables of a verdict, at most 100 columns wide."""
    yield Text(visible(redact(f"{found['run']} against its base {found['base']}")), "bold")
    columns = ("", "base", "tuned", "difference", "95 % interval", "p", "tuned is")
    for title, names, note in (
        ("Learnt", found["learnt"], found["learnt_note"]),
        ("Lost: texts", found["lost"]["texts"], ""),
    ):
        if names or note:
            yield table(title, columns, map(_score_cells, names), note=note or None)
    drift = found["lost"]["drift"]
    columns = ("", "prompts", "KL", "95 % interval", "agreement", "95 % interval", "limit")
    title = "Lost: drift from the base's own answers, nats per token"
    yield table(title, columns, map(_drift_cells, drift), note=found["lost"]["note"])
    yield facts("Cost", found["cost"])
    if gate := found["gate"]:
        yield Text(describe_gate(gate), "green" if gate["open"] else "red")


def _score_cells(line: Mapping[str, Any]) -> list[str | Text]:
    return [
        line["name"].replace("_", " "),
        f"{line['base']:.4g}",
        f"{line['tuned']:.4g}",
        f"{line['difference']:+.4g}",
        _interval(line["interval"], "+.3g"),
        f"{line['adjusted_p']:.2g}",
        _colour(line["verdict"]),
    ]


def _drift_cells(line: Mapping[str, Any]) -> list[str | Text]:
    return [
        line["name"],
        f"{line['num_prompts']:,}",
        f"{line['divergence']:.3g}",
        _interval(line["divergence_interval"], ".3g"),
        f"{line['agreement']:.1%}",
        _interval(line["agreement_interval"], ".1%"),
        _colour(line["verdict"]),
    ]


def _interval(interval: Interval | None, form: str) -> str:
    return "" if interval is None else f"{interval[0]:{form}} to {interval[1]:{form}}"


def _colour(verdict: str) -> Text:
    return Text(verdict, STYLES.get(verdict, ""))


def describe_gate(gate: Mapping[str, Any]) -> str:
    limit = f"evaluation.max_drift {gate['max_drift']:g}"
    if gate["open"]:
        return f"gate: open, no drift is above {limit}"
    return f"gate: closed, above {limit}: {', '.join(gate['over'])}"


def cost_rows(plan: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Returns (name, value) rows of what the run took, from its plan.json and metrics.jsonl."""
    work, measured = plan.get("work", {}), plan.get("measured") or {}
    took = [each for each in steps if "train/tokens" in each]
    rows = []
    if took:
        seconds = sum(each["speed/step_seconds"] for each in took)  # of all attempts
        rows.append(("training", duration(seconds)))
        tokens = sum(each["train/tokens"] for each in took)
        supervised = sum(each["train/supervised_tokens"] for each in took)
        rows.append(("tokens", f"{tokens:,.0f} in {len(took):,} steps, {supervised:,.0f} learnt"))
    if "memory_bytes" in measured:
        predicted = plan.get("predicted", {}).get("reserved_bytes")
        peak = measured.get("heaviest_micro_batch_bytes")
        heaviest = (
            f"; heaviest micro-batch {size(peak)}, predicted {size(predicted)}"
            if peak and predicted
            else ""
        )
        rows.append(("memory", f"{size(measured['memory_bytes'])} of a process{heaviest}"))
    if work:
        trained, whole = work.get("num_trained", 0), work.get("num_parameters", 0)
        rows.append(("trained", f"{trained:,} of {whole:,} parameters"))
        device = plan.get("device", {}).get("name", "")
        rows.append(("processes", f"{work.get('world_size', 1)} on {device}"))
    return rows


def write_html(found: Verdict) -> str:
    """Returns the verdict as a page without scripts."""
    lines = [HEAD, f"<h1>Verdict: {escape(redact(found['run']))}</h1>"]
    lines.append(f"<p>Against its base {escape(redact(found['base']))}.</p>")
    if gate := found["gate"]:
        state = "open" if gate["open"] else "closed"
        lines.append(f"<p><b class='{state}'>{escape(describe_gate(gate))}</b></p>")
    heads = ("", "base", "tuned", "difference", "95 % interval", "p", "tuned is")
    lines += ["<h2>Learnt</h2>", *_as_html(heads, map(_score_cells, found["learnt"]))]
    lines.append(f"<p>{escape(found['learnt_note'])}</p>")
    lines.append("<h2>Lost</h2>")
    if found["lost"]["texts"]:
        lines += _as_html(heads, map(_score_cells, found["lost"]["texts"]))
    heads = ("", "prompts", "KL, nats per token", "95 %", "agreement", "95 %", "limit")
    lines += _as_html(heads, map(_drift_cells, found["lost"]["drift"]))
    lines.append(f"<p>{escape(found['lost']['note'])}</p>")
    return "\n".join([*lines, "<h2>Cost</h2>", *_as_html(("", ""), found["cost"])])


def _as_html(heads: Sequence[str], rows: Any) -> Iterator[str]:
    yield "<table><tr>" + "".join(f"<th>{head}" for head in heads)
    for row in rows:
        cells = (
            f"<td class='{cell}'>{cell}" if isinstance(cell, Text) else f"<td>{escape(cell)}"
            for cell in row
        )
        yield "<tr>" + "".join(cells)
    yield "</table>"


def draw(found: Verdict) -> str:
    """Returns the verdict as a picture (SVG) of what is printed."""
    console = make_console(io.StringIO())
    console.width, console.record = WIDTH, True
    for shown in show(found):
        console.print(shown)
    svg = console.export_svg(title="make verdict", unique_id="verdict")
    start, end = svg.index("@font-face"), svg.rindex("@font-face")
    return svg[:start] + svg[svg.index("}", end) + 1 :]  # the fonts are addresses of others
