"""docs/MODELS.md: the document is its JSON, and a sample of its cells is computed again."""

from __future__ import annotations

import importlib.util
import json

import families
import pytest
import torch
from conftest import ROOT, representatives

from sft.models.attention import keep_documents_apart

spec = importlib.util.spec_from_file_location("models", ROOT / "benchmarks/models.py")
models = importlib.util.module_from_spec(spec)
spec.loader.exec_module(models)
STORED = json.loads(models.RESULTS.read_text("utf-8"))
PACKED = ["llama", "gemma3", "qwen3_moe", "qwen2_5_vl", "lfm2", "jamba", "gpt_oss"]


def test_the_document_is_what_the_benchmark_stored():
    assert (ROOT / "docs/MODELS.md").read_text("utf-8") == models.document(STORED), "make docs"


def test_the_matrix_has_thirty_types_with_every_cell():
    assert len(STORED["types"]) >= 30
    assert all(cells.keys() == models.COLUMNS.keys() for cells in STORED["types"].values())


@pytest.mark.parametrize("model_type", PACKED)
def test_what_the_matrix_says_about_packing_is_true(model_type):
    isolated = keep_documents_apart(families.tiny_model(model_type), "fp32", torch.device("cpu"))
    assert isolated == (not STORED["types"][model_type]["packed"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "cells"),
    representatives([("lfm2", ["packed"]), ("t5", ["full"]), ("gemma3", ["LoRA", "merge"])], 2),
)
def test_cells_of_the_matrix_are_found_again(model_type, cells, tmp_path):
    found = models.measure(model_type, tmp_path, cells)
    assert found == {cell: STORED["types"][model_type][cell] for cell in cells}
