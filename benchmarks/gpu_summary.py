"""Reads what the parts of benchmarks/gpu.sh wrote: results.json, and whether the bar is met.

python benchmarks/gpu_summary.py FOLDER
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BAR, OVER_PEERS = 12_000, 1.2  # real tokens/s of LoRA on 8B at 4,096 tokens; over the best peer
BAR_CASE = "8B lora, rows of 4,096 tokens"  # how benchmarks/gpu.py calls it
ENDED = {0: "ended", 124: "ran out of time", 137: "ran out of time"}


def results(out: Path) -> dict[str, Any]:
    """Returns how each part ended, and its measurements."""
    found: dict[str, Any] = {}
    for line in (out / "parts.txt").read_text("utf-8").splitlines():
        part, code, seconds = line.split()
        file = out / f"{part}.jsonl"
        lines = file.read_text("utf-8").splitlines() if file.exists() else []
        rows = [json.loads(each) for each in lines if each.endswith("}")]  # one may be half written
        found[part] = {"exit_code": int(code), "seconds": int(seconds), "raw": f"{part}.txt"}
        found[part]["rows"] = rows
    return found


def summary(found: dict[str, Any]) -> Iterator[str]:
    for part, values in found.items():
        state = ENDED.get(values["exit_code"], f"failed with {values['exit_code']}")
        yield f"{part}: {state} after {values['seconds']} s, {len(values['rows'])} measurements"
        for row in values["rows"]:
            yield from _line(row)
    errors = [abs(e) for r in rows_of(found, "memory") if (e := r.get("reserved_error"))]
    if errors:
        middle, worst = statistics.median(errors), max(errors)
        yield f"reserved memory, {len(errors)} steps: median error {middle:.1%}, worst {worst:.1%}"
    yield from bar(rows_of(found, "speed"))


def rows_of(found: dict[str, Any], part: str) -> list[dict[str, Any]]:
    return found.get(part, {}).get("rows", [])


def _line(row: dict[str, Any]) -> Iterator[str]:
    if reason := row.get("skipped"):
        yield f"  not measured: {reason}"
    elif reason := row.get("failed"):
        yield f"  FAILED: {reason}"
    elif "tokens_per_second" in row:
        share = row.get("share_of_peak")
        of_peak = f"{share:>5.0%} of peak" if share else ""
        speed = f"{row['tokens_per_second']:>9,.0f} tokens/s"
        yield f"  {row['who']:<25}{row.get('what', ''):<44}{speed}{of_peak}"
    elif "most_rows" in row:
        fits = {True: "which fits", False: "which does NOT fit", None: ""}[row["planned_fits"]]
        planned = f"planned {row['planned_rows']} rows, {fits}"
        yield f"  {row['what']}: {planned}; {row['most_rows']} run"


def bar(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yields whether LoRA on the large shape is as fast as it has to be."""
    case = [row for row in rows if row.get("what", "").startswith(BAR_CASE)]
    speeds = {row["who"]: row["tokens_per_second"] for row in case}
    own = speeds.pop("ours", None)
    if own is None:
        yield "bar: not measured"
        return
    verdict = "met" if own >= BAR else "NOT met"
    yield f"bar 1, {BAR:,} real tokens/s, {BAR_CASE}: {own:,.0f}, {verdict}"
    if not speeds:
        yield f"bar 2, {OVER_PEERS} times the best peer: no peer was measured beside it"
        return
    who = max(speeds, key=lambda each: speeds[each])
    ratio = own / speeds[who]
    verdict = "met" if ratio >= OVER_PEERS else "NOT met"
    yield f"bar 2, {OVER_PEERS} times the best peer ({who}): {ratio:.2f}, {verdict}"


def main(out: Path) -> None:
    found = results(out)
    (out / "results.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print(*summary(found), sep="\n")
    if os.environ.get("SFT_TEST_GPU") == "rehearse":
        print("a rehearsal of tiny shapes: its numbers mean nothing")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
