"""README is short, and every measured number in it is read from benchmarks/results/."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from conftest import ROOT

from sft.evaluate import verdict

README = (ROOT / "README.md").read_text("utf-8")
RESULTS = ROOT / "benchmarks/results"


def result(name: str) -> Any:
    return json.loads((RESULTS / name).read_text("utf-8"))


def training(data: str, case: str) -> float:
    rows = result("throughput.json")["summary"]
    (row,) = (row for row in rows if (row["data"], row["case"]) == (data, case))
    return row["ours_over"]


def preparing(rows: int) -> float:
    seconds = {
        r["what"]: r["seconds"] for r in result("prepare.json")["results"] if r["rows"] == rows
    }
    return seconds["datasets.map"] / seconds["ours"]


# (start of the row, its second cell) -> what was measured. A row of the table has no other source.
RATIOS = {
    ("training, tokens", "TRL `SFTTrainer`"): lambda: training("documents", "TRL default"),
    ("", "TRL with `group_by_length`", 0): lambda: training("documents", "TRL group_by_length"),
    ("", "TRL with packing"): lambda: training("documents", "TRL packing"),
    ("training (LoRA, GSM8K)", "TRL `SFTTrainer`"): lambda: training("GSM8K", "TRL default"),
    ("", "TRL with `group_by_length`", 1): lambda: training("GSM8K", "TRL group_by_length"),
    ("answers, the same", "transformers"): lambda: result("inference.json")["60M"][
        "against_arrival"
    ],
    ("answers on two", "one process"): lambda: result("inference.json")["processes"][
        "two_against_one"
    ],
    ("preparing 1,000,000", "`datasets.map`"): lambda: preparing(1_000_000),
}


def ratio_rows() -> list[list[str]]:
    table = README[README.index("| what | against | ratio |") :].split("\n\n")[0]
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]
    ]


def test_every_ratio_is_the_measured_one():
    rows = ratio_rows()
    assert len(rows) == len(RATIOS)
    for (what, against, shown), (key, measured) in zip(rows, RATIOS.items(), strict=True):
        assert what.startswith(key[0]), (what, key)
        assert against.startswith(key[1]), (against, key)
        assert shown == f"{measured():.2f}", what


def test_what_make_train_prints_is_from_a_real_run():
    block = next(code for code in README.split("```")[1::2] if code.startswith("\n"))
    printed = (RESULTS / "nano/make_train.txt").read_text("utf-8")
    lines = [line.rstrip() for line in block.strip().splitlines()]
    assert 5 <= len(lines) <= 8
    assert [line for line in lines if line not in {p.rstrip() for p in printed.splitlines()}] == []


def test_the_picture_of_the_verdict_is_from_a_real_run():
    picture = (ROOT / "docs/verdict.svg").read_text("utf-8")
    assert "(docs/verdict.svg)" in README
    assert verdict.draw(result("nano/verdict.json")) == picture
    assert ElementTree.fromstring(picture).tag.endswith("svg")


MEMORY = README[README.index("| peak memory predicted for |") :].split("\n\n")[0]


def test_errors_of_predicted_memory_are_the_measured_ones_by_kind():
    rows, expected = result("memory.json")["published"]["rows"], []
    for kind in ("full", "LoRA", "QLoRA", "sharded"):
        errors = [r["error"] for r in rows if r["kind"] == kind and not r["is_bound"]]
        median, worst = statistics.median(map(abs, errors)), max(errors, key=abs)
        expected.append(f"| {kind} | {len(errors)} | {100 * median:.1f} % | {100 * worst:+.0f} % |")
    assert MEMORY.splitlines()[2:] == expected


def test_no_other_number_of_readme_is_a_measurement():
    text = re.sub(r"```.*?```", "", README, flags=re.DOTALL).replace(MEMORY, "")
    text = text.replace(README[README.index("| what | against | ratio |") :].split("\n\n")[0], "")
    decimals = re.findall(r"(?<![\w.])\d+\.\d+(?![\w.])", text)
    assert set(decimals) <= {"3.11", "2.0"}  # Python, the licence
    assert not re.search(r"\d (s|min|seconds|minutes|GiB|MiB|%)\b", text)


@pytest.mark.parametrize("path", [Path("README.md")])
def test_readme_fits_a_few_screens(path):
    lines = (ROOT / path).read_text("utf-8").splitlines()
    assert len(lines) <= 120
    first = next(i for i, line in enumerate(lines) if line.startswith("make "))
    assert len(" ".join(lines[:first]).split()) <= 60  # words before the first command
