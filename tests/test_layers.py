"""Imports between modules go strictly downward, those inside functions included."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "sft"

# The single source of the layers: a module imports only from layers with a smaller number.
LAYERS = {
    "config": 0,
    "hardware": 0,
    "arrays": 0,
    "batching": 0,
    "log": 0.5,  # tells no secret that config knows
    "tensors": 0,
    "trace": 0,
    "cli": 1,
    "attention": 0.5,
    "model": 1,
    "recovery": 0.6,
    "parallel": 1.05,  # computes in the precision that processes resolves
    "checkpoint": 1.1,  # writes the pieces that parallel tells
    "guard": 1.2,  # tells the newest checkpoint
    "storage": 1.2,  # which checkpoints stay
    "processes": 1,
    "metrics": 1,
    "launcher": 1.1,  # its ranks are scripts, which cli ends with it
    "formats": 1,
    "data": 1.2,  # reads the rows that formats makes messages of
    "chat": 1.5,  # renders the rows that data reads
    "store": 1.6,  # keeps what chat rendered
    "similar": 1.65,  # compares rows
    "audit": 1.7,  # examines what is stored
    "prepare": 1.8,  # all of it
    "engine": 2,
    "predictions": 0.6,
    "generate": 2,
    "evaluate": 2.1,  # answers and scores
    "export": 2,
    "connector": 2.5,
    "infer": 3,
    "labels": 1.3,  # read from rows
    "compare": 3,
    "classification": 3.1,  # works as infer does
    "finetune": 3,
    "crowd.agents": 0.9,
    "crowd.diversity": 0,
    "crowd.aggregator": 2.2,  # is asked as generate asks
    "crowd.task": 3.1,  # what finetune does, for all agents
    "tasks": 3.2,
    "distill.darkroom": 0.1,
    "distill.curve": 0,
    "distill.source": 0.2,  # learns in rooms
    "distill.transformer": 0.3,  # over what sources did
    "distill.rollout": 0.4,
    "distill.histories": 1.3,
    "distill.task": 3,
    "profile": 2.1,  # of the engine's steps
    "distill.run": 4.5,  # cuts micro-batches as the plan does
    "merge": 3,
    "rehearsal": 3.5,  # runs a step of the task
    "memory": 3.6,  # predicts from rehearsals
    "confirm": 3.6,
    "plan": 4,
    "check": 5,
    "run": 5,
    "verify": 6,  # starts whole runs
}

MODULES = sorted(
    ".".join(file.relative_to(PACKAGE).with_suffix("").parts)
    for file in PACKAGE.rglob("*.py")
    if file.name != "__init__.py"
)


def imported(source: str, package: str = "sft") -> Iterator[str]:
    """Full names of everything that is imported anywhere in `source`; relative ones resolved."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: 1 - node.level or None] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def source_of(module: str) -> str:
    return Path(PACKAGE, *module.split(".")).with_suffix(".py").read_text("utf-8")


def used_modules(source: str, package: str = "sft") -> set[str]:
    """Modules of the package that `source` imports, by their names below it."""
    names = [name.split(".")[1:] for name in imported(source, package) if name.startswith("sft")]
    return {".".join(_module(parts)) if parts else "*" for parts in names}


def _module(parts: list[str]) -> list[str]:
    """Of sft.tasks.crowd.task.CrowdTune only crowd.task."""
    return parts[:2] if (PACKAGE / parts[0]).is_dir() else parts[:1]


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_layers_below(module):
    layer = LAYERS[module]
    for used in used_modules(source_of(module)) - {module}:
        assert LAYERS[used] < layer, f"{module} ({layer}) imports {used} ({LAYERS[used]})"


def test_every_module_has_a_layer_and_a_noun_for_a_name():
    assert set(MODULES) == set(LAYERS)
    names = {part for module in MODULES for part in module.split(".")}
    assert names.isdisjoint({"utils", "util", "helpers", "common", "misc"})


def test_the_package_itself_imports_nothing():
    assert list(imported((PACKAGE / "__init__.py").read_text("utf-8"))) == []


@pytest.mark.parametrize(
    "module", ["config", "cli", "batching", "formats", "data", "labels", "metrics"]
)
def test_what_a_script_needs_to_refuse_a_configuration_imports_no_torch(module):
    heavy = {"torch", "transformers", "accelerate", "peft", "bitsandbytes", "deepspeed"}
    assert heavy.isdisjoint(name.split(".")[0] for name in imported(source_of(module)))


def test_the_search_for_imports_sees_every_form():
    source = """
import os, sft.log
from sft import chat as talk, data
from sft.config import Config
from . import model
from .plan import table
def f():
    from sft import engine
    if True:
        import sft.run as run
"""
    assert used_modules(source) == {
        "log", "chat", "data", "config", "model", "plan", "engine", "run"
    }  # fmt: skip
    assert used_modules("from ..export import x", "sft.crowd") == {"export"}
    assert used_modules("import sft") == {"*"}  # in no layer: refused
