"""Optimizers by name and by import path: laws 1 and 2 on every engine, or refused with the reason.

The table of docs/OPTIMIZERS.md is what these tests check, cell by cell.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import forked
import optimizer_worker
import pytest
import tiny
import torch
from conftest import ROOT
from engine_worker import STEPS, rows

from sft.errors import ConfigError
from sft.train.parallel.trial import refuse_unusable

ENGINES = ("ddp", "fsdp", "zero2", "zero3")


def table() -> dict[str, list[str]]:
    """Returns the cells of each optimizer: DDP, FSDP2, ZeRO."""
    lines = (ROOT / "docs/OPTIMIZERS.md").read_text("utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| optimizer | one process"))
    found = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        found[name.strip("`")] = cells[:3]
    return found


CELLS = {
    (name, engine): cells[min(ENGINES.index(engine), 2)]
    for name, cells in table().items()
    for engine in ENGINES
}
WORKING = [cell for cell, text in CELLS.items() if text == "yes"]
REASONS = {
    "matrices": "updates a weight from others of its matrix",
    "library": "calls operations of bitsandbytes",
    "early": "keeps state before its first step",
    "together": "keeps values for all parameters together",
}


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("optimizers")
    for stage in (2, 3):
        settings = json.loads((ROOT / f"configs/deepspeed_z{stage}.json").read_text())
        (out / f"zero{stage}.json").write_text(json.dumps(settings))
    return out


@pytest.fixture(scope="module")
def alone(out) -> dict[str, dict]:
    """What one process sees, by optimizer."""
    seen = {}
    for name in table():
        own = [rows(step) for step in range(STEPS)]
        seen[name] = optimizer_worker.try_out("one", name, out, own)
    return seen


@pytest.fixture(scope="module")
def ranks(out) -> Callable[[str, str], list[dict]]:
    """What both ranks see of an optimizer with an engine, whose processes try all optimizers."""
    printed: dict[str, str] = {}

    def see(name: str, engine: str) -> list[dict]:
        if engine not in printed:
            names = [each for each, its in WORKING if its == engine]
            worker = "tests/support/optimizer_worker.py"
            printed[engine] = forked.launch(2, [worker, str(out), engine, *names])
        files = sorted(out.glob(f"{engine}-{name}.rank*.pt"))
        assert len(files) == 2, printed[engine]
        return [torch.load(file) for file in files]

    return see


@pytest.mark.parametrize("name", table())
def test_one_process_resumes_bit_for_bit(alone, name):
    assert alone[name]["loaded"]
    assert alone[name]["resumed"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "engine"), WORKING)
def test_two_processes_are_one_and_resume_bit_for_bit(ranks, alone, name, engine):
    both = ranks(name, engine)
    assert all(rank["loaded"] and rank["resumed"] for rank in both)
    first = both[0]
    for part in ("saved", "weights"):
        for key, value in first[part].items():
            expected = alone[name][part][key]
            assert torch.allclose(value, expected, rtol=1e-4, atol=2e-6), (part, key)


@pytest.mark.parametrize(("name", "engine"), CELLS)
def test_the_table_says_what_is_refused_and_why(tmp_path, name, engine):
    given = optimizer_worker.settings_of(name) | {"engine": engine}
    if engine.startswith("zero"):
        given |= {"engine": "deepspeed", "deepspeed_config": "z.json"}
    train = tiny.config(tmp_path, **given).train
    if (text := CELLS[name, engine]) == "yes":
        refuse_unusable(train)
        return
    with pytest.raises(ConfigError, match=REASONS[text.removeprefix("refused: ")]):
        refuse_unusable(train)
