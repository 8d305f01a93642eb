"""Traces on disk: found again for equal inputs and code, made anew otherwise or when damaged."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import shapes
from shapes import uniform_window
from transformers import LlamaConfig

from sft.config.schema import Config
from sft.plan import dry_run, memory, records
from sft.plan.records import Traced, load_or_trace

WINDOW = uniform_window(2, 16, 8)
INPUTS = ("a model", "fp32", WINDOW)
FOUND = Traced({"forward 1": {"weights": 7}}, 9, "traced", 0.5, 3, 4)


class Tracer:
    """Returns a result, and counts how often it was called."""

    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return FOUND


@pytest.fixture
def tracer() -> Tracer:
    return Tracer()


def test_a_result_is_found_again(tmp_path, tracer):
    for _ in range(2):
        assert load_or_trace(tmp_path / "traces", INPUTS, tracer) == FOUND
    assert tracer.calls == 1
    assert load_or_trace(tmp_path / "traces", (*INPUTS, "other"), tracer) == FOUND
    assert tracer.calls == 2


@pytest.mark.parametrize("change", ["code", "library"])
def test_changed_code_is_traced_anew(tmp_path, tracer, monkeypatch, change):
    package = tmp_path / "package"
    (package / "plan").mkdir(parents=True)
    (package / "plan/step.py").write_text("a = 1\n")
    monkeypatch.setattr(records, "PACKAGE", package)
    load_or_trace(tmp_path / "traces", INPUTS, tracer)
    if change == "code":
        (package / "plan/step.py").write_text("a = 2\n")
    else:
        monkeypatch.setattr(records, "version", lambda name: f"1.0 of {name}")
    records.code_sha256.cache_clear()  # as a new process
    load_or_trace(tmp_path / "traces", INPUTS, tracer)
    records.code_sha256.cache_clear()
    assert tracer.calls == 2


@pytest.mark.parametrize(
    "damaged", ["", "{", '{"phases": {"forward 1": {"weights": "many"}}}', "[1, 2]", "\udcff"]
)
def test_a_damaged_file_is_replaced(tmp_path, tracer, damaged):
    load_or_trace(tmp_path, INPUTS, tracer)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damaged.encode("utf-8", "surrogateescape"))
    assert load_or_trace(tmp_path, INPUTS, tracer) == FOUND
    assert tracer.calls == 2
    assert file.read_bytes() == whole


@pytest.mark.parametrize("above", ["file", "missing"])
def test_a_folder_that_cannot_be_made_costs_nothing_but_time(tmp_path, tracer, above):
    (tmp_path / "file").write_text("no folder")
    for _ in range(2):
        assert load_or_trace(tmp_path / above / "traces", INPUTS, tracer) == FOUND
    assert tracer.calls == 2
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_files_used_longest_ago_go(tmp_path, tracer, monkeypatch):
    monkeypatch.setattr(records, "KEPT_TRACES", 2)
    names: list[Path] = []
    for i in range(3):
        load_or_trace(tmp_path, (i,), tracer)
        new = set(tmp_path.iterdir()) - set(names)
        names += new
        for age, name in enumerate(reversed(names)):
            if name.exists():
                os.utime(name, (1000 - age, 1000 - age))
        load_or_trace(tmp_path, (0,), tracer)  # is used each time
    assert set(tmp_path.iterdir()) == {names[0], names[2]}
    assert tracer.calls == 3


@pytest.fixture
def config(tmp_path) -> Config:
    config = shapes.configured(tmp_path, LlamaConfig(**shapes.SIZES))
    Path(config.data.cache_dir).mkdir()
    return config


@pytest.fixture
def count_traces(monkeypatch) -> list[int]:
    """Grows by an item for each step that is traced."""
    traced, real = [], dry_run.trace_step

    def count(*arguments, **options):
        traced.append(1)
        return real(*arguments, **options)

    monkeypatch.setattr(dry_run, "trace_step", count)
    return traced


def test_a_plan_in_a_new_process_traces_nothing(config, count_traces):
    def predict(length: int, **options: bool) -> memory.Memory:
        memory._trace.cache_clear()  # as a new process
        return memory.predict(config, "fp32", uniform_window(2, length, 8), **options)

    first = predict(16, on_gpu=False)
    assert len(count_traces) == 1
    assert predict(16, on_gpu=False) == first
    assert len(count_traces) == 1
    longer = predict(32, on_gpu=False)
    assert longer.allocated > first.allocated
    predict(16, on_gpu=True)
    predict(16, on_gpu=False, evaluation=True)
    assert len(count_traces) == 4
    assert len(list(Path(config.data.cache_dir, "traces").iterdir())) == 4


def test_a_model_folder_that_changes_is_traced_anew(config, count_traces):
    before = memory.predict(config, "fp32", WINDOW, on_gpu=False)
    wider = LlamaConfig(**shapes.SIZES | {"intermediate_size": 3 * shapes.SIZES["hidden_size"]})
    wider.save_pretrained(config.model.name)
    memory._trace.cache_clear()
    memory.count_at_depth.cache_clear()
    after = memory.predict(config, "fp32", WINDOW, on_gpu=False)
    assert len(count_traces) == 2
    assert after.allocated != before.allocated
