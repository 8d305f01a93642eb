"""Every command in the docs exists, and every override in them fits the schema."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

from sft.config.load import parse_generation
from sft.errors import ExitCode
from sft.tasks.registry import load_run

DOCS = [ROOT / "README.md", ROOT / "nano/README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, re.MULTILINE))
VARIABLES = {
    *("CONFIG", "ARGS", "RUN", "NUM_PROCESSES", "ACCELERATE_CONFIG", "AUTO", "DEEPSPEED", "OUTPUT"),
    *("ADAPTER", "SYSTEM", "AGENT"),
    *("BASE", "MERGED", "GGUF", "LLAMA_CPP"),
    *("DTYPE", "PROMPT", "PORT", "OUTPUTS", "VENV_TOO", "PYTHON", "INPUT", "ROW", "IDS"),
    *("GPU", "GIB", "MODEL", "TUNING", "SEQ", "UNIFORM", "COMPARE", "JSON", "TUNE"),
    *("A", "B", "METRIC", "SHOW"),
    *("NUM_MACHINES", "MACHINE_RANK", "MASTER_ADDR", "MASTER_PORT"),
}


def commands() -> list[tuple[str, str]]:
    found = []
    for path in DOCS:
        text = path.read_text()
        code = re.findall(r"```(?:bash|console)?\n(.*?)```", text, re.DOTALL)
        lines = [line.removeprefix("$ ") for block in code for line in block.splitlines()]
        lines += re.findall(r"`(make [^`]+)`", text)
        found += [(path.name, line) for line in lines if line.startswith("make ")]
    return found


def test_the_docs_have_commands():
    assert len(commands()) >= 15


@pytest.mark.parametrize(("document", "command"), commands())
def test_a_command_in_the_docs_is_one_that_exists(document, command):
    words = shlex.split(command.split("#")[0])[1:]
    assignments = [word for word in words if "=" in word]
    for target in set(words) - set(assignments):
        assert target in TARGETS, document
    for assignment in assignments:
        name, value = assignment.split("=", 1)
        assert name in VARIABLES, document
        if name == "ARGS" and "generation." in value:
            assert words[0] in ("infer", "infer-batch")
            parse_generation(value.split())
        elif name == "ARGS":
            load_run(ROOT / configuration_of(command), value.split())
        if name == "CONFIG" and (ROOT / value).exists():
            load_run(ROOT / value)


@pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_of_a_document_leads_to_a_file(path):
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", path.read_text("utf-8")):
        assert (path.parent / target).exists(), target


def test_every_document_that_is_named_exists():
    folders = ("sft", "scripts", "benchmarks", "configs", "tests", "docs", "nano")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    named = {
        name
        for path in [ROOT / "README.md", ROOT / "Makefile", *files]
        if path.suffix in {".py", ".md", ".yaml", ""} and path.is_file()
        for name in re.findall(r"\bdocs/[\w/]+\.md\b", path.read_text("utf-8", errors="replace"))
    }
    assert len(named) > 10
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_the_log_is_newest_first_with_short_lines():
    text = (ROOT / "docs/LOG.md").read_text("utf-8")
    dates = re.findall(r"^## (\d{4}-\d{2}-\d{2}) \S", text, re.MULTILINE)
    assert dates == sorted(dates, reverse=True)
    assert len(dates) == text.count("\n## ") > 20
    assert max(map(len, text.splitlines())) < 120


def configuration_of(command: str) -> str:
    """The file whose keys a command overrides."""
    is_darkroom = "darkroom" in command
    return "configs/ad_darkroom.yaml" if is_darkroom else "configs/nano.yaml"


def test_every_variable_of_the_docs_is_read_by_the_makefile():
    exported = set(re.findall(r"^export ([A-Z_ ]+)$", MAKEFILE, re.MULTILINE)[0].split())
    launch = (ROOT / "sft/runtime/world.py").read_text()
    for name in VARIABLES:
        read = name in exported and f'"{name}"' in launch
        assert read or re.search(rf"\$\((or \$\()?{name}\)", MAKEFILE), name


def test_help_lists_every_target_once():
    told = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = re.findall(r"^  \S*?\x1b\[36m([a-z-]+)", told.stdout, re.MULTILINE)
    assert sorted(listed) == sorted(TARGETS)
    plain = re.sub(r"\x1b\[\d+m", "", told.stdout)
    assert max(map(len, plain.splitlines())) <= 120


def test_clean_removes_caches_and_outputs_only_when_told(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("outputs/run", "sft/__pycache__", ".venv/lib/__pycache__", ".ruff_cache"):
        (tmp_path / name).mkdir(parents=True)
    for arguments, left in (
        ([], {"Makefile", "outputs", "sft", ".venv"}),
        (["OUTPUTS=1"], {"Makefile", "sft", ".venv"}),
        (["VENV_TOO=1"], {"Makefile", "sft"}),
    ):
        subprocess.run(["make", "clean", *arguments], cwd=tmp_path, check=True, capture_output=True)
        assert {path.name for path in tmp_path.iterdir()} == left
        assert not (tmp_path / "sft/__pycache__").exists()
        assert (tmp_path / ".venv/lib/__pycache__").exists() == (".venv" in left)


def test_the_environment_is_made_once_and_again_when_the_pins_change(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    pins, stamp = tmp_path / "requirements.txt", tmp_path / ".venv/.installed"

    def installs() -> bool:
        command = ["make", "-n", "setup"]
        told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return "pip install" in told.stdout

    pins.touch()
    assert installs()
    stamp.parent.mkdir()
    stamp.touch()
    assert not installs()
    os.utime(pins, (stamp.stat().st_mtime + 10,) * 2)
    assert installs()


def names_of_the_map(block: str) -> Iterator[str]:
    """Yields 'data/cache', 'tasks/sft/task' ... as the map of docs/DESIGN.md lists them."""
    for line in re.sub(r"\n {12}", " ", block).splitlines():
        folder, _, rest = line.partition(" ")
        if folder.endswith(".py"):
            yield folder.removesuffix(".py")
            continue
        known = ", ".join(
            re.findall(r"(?:[a-z_]+/\{[^}]*\}|[a-z_]+)(?:, (?:[a-z_]+/\{[^}]*\}|[a-z_]+))*$", rest)
        )
        for inner, names in re.findall(r"([a-z_]+)/\{([^}]*)\}", known):
            yield from (f"{folder}{inner}/{name.strip()}" for name in names.split(","))
        plain = re.sub(r"[a-z_]+/\{[^}]*\}", "", known)
        yield from (f"{folder}{name}" for name in re.findall(r"[a-z_]+", plain))


def test_the_map_of_the_design_names_every_module():
    text = (ROOT / "docs/DESIGN.md").read_text("utf-8")
    (block,) = (
        b for b in re.findall(r"```\n(.*?)```", text, re.DOTALL) if b.startswith("errors.py")
    )
    package = ROOT / "sft"
    files = {file.relative_to(package).with_suffix("") for file in package.rglob("*.py")}
    assert {str(file) for file in files if not file.name.startswith("__")} == set(
        names_of_the_map(block)
    )


def test_every_script_is_a_target():
    scripts = {path.name for path in (ROOT / "scripts").glob("*.py")}
    assert scripts == set(re.findall(r"scripts/(\w+\.py)", MAKEFILE))


def test_no_path_of_a_machine_is_committed():
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    for name in filter(None, tracked.stdout.split("\0")):
        path = ROOT / name
        if path.is_file() and path.suffix in {".py", ".md", ".yaml", ".json", ""}:
            text = path.read_text("utf-8", errors="replace")
            assert str(ROOT.parent) + "/" not in text, name


def test_the_table_of_exit_codes_names_them_all():
    text = (ROOT / "docs/RUNS.md").read_text("utf-8")
    table = text[text.index("| exit code |") :].split("\n\n")[0]
    rows = re.findall(r"^\| ([\d, ]+) \|", table, re.MULTILINE)
    assert [int(code) for row in rows for code in row.split(",")] == [*ExitCode]


# --- docs/RELIABILITY.md -------------------------------------------------------------------------

RELIABILITY = (ROOT / "docs/RELIABILITY.md").read_text("utf-8")
PARAGRAPHS = [
    *(
        "Exit codes",
        "Exact resume",
        "Checkpoint atomicity",
        "Corruption",
        "Preemption",
        "Processes",
    ),
    *("Numbers", "Rows", "Configuration", "Security", "Not reproduced here, and why"),
]


def names_in(file: Path) -> set[str]:
    tree = ast.parse(file.read_text("utf-8"))
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    return {name for name in names if name.startswith("test_")}


def test_every_paragraph_of_the_faults_has_its_heading():
    assert re.findall(r"^## (.+)$", RELIABILITY, re.MULTILINE) == PARAGRAPHS


def test_every_fault_has_a_test_that_exists():
    rows = [line for line in RELIABILITY.splitlines() if line.startswith("|")]
    faults = [
        row for row in rows if row not in ("| fault | what the run does | test |", "|---|---|---|")
    ]
    assert len(faults) > 70
    exist = {path.name: names_in(path) for path in (ROOT / "tests").glob("test_*.py")}
    for row in faults:
        cells = re.split(r"(?<!\\)\|", row.strip("|"))
        assert len(cells) == 3, row
        named = re.findall(r"`tests/(test_\w+\.py)::(test_\w+)`", cells[2])
        assert named, row
        for file, name in named:
            assert name in exist.get(file, ()), row
    assert max(map(len, RELIABILITY.splitlines())) <= 220
