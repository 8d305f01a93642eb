"""Changes the code of law-bearing modules in small ways, and counts which changes no test notices.

    python -m pip install --target FOLDER mutmut==3.8.1
    PYTHONPATH=.:tests:tests/support:FOLDER OMP_NUM_THREADS=1 python benchmarks/mutation.py
        [--modules sft/data/turns.py ...] [--sample 100] [--survivors] [--work WORKFOLDER]

The mutants are mutmut's, its runner is not: its trampolines change the signatures that this code
inspects. A mutant replaces its module in a copy of the repository, where processes that a test
starts find it, too. A fork of a process that has imported the libraries runs pytest: first the
tests that were seen to execute the mutated lines, the fastest first, then the other tests of
these files (they may have found the result in a cache), until `--seconds` of tests are planned.

The mutants of a module are tried in a random order that its name seeds, so `--sample` is a uniform
sample and a larger one contains it. `--survivors` tries only those that survived before, after new
tests. Reasons in the JSON file stay with the survivors they were written for.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
MODULES = [
    *("sft/train/engine.py", "sft/data/batches.py", "sft/runtime/checkpoint.py"),
    *(f"sft/train/parallel/{name}.py" for name in ("ddp", "deepspeed", "fsdp")),
    *(f"sft/data/{name}.py" for name in ("turns", "examples", "rendering", "ends", "sentinels")),
    *("sft/data/tokens.py", "sft/data/delimiters.py", "sft/serve/merge.py"),
    *("sft/evaluate/generate.py", "sft/evaluate/metrics.py"),
    *(f"sft/plan/{name}.py" for name in ("memory", "counts", "choose", "sharding", "plan")),
]
TESTS = [  # of these modules, without what mostly waits for processes
    f"tests/test_{name}.py"
    for name in [
        *("batches", "engine", "laws", "checkpoint", "branches", "turns", "examples"),
        *("template", "delimiters", "tokens", "tokenised", "public_rows", "hostile", "faults"),
        *("merge", "generate", "evaluate", "infer", "metrics", "compare", "plan"),
        *("memory", "trace", "calibration", "models", "export", "disk", "classify"),
        *("tasks", "attention", "parallel", "distill", "cache", "rendering", "sharding"),
    ]
]
SLOW = ["tests/test_memory.py", "tests/test_plan.py", "tests/test_crowd.py"]  # mostly in process
LIBRARIES = ["torch", "transformers", "accelerate", "peft", "pytest", "hypothesis", "sacrebleu"]
LIBRARIES += ["scipy.stats", "datasets", "pyarrow", "rich", "pydantic", "ruamel.yaml", "sklearn"]
RULES = (
    "no mutants of: annotations, docstrings; what is inside of a raise statement or of a call of "
    "say, warn, warning, info, debug or print; strings with a space (messages); aliases of types"
)
OUTCOMES = ("killed", "timeout", "survived")
PATHS = (".", "tests", "tests/support")
PYTEST = ("-p", "no:cacheprovider", "-W", "ignore")
TYPES = {"Literal", "TypeVar", "list", "dict", "tuple", "Callable", "cast"}
SILENT = {"say", "warn", "warning", "info", "debug", "print"}


@dataclass
class Mutant:
    """One change of a module, and what became of it."""

    line: int
    column: int
    function: str
    mutation: str  # "old -> new"
    outcome: str = ""  # killed, survived, timeout
    killed_by: str = ""
    reason: str = ""  # of a survivor that stays

    @property
    def key(self) -> str:
        return f"{self.line}:{self.column} {self.mutation}"


@dataclass
class Trial:
    """A mutant, the source of its module, and the lines of the mutated node."""

    mutant: Mutant
    source: str
    lines: range


# -- mutants


def make_mutants(path: str, source: str, sample: int | None) -> tuple[int, list[Trial]]:
    """Returns the number of a module's mutants, and those of the sample in random order."""
    import libcst as cst
    from libcst.metadata import MetadataWrapper, ParentNodeProvider, PositionProvider
    from mutmut.mutation.file_mutation import MutationVisitor
    from mutmut.mutation.mutators import mutation_operators
    from mutmut.mutation.pragma_handling import IgnoredCode

    visitor = MutationVisitor(mutation_operators, IgnoredCode(set(), set(), set()))
    module = MetadataWrapper(cst.parse_module(source)).visit(visitor)
    wrapper = MetadataWrapper(module, unsafe_skip_copy=True)
    places, parents = wrapper.resolve(PositionProvider), wrapper.resolve(ParentNodeProvider)

    def outer(node: cst.CSTNode) -> list[cst.CSTNode]:
        return [] if node is module else [node, *outer(parents[node])]

    def is_silent(node: cst.CSTNode) -> bool:
        name = getattr(node.func, "attr", node.func) if isinstance(node, cst.Call) else None
        called = isinstance(name, cst.Name) and name.value in SILENT
        return called or isinstance(node, cst.Raise)

    def is_alias(node: cst.CSTNode) -> bool:
        value = getattr(node, "value", None) if isinstance(node, cst.Assign) else None
        name = {cst.Subscript: "value", cst.Call: "func"}.get(type(value), "")
        return module.code_for_node(getattr(value, name, cst.Name("_"))) in TYPES

    def is_eligible(old: cst.CSTNode) -> bool:
        is_text = isinstance(old, cst.SimpleString) and " " in old.value
        return not is_text and old in places and not any(map(is_silent, outer(old)))

    eligible = [m for m in visitor.mutations if is_eligible(m.original_node)]
    random.Random(path).shuffle(eligible)
    eligible = [m for m in eligible if not any(map(is_alias, outer(m.original_node)))]
    result = []
    for mutation in eligible[:sample]:
        old, new = mutation.original_node, mutation.mutated_node
        where = places[old]
        names = [n.name.value for n in outer(old) if isinstance(n, cst.FunctionDef | cst.ClassDef)]
        shown = " -> ".join(" ".join(module.code_for_node(n).split()) for n in (old, new))
        if isinstance(old, cst.Name | cst.BaseNumber | cst.SimpleString | cst.ComparisonTarget):
            shown += f"  in  {source.splitlines()[where.start.line - 1].strip()}"
        mutant = Mutant(where.start.line, where.start.column, ".".join(reversed(names)), shown)
        lines = range(where.start.line, where.end.line + 1)
        result.append(Trial(mutant, module.deep_replace(old, new).code, lines))
    return len(eligible), result


# -- which tests execute which lines


class Trace:
    """A pytest plugin: records the lines of MODULES and the seconds of each test."""

    def __init__(self, root: Path):
        self.files = {str(root / path): path for path in MODULES}
        self.lines: set[tuple[str, int]] = set()
        self.fixtures: dict[str, set[tuple[str, int]]] = defaultdict(set)
        self.tests: dict[str, dict[str, Any]] = {}

    def __call__(self, frame: Any, event: str, _: Any) -> Any:
        path = self.files.get(frame.f_code.co_filename)
        if path is not None:
            self.lines.add((path, frame.f_lineno))
            return self
        return None

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: Any) -> None:
        self.lines, self.started = set(), time.perf_counter()
        threading.settrace(self)
        sys.settrace(self)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        before, self.lines = self.lines, set()
        yield
        if fixturedef.scope != "function":
            self.fixtures[fixturedef.argname] |= self.lines
        self.lines |= before

    def pytest_runtest_logreport(self, report: Any) -> None:
        test = self.tests.setdefault(report.nodeid, {"lines": [], "seconds": 0.0, "passed": True})
        test["passed"] &= report.outcome == "passed"

    def pytest_runtest_teardown(self, item: Any) -> None:
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]
        seen = self.lines.union(*(self.fixtures[name] for name in item.fixturenames))
        test = self.tests.setdefault(item.nodeid, {"lines": [], "seconds": 0.0, "passed": True})
        test |= {"lines": sorted(seen), "seconds": time.perf_counter() - self.started}


def trace_tests(copy: Path, tests: list[str], mark: str) -> dict[str, dict[str, Any]]:
    """Runs tests in a child and returns {test: its lines, seconds, whether it passed}."""
    found = copy / ".trace.json"
    if not (pid := os.fork()):
        os.chdir(copy)
        trace = Trace(copy)
        pytest.main([*tests, "-q", "-m", mark, *PYTEST], plugins=[trace])
        found.write_text(json.dumps(trace.tests))
        os._exit(0)
    os.waitpid(pid, 0)
    return json.loads(found.read_text())


class Chosen:
    """A pytest plugin: runs these tests in this order, and keeps the name of the first failure."""

    def __init__(self, seconds: dict[str, float]):
        self.seconds = seconds
        self.places = {name: place for place, name in enumerate(seconds)}
        self.failed = ""

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: Any) -> None:
        """Ends the process by SIGALRM if a test takes far longer than it did."""
        signal.setitimer(signal.ITIMER_REAL, 10 + 5 * self.seconds[item.nodeid])

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if item.nodeid in self.places]
        items.sort(key=lambda item: self.places[item.nodeid])

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.failed:
            self.failed = report.nodeid


def choose_tests(
    tests: dict[str, Any], path: str, lines: range, function: range, seconds: float
) -> list[dict[str, float]]:
    """Returns tests for a mutant with their seconds, in the order in which they are tried.

    The first list is of one file, because most mutants end there and each file costs an import.
    """
    sound = {name: test for name, test in tests.items() if test["passed"]}
    seen = {
        name: {line for file, line in test["lines"] if file == path} for name, test in sound.items()
    }

    def fastest(names: list[str]) -> list[str]:
        return sorted(names, key=lambda name: sound[name]["seconds"])

    first = fastest([name for name in seen if seen[name] & set(lines)])
    near = fastest([name for name in seen if seen[name] & set(function)])
    rest = fastest([name for name in seen if seen[name]])
    files = {name.split("::")[0] for name in rest}
    cached = fastest([name for name in sound if name.split("::")[0] in files])
    chosen, left = {}, seconds
    for name in dict.fromkeys([*first, *near, *rest, *cached]):
        left -= sound[name]["seconds"]
        if left > 0:
            chosen[name] = sound[name]["seconds"]
    inner = [name for name in first or near or rest if name in chosen]
    if not inner:
        return [chosen]
    by_file = Counter(name.split("::")[0] for name in inner)
    stem = Path(path).stem
    best = max(by_file, key=lambda file: (stem in file, by_file[file]))
    early = {name: chosen.pop(name) for name in inner if name.startswith(best + "::")}
    return [early, chosen]


# -- trials


def forget(path: str) -> None:
    """Imports the module, so that what it needs stays imported, and forgets it and its users."""
    name = path.removesuffix(".py").replace("/", ".")
    importlib.import_module(name)
    dirty = {name}
    while more := {
        other
        for other, module in list(sys.modules.items())
        if other.startswith("sft") and other not in dirty and _uses(module, dirty)
    }:
        dirty |= more
    for other in dirty:
        parent, _, child = other.rpartition(".")
        vars(sys.modules.get(parent, object)).get(child) and delattr(sys.modules[parent], child)
    for other in dirty:
        del sys.modules[other]


def _uses(module: Any, names: set[str]) -> bool:
    return any(
        getattr(value, "__module__", None) in names or getattr(value, "__name__", None) in names
        for value in list(vars(module).values())
    )


def try_tests(seconds: dict[str, float]) -> tuple[str, str]:
    """Runs tests, of known seconds, in a fork and returns (outcome, the test that failed)."""
    reader, writer = os.pipe()
    if not (pid := os.fork()):
        os.setsid()
        quiet = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(quiet, stream)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, 30)  # to import and collect
        code, chosen = 1, Chosen(seconds)
        try:
            files = sorted({name.split("::")[0] for name in seconds})
            code = pytest.main([*files, "-x", "-q", *PYTEST], plugins=[chosen])
        finally:
            os.write(writer, (chosen.failed or "import").encode()[:4000])
            os._exit(code)
    os.close(writer)
    _, status = os.waitpid(pid, 0)
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # what a test has left
    with os.fdopen(reader, errors="replace") as failed:
        name = failed.read() if os.WIFEXITED(status) else ""
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM:
        return "timeout", ""
    return ("survived", "") if status == 0 else ("killed", name)


def try_module(
    copy: Path, path: str, tests: dict[str, Any], trials: list[Trial], seconds: float
) -> Iterator[Mutant]:
    """Tries mutants of a module, in a child that has imported what the module needs."""
    reader, writer = os.pipe()
    if not (pid := os.fork()):
        os.chdir(copy)
        forget(path)
        source = (copy / path).read_text("utf-8")
        functions = _function_lines(source)
        with os.fdopen(writer, "w") as out:
            for trial in trials:
                mutant = trial.mutant
                function = functions.get(mutant.function, range(0))
                (copy / path).write_text(trial.source, "utf-8")
                for names in choose_tests(tests, path, trial.lines, function, seconds):
                    mutant.outcome, mutant.killed_by = try_tests(names)
                    if mutant.outcome != "survived":
                        break
                print(json.dumps(asdict(mutant)), file=out, flush=True)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as lines_out:
        for line in lines_out:
            yield Mutant(**json.loads(line))
    os.waitpid(pid, 0)
    shutil.copy(ROOT / path, copy / path)


def _function_lines(source: str) -> dict[str, range]:
    found: dict[str, range] = {}

    def visit(node: ast.AST, names: list[str]) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                own = [*names, child.name]
                found[".".join(own)] = range(child.lineno, (child.end_lineno or 0) + 1)
                visit(child, own)
            else:
                visit(child, names)

    visit(ast.parse(source), [])
    return found


# -- the report


def make_copy(folder: Path) -> Path:
    """Returns a copy of the repository, without what git ignores."""
    copy = folder / "copy"
    copy.mkdir(parents=True, exist_ok=True)
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).exists():
            shutil.copy2(ROOT / name, copy / name)
    if (ROOT / ".venv").exists() and not (copy / ".venv").exists():
        (copy / ".venv").symlink_to((ROOT / ".venv").resolve())
    return copy


def report(path: str, tried: list[Mutant], total: int, old: dict[str, Any]) -> dict[str, Any]:
    """Returns the entry of a module. Survivors keep the reasons that they had."""
    reasons = {entry["mutation"]: entry["reason"] for entry in old.get("survivors", [])}
    survivors = [mutant for mutant in tried if mutant.outcome == "survived"]
    count = {name: sum(m.outcome == name for m in tried) for name in OUTCOMES}
    killed = count["killed"] + count["timeout"]
    return {
        "mutants": total,
        "tried": len(tried),
        **count,
        "killed_percent": round(100 * killed / len(tried), 1) if tried else None,
        "survivors": [
            {
                "line": m.line,
                "function": m.function,
                "mutation": m.mutation,
                "reason": reasons.get(m.mutation, ""),
            }
            for m in sorted(survivors, key=lambda m: m.line)
        ],
    }


def show(results: dict[str, Any]) -> Table:
    table = Table("module", "mutants", "tried", *OUTCOMES, "killed %", "explained")
    for path, entry in results.items():
        explained = sum(bool(survivor["reason"]) for survivor in entry["survivors"])
        cells = [entry[name] for name in ("mutants", "tried", *OUTCOMES, "killed_percent")]
        table.add_row(path, *map(str, cells), str(explained))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--modules", nargs="+", default=MODULES)
    parser.add_argument("--sample", type=int, help="mutants of each module; all unless given")
    parser.add_argument("--seconds", type=float, default=15.0, help="of tests for a mutant")
    parser.add_argument("--survivors", action="store_true")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--work", type=Path, help="keeps the copy, the trace and the outcomes")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/mutation.json")
    arguments = parser.parse_args()
    sys.dont_write_bytecode = True
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        copy = make_copy(work)
        os.environ.setdefault("SFT_SHARED", str(ROOT.parent / "shared"))
        os.environ["PYTHONPATH"] = os.pathsep.join(str(copy / part) for part in PATHS)
        sys.path[:] = [str(copy / part) for part in PATHS] + sys.path
        for name in LIBRARIES:
            importlib.import_module(name)
        trace = work / "trace.json"
        if not trace.exists():
            trace.write_text(
                json.dumps(trace_tests(copy, TESTS, "not slow") | trace_tests(copy, SLOW, "slow"))
            )
        tests = json.loads(trace.read_text())
        for path in arguments.modules:
            if time.monotonic() - started < 60 * arguments.minutes:
                try_and_report(copy, path, tests, arguments, work)


def _outcome(known: dict[str, Mutant], trial: Trial) -> str:
    mutant = known.get(trial.mutant.key)
    return mutant.outcome if mutant else ""


def try_and_report(
    copy: Path, path: str, tests: dict[str, Any], arguments: argparse.Namespace, work: Path
) -> None:
    """Tries a module's mutants and rewrites its entry in the JSON file."""
    total, trials = make_mutants(path, (ROOT / path).read_text("utf-8"), arguments.sample)
    outcomes = work / (path.replace("/", "_") + ".json")
    known: dict[str, Mutant] = {}
    if outcomes.exists():
        known = {key: Mutant(**m) for key, m in json.loads(outcomes.read_text()).items()}
    again = ("", "survived") if arguments.survivors else ("",)
    new = [trial for trial in trials if _outcome(known, trial) in again]
    for mutant in try_module(copy, path, tests, new, arguments.seconds):
        known[mutant.key] = mutant
        outcomes.write_text(json.dumps({key: asdict(m) for key, m in known.items()}, indent=1))
        shown = f"{mutant.outcome:9}{path}:{mutant.line} {mutant.mutation}  [{mutant.killed_by}]"
        print(shown, flush=True)
    tried = [known[trial.mutant.key] for trial in trials]
    stored = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    old = stored.get("modules", {})
    entry = report(path, tried, total, old.get(path, {}))
    merged = {
        name: entry if name == path else old[name] for name in MODULES if name in {*old, path}
    }
    arguments.json.write_text(
        json.dumps(stored | {"rules": RULES, "modules": merged}, indent=1) + "\n"
    )
    Console().print(show({path: entry}))


if __name__ == "__main__":
    main()
