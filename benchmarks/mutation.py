"""Changes the code of law-bearing modules in small ways, and counts which changes no test notices.

    python -m pip install --target FOLDER mutmut==3.8.1
    PYTHONPATH=.:tests:tests/support:FOLDER OMP_NUM_THREADS=1 python benchmarks/mutation.py
        [--only sft/data/turns.py ...] [--tests tests/test_turns.py ...] [--sample 100]

The mutants are mutmut's, its runner is not: its trampolines change the signatures that this code
inspects. A mutant replaces its module in a copy of the repository, where processes that a test
starts find it, too. A fork of a process that has imported the libraries runs pytest: first the
tests that were seen to execute the mutated lines, the fastest first, then the other tests of
these files (they may have found the result in a cache), until `--seconds` of processor time are
planned.

Tests that start ranks (`tests/support/forked`) fork them from the mutated process, which takes no
seconds of imports. What ranks execute counts for the test that started them.

The mutants of a module are tried in a random order that its name and `--seed` seed, so `--sample`
is a uniform sample and a larger one contains it. Tests that were written for the survivors of a
sample are judged by that of another seed. A mutant that times out is tried again with more time,
since the machine may have been busy. A command replaces the parts of the modules that it tried, and
each part names its command; `--merge` takes parts from another report. The rest of the JSON file,
reasons of survivors and totals, is computed. Reasons come from `mutation_reasons.json`, where "no
effect:" begins the reason of a mutant that changes no result. `--survivors` tries again what
survived, and writes nothing.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import multiprocessing
import os
import random
import shlex
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
from hashlib import sha256
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
        *("engines", "crowd", "numbers"),
    ]
]
SLOW = [  # mostly in process, or with few ranks
    f"tests/test_{name}.py" for name in ("memory", "plan", "crowd", "laws", "engines", "numbers")
]
REASONS = ROOT / "benchmarks/mutation_reasons.json"
NO_EFFECT = "no effect:"
PATIENCE = 5  # times the usual limit, for a mutant that has timed out
LIBRARIES = ["torch", "transformers", "accelerate", "peft", "pytest", "hypothesis", "sacrebleu"]
LIBRARIES += ["scipy.stats", "datasets", "pyarrow", "rich", "pydantic", "ruamel.yaml", "sklearn"]
LIBRARIES += ["deepspeed", "bitsandbytes"]
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


@dataclass
class Trial:
    """A mutant, the source of its module, and the lines of the mutated node."""

    mutant: Mutant
    source: str
    lines: range


# -- mutants


def make_mutants(
    path: str, source: str, sample: int | None, seed: str = ""
) -> tuple[int, list[Trial]]:
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
    random.Random(path + seed).shuffle(eligible)
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


NEW_TEST = {"lines": [], "seconds": 0.0, "processor": 0.0, "passed": True}


class FileOfLines(set[tuple[str, int]]):
    """A set of lines that are appended to a file, which another process reads."""

    def __init__(self, path: Path):
        self.file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def add(self, line: tuple[str, int]) -> None:
        if line not in self:
            super().add(line)
            os.write(self.file, f"{line[0]} {line[1]}\n".encode())

    @staticmethod
    def take(path: Path) -> set[tuple[str, int]]:
        """Returns the lines of a file, and empties it."""
        if not path.exists():
            return set()
        lines = [line.rsplit(" ", 1) for line in path.read_text().splitlines()]
        os.truncate(path, 0)
        return {(file, int(number)) for file, number in lines}


def processor_seconds() -> float:
    """Returns the processor time of this process and of its children that have ended."""
    return sum(os.times()[:4])


def use_forks() -> None:
    """Makes ranks forks of this process, not of a server that would import everything."""
    if forked := sys.modules.get("forked"):
        vars(forked)["server"] = lambda: multiprocessing.get_context("fork")


class Trace:
    """A pytest plugin: records the lines of MODULES and the seconds of each test."""

    def __init__(self, root: Path):
        self.files = {str(root / path): path for path in MODULES}
        self.lines: set[tuple[str, int]] = set()
        self.fixtures: dict[str, set[tuple[str, int]]] = defaultdict(set)
        self.tests: dict[str, dict[str, Any]] = {}
        self.forks = root / ".forks.txt"  # lines that forks of a test execute
        os.register_at_fork(after_in_child=self._follow_fork)

    def _follow_fork(self) -> None:
        self.lines = FileOfLines(self.forks)

    def __call__(self, frame: Any, event: str, _: Any) -> Any:
        path = self.files.get(frame.f_code.co_filename)
        if path is not None:
            self.lines.add((path, frame.f_lineno))
            return self
        return None

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: Any) -> None:
        self.lines, self.started = set(), (time.perf_counter(), processor_seconds())
        use_forks()
        threading.settrace(self)
        sys.settrace(self)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        before, self.lines = self.lines, set()
        yield
        self.lines |= FileOfLines.take(self.forks)
        if fixturedef.scope != "function":
            self.fixtures[fixturedef.argname] |= self.lines
        self.lines |= before

    def pytest_runtest_logreport(self, report: Any) -> None:
        test = self.tests.setdefault(report.nodeid, dict(NEW_TEST))
        test["passed"] &= report.outcome == "passed"

    def pytest_runtest_teardown(self, item: Any) -> None:
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]
        self.lines |= FileOfLines.take(self.forks)
        seen = self.lines.union(*(self.fixtures[name] for name in item.fixturenames))
        test = self.tests.setdefault(item.nodeid, dict(NEW_TEST))
        seconds, processor = time.perf_counter() - self.started[0], processor_seconds()
        test |= {"lines": sorted(seen), "seconds": seconds}
        test["processor"] = processor - self.started[1]


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

    def __init__(self, seconds: dict[str, float], longest: dict[str, float], patience: int):
        self.longest, self.patience = longest, patience
        self.places = {name: place for place, name in enumerate(seconds)}
        self.failed = ""

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: Any) -> None:
        """Ends the process by SIGALRM if a test takes far longer than the longest of its file."""
        use_forks()
        limit = 20 + 4 * self.longest[item.nodeid.split("::")[0]]
        signal.setitimer(signal.ITIMER_REAL, limit * self.patience)

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
    """Returns tests for a mutant and their processor seconds, in the order in which they are tried.

    The first list is of one file, because most mutants end there and each file costs an import.
    """
    sound = {name: test for name, test in tests.items() if test["passed"]}
    seen = {
        name: {line for file, line in test["lines"] if file == path} for name, test in sound.items()
    }

    def fastest(names: list[str]) -> list[str]:
        return sorted(names, key=lambda name: sound[name]["processor"])

    first = fastest([name for name in seen if seen[name] & set(lines)])
    near = fastest([name for name in seen if seen[name] & set(function)])
    rest = fastest([name for name in seen if seen[name]])
    files = {name.split("::")[0] for name in rest}
    cached = fastest([name for name in sound if name.split("::")[0] in files])
    chosen, left = {}, seconds
    for name in dict.fromkeys([*first, *near, *rest, *cached]):
        left -= sound[name]["processor"]
        if left > 0:
            chosen[name] = sound[name]["processor"]
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


def longest_by_file(tests: dict[str, Any]) -> dict[str, float]:
    longest: dict[str, float] = defaultdict(float)
    for name, test in tests.items():
        file = name.split("::")[0]
        longest[file] = max(longest[file], test["seconds"])
    return longest


def try_patiently(seconds: dict[str, float], longest: dict[str, float]) -> tuple[str, str]:
    """Tries tests; if they time out, tries them again with more time: the machine may be busy."""
    if not seconds:  # pytest would fail, since there is nothing to run
        return "survived", ""
    outcome = try_tests(seconds, longest, 1)
    return try_tests(seconds, longest, PATIENCE) if outcome[0] == "timeout" else outcome


def try_tests(
    seconds: dict[str, float], longest: dict[str, float], patience: int
) -> tuple[str, str]:
    """Runs tests, of known seconds, in a fork and returns (outcome, the test that failed).

    `longest`: the seconds of the longest test of each file. `patience` multiplies all limits.
    """
    reader, writer = os.pipe()
    if not (pid := os.fork()):
        os.setsid()
        quiet = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(quiet, stream)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, 120 * patience)  # to import and collect
        code, chosen = 1, Chosen(seconds, longest, patience)
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
    source = (copy / path).read_text("utf-8")
    if not (pid := os.fork()):
        os.chdir(copy)
        forget(path)
        functions, longest = _function_lines(source), longest_by_file(tests)
        with os.fdopen(writer, "w") as out:
            for trial in trials:
                mutant = trial.mutant
                function = functions.get(mutant.function, range(0))
                (copy / path).write_text(trial.source, "utf-8")
                for names in choose_tests(tests, path, trial.lines, function, seconds):
                    mutant.outcome, mutant.killed_by = try_patiently(names, longest)
                    if mutant.outcome != "survived":
                        break
                print(json.dumps(asdict(mutant)), file=out, flush=True)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as lines_out:
        for line in lines_out:
            yield Mutant(**json.loads(line))
    os.waitpid(pid, 0)
    (copy / path).write_text(source, "utf-8")


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


def report(copy: Path, path: str, tried: list[Mutant], total: int) -> dict[str, Any]:
    """Returns the part of a module."""
    survivors = [mutant for mutant in tried if mutant.outcome == "survived"]
    places = ("line", "function", "mutation")
    return {
        "command": ["python", "benchmarks/mutation.py", *sys.argv[1:]],
        "source": sha256((copy / path).read_bytes()).hexdigest()[:12],
        "mutants": total,
        "tried": len(tried),
        **{name: sum(m.outcome == name for m in tried) for name in OUTCOMES},
        "survivors": [
            {name: getattr(m, name) for name in places}
            for m in sorted(survivors, key=lambda m: (m.line, m.mutation))
        ],
    }


def sum_up(modules: dict[str, Any]) -> dict[str, Any]:
    """Adds reasons and percentages to the parts of modules, and returns the whole report."""
    reasons = json.loads(REASONS.read_text("utf-8"))
    columns = ("mutants", "tried", *OUTCOMES, "without_effect")
    for path, entry in modules.items():
        if "command" in entry:
            entry["command"] = without_output(entry["command"])
        for survivor in entry["survivors"]:
            survivor["reason"] = reasons.get(path, {}).get(survivor["mutation"], "")
        found = [survivor["reason"] for survivor in entry["survivors"]]
        entry["without_effect"] = sum(reason.startswith(NO_EFFECT) for reason in found)
        entry.update(_percentages(entry))
    total = {name: sum(entry[name] for entry in modules.values()) for name in columns}
    return {"rules": RULES, "total": total | _percentages(total), "modules": modules}


def without_output(command: str | list[str]) -> str:
    """Returns a command without the file that its report goes to."""
    words = shlex.split(command) if isinstance(command, str) else list(command)
    if "--json" in words:
        place = words.index("--json")
        del words[place : place + 2]
    return shlex.join(words)


def _percentages(count: dict[str, int]) -> dict[str, float]:
    """Returns the percentage of killed mutants: of all, and of those that change a result."""
    killed, tried = count["killed"] + count["timeout"], count["tried"]
    with_effect = tried - count["without_effect"]
    return {
        "killed_percent": round(100 * killed / tried, 1),
        "killed_percent_of_those_with_effect": round(100 * killed / with_effect, 1),
    }


def show(modules: dict[str, Any]) -> Table:
    columns = ("mutants", "tried", *OUTCOMES, "without_effect", "killed_percent")
    table = Table("module", *columns)
    for path, entry in modules.items():
        table.add_row(path, *(str(entry[name]) for name in columns))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", default=MODULES, help="modules to try; all by default")
    parser.add_argument("--tests", nargs="+", help="files of tests; by default all of TESTS")
    parser.add_argument("--sample", type=int, help="mutants of each module; all unless given")
    parser.add_argument("--seed", default="", help="of the order; another gives another sample")
    parser.add_argument("--seconds", type=float, default=15.0, help="of tests for a mutant")
    parser.add_argument("--survivors", action="store_true", help="try again, write nothing")
    parser.add_argument("--report", action="store_true", help="only add reasons and totals again")
    parser.add_argument(
        "--merge", type=Path, nargs="+", default=[], help="reports to take parts of"
    )
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/mutation.json")
    arguments = parser.parse_args()
    stored = json.loads(arguments.json.read_text("utf-8")) if arguments.json.exists() else {}
    modules = stored.get("modules", {})
    for other in arguments.merge:
        modules |= json.loads(other.read_text("utf-8"))["modules"]
    if not (arguments.report or arguments.merge):
        with tempfile.TemporaryDirectory() as work:
            for path, entry in try_modules(Path(work), arguments, modules):
                if not arguments.survivors:
                    modules[path] = entry
                    write(arguments.json, modules)
    if not arguments.survivors:
        write(arguments.json, modules)
        Console().print(show(modules))


def write(path: Path, modules: dict[str, Any]) -> None:
    ordered = {name: modules[name] for name in MODULES if name in modules}
    path.write_text(json.dumps(sum_up(ordered), indent=1) + "\n", "utf-8")


def try_modules(
    work: Path, arguments: argparse.Namespace, old: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields modules with their parts of the report."""
    sys.dont_write_bytecode = True
    copy = make_copy(work)
    os.environ.setdefault("SFT_SHARED", str(ROOT.parent / "shared"))
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    os.environ["PYTHONPATH"] = os.pathsep.join(str(copy / part) for part in PATHS)
    sys.path[:] = [str(copy / part) for part in PATHS] + sys.path
    for name in LIBRARIES:
        importlib.import_module(name)
    slow = [name for name in SLOW if name in (arguments.tests or SLOW)]
    tests = trace_tests(copy, arguments.tests or TESTS, "not slow")
    tests |= trace_tests(copy, slow, "slow") if slow else {}
    for path in arguments.only:
        total, trials = make_mutants(
            path, (copy / path).read_text("utf-8"), arguments.sample, arguments.seed
        )
        if arguments.survivors:
            known = {(s["line"], s["mutation"]) for s in old[path]["survivors"]}
            trials = [t for t in trials if (t.mutant.line, t.mutant.mutation) in known]
        tried = []
        for mutant in try_module(copy, path, tests, trials, arguments.seconds):
            tried.append(mutant)
            shown = f"{mutant.outcome:9}{path}:{mutant.line} {mutant.mutation}"
            print(f"{shown}  [{mutant.killed_by}]", flush=True)
        yield path, report(copy, path, tried, total)


if __name__ == "__main__":
    main()
