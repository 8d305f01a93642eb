"""The packages are imported in one order, and no module is part of a circle of imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "sft"

# The pipeline. What stands here imports only from names before it, inside functions too.
ORDER = [
    "errors",
    "config",
    "runtime",
    "models",
    "data",
    "train",
    "evaluate",
    "tasks",
    "plan",
    "serve",
    "run",
    "check",
    "verify",
    "cli",
    "api",
    "commands",
    "__main__",
]


def dotted(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {dotted(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def imported(source: str, package: str) -> Iterator[str]:
    """Yields the full name of everything that `source` imports anywhere; `package`: where it is."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: 1 - node.level or None] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def used(module: str) -> set[str]:
    """Returns the modules of the package that `module` imports."""
    found = set()
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    for name in imported(MODULES[module].read_text("utf-8"), package):
        if name.split(".")[0] == "sft":
            found.add(name if name in MODULES else name.rpartition(".")[0])
    return found - {module}


def place(module: str) -> int:
    return ORDER.index(module.split(".")[1])


INNER = [module for module in MODULES if module != "sft"]


@pytest.mark.parametrize("module", INNER)
def test_a_module_imports_only_from_packages_before_its_own(module):
    later = [name for name in used(module) if name != "sft" and place(name) > place(module)]
    assert later == []


def test_no_module_imports_itself_by_way_of_others():
    TopologicalSorter({module: used(module) for module in INNER}).prepare()  # raises CycleError


def test_every_package_has_its_place_and_modules_have_nouns_for_names():
    assert {module.split(".")[1] for module in INNER} == set(ORDER)
    names = {part for module in MODULES for part in module.split(".")}
    assert names.isdisjoint({"utils", "util", "helpers", "common", "misc"})


@pytest.mark.parametrize(
    "module",
    [
        *(m for m in INNER if m.startswith("sft.config")),
        "sft.errors",
        "sft.cli",
        "sft.tasks.registry",
        "sft.tasks.distill.config",
        "sft.data.batches",
        "sft.data.formats",
        "sft.data.files",
        "sft.data.readers",
        "sft.data.split",
        "sft.evaluate.metrics",
        "sft.runtime.children",
    ],
)
def test_what_refuses_a_configuration_imports_no_torch(module):
    heavy = {"torch", "transformers", "accelerate", "peft", "bitsandbytes", "deepspeed"}
    source = MODULES[module].read_text("utf-8")
    assert heavy.isdisjoint(name.split(".")[0] for name in imported(source, "sft"))


TASKS = ("sft.tasks.crowd", "sft.tasks.distill")


@pytest.mark.parametrize(
    "module", [m for m in INNER if not m.startswith((*TASKS, "sft.config", "sft.tasks.registry"))]
)
def test_only_the_registry_knows_crowds_and_distillation(module):
    tree = ast.parse(MODULES[module].read_text("utf-8"))
    names = {getattr(node, "id", getattr(node, "attr", "")) for node in ast.walk(tree)}
    texts = {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    words = ("crowd", "distill", "darkroom")
    assert [text for text in names | texts if any(word in text.lower() for word in words)] == []


def test_the_search_for_imports_sees_every_form():
    source = """
import os, sft.run
from sft import check as preflight
from sft.config.load import load_config
from . import model
from .plan import table
def f():
    from sft.train import engine
"""
    assert set(imported(source, "sft")) == {
        "os", "sft.run", "sft.check", "sft.config.load.load_config", "sft.model",
        "sft.plan.table", "sft.train.engine",
    }  # fmt: skip
    assert set(imported("from ..export import x", "sft.tasks")) == {"sft.export.x"}
