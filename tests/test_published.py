"""The numbers of others that predictions are compared with, and what is reported of the errors."""

from __future__ import annotations

import json
import re
import statistics
import sys
from dataclasses import replace

import pytest
from conftest import ROOT
from shapes import SIZES, configured
from transformers import LlamaConfig

sys.path.append(str(ROOT / "benchmarks"))

import published

from sft.config.load import with_values
from sft.plan import dry_run

RESULTS = json.loads((ROOT / "benchmarks/results/memory.json").read_text("utf-8"))["published"]


def test_every_published_number_is_compared_or_left_out_with_a_reason(shared):
    text = (shared / "reference/memory_published.md").read_text("utf-8")
    cells = [c for line in text.splitlines() if line.startswith("|") for c in line.split("|")]
    sizes = [float(n) for c in cells for n in re.findall(r"(?<![\w.-])\d+\.\d+(?![\w-])", c)]
    sizes = [n for n in sizes if n not in {1.8, 1.3}]  # billions of parameters
    sentences = ("Weights only", "q,v r8", "82.4 GiB", "fitcheck-llm")
    for line in text.splitlines():
        if line.startswith(sentences):
            plain = re.sub(r"phi-1\.5|-1\.[17]B|Qwen2\.5-1\.5B|0\.2\.0|torch 2\.\d", "", line)
            sizes += map(float, re.findall(r"(?<![\w.])\d+\.\d+(?![\w])", plain))
    given = {row.measured_bytes for row in published.rows()}
    left_out = " ".join(number for number, _ in published.EXCLUDED)
    lost = [n for n in sizes if not {n * 1e9, n * 2**30} & given and f" {n:.2f} GB" not in left_out]
    assert len(sizes) > 70
    assert not lost
    assert all(reason for _, reason in published.EXCLUDED)


def test_results_are_of_the_rows_that_there_are():
    found = [(row["source"], row["what"], row["measured_bytes"]) for row in RESULTS["rows"]]
    assert found == [(row.source, row.what, row.measured_bytes) for row in published.rows()]


@pytest.mark.parametrize("file", ["docs/PLAN.md", "docs/STATUS.md"])
def test_documents_report_median_and_worst_by_kind(file):
    text = " ".join((ROOT / file).read_text("utf-8").split())
    for kind in {row["kind"] for row in RESULTS["rows"]}:
        errors = [r["error"] for r in RESULTS["rows"] if r["kind"] == kind and not r["is_bound"]]
        median, worst = statistics.median(map(abs, errors)), max(errors, key=abs)
        assert f"{kind} {100 * median:.1f} % ({100 * worst:+.0f} %)" in text, file


def test_bitsandbytes_kept_inputs_of_frozen_layers_before_0_45(tmp_path):
    config = configured(tmp_path, LlamaConfig(**SIZES), "qlora", gradient_checkpointing=False)
    config = with_values(config, {"tuning.target_modules": published.QV})
    row = next(row for row in published.rows() if row.old_nf4)
    kept = []
    for old in (True, False):
        changed = replace(row, old_nf4=old)
        with published.their_step(changed):
            window = published.uniform(4, 64)
            trace = dry_run.trace_step(config, "bf16", window, on_gpu=True)
        kept.append(trace.peak().breakdown["activations"])
    tokens, layers = 4 * 64, SIZES["num_hidden_layers"]
    # The input of the MLP's last projection is kept, which no other operation keeps.
    assert kept[0] - kept[1] >= tokens * layers * SIZES["intermediate_size"] * 2
