"""Every command in the docs exists, and every override in them fits the schema."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

import sft
from sft.commands import VERBS, run
from sft.config.load import parse_benchmark, parse_generation
from sft.errors import ExitCode, UserError
from sft.tasks.registry import load_run

DOCS = [ROOT / "README.md", ROOT / "nano/README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, re.MULTILINE))
ALIASES = {f"train-{kind}-tb" for kind in ("distributed", "fsdp", "deepspeed")}
VARIABLES = {*re.findall(r"^VARIABLES := ((?:.*\\\n)*.*)", MAKEFILE, re.MULTILINE)[0].split()} - {
    "\\"
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
        assert target in TARGETS | ALIASES, document
    for assignment in assignments:
        name, value = assignment.split("=", 1)
        assert name in VARIABLES, document
        if name == "ARGS" and "generation." in value:
            assert words[0] in ("infer", "infer-batch")
            parse_generation(value.split())
        elif name == "ARGS" and words[0] == "benchmark":
            parse_benchmark([word for word in value.split() if word.startswith("benchmark.")])
        elif name == "ARGS":
            load_run(ROOT / configuration_of(command), value.split())
        if name == "CONFIG" and (ROOT / value).exists():
            load_run(ROOT / value)


@pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_of_a_document_leads_to_a_file_and_a_heading(path):
    for target, anchor in re.findall(r"\]\(([^)#:\s]*)(?:#([^)\s]*))?\)", path.read_text("utf-8")):
        file = path.parent / target if target else path
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), f"{target}#{anchor}"


def anchors(file: Path) -> set[str]:
    """Returns the anchors that a reader's program makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", file.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}


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
        is_exported = name in exported and f'"{name}"' in launch
        form = rf"\$\((or \$\()*{name}\)|\$\(call (option|flag),[a-z-]+,{name}\)|\$\$\{{?{name}\b"
        assert is_exported or re.search(form, MAKEFILE), name


def listed() -> dict[str, str]:
    """Returns the targets that `make help` lists, with their lines."""
    printed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    plain = re.sub(r"\x1b\[\d+m", "", printed.stdout)
    assert len(plain.splitlines()) < 80
    assert max(map(len, plain.splitlines())) <= 120
    return dict(re.findall(r"^  ([a-z-]+) +(\S.*)", plain, re.MULTILINE))


def test_help_lists_every_target_once():
    assert sorted(listed()) == sorted(TARGETS)


def test_make_and_the_command_have_the_same_verbs_with_the_same_help():
    only_here = {
        "help",
        "setup",
        "nano",
        "test",
        "test-all",
        "test-gpu",
        "test-fast",
        "lint",
        "format",
    }
    lines = {name: line.split(" [")[0] for name, line in listed().items()}
    of_make = {name: lines[name] for name in lines.keys() - only_here - {"docs", "clean"}}
    assert of_make == {name: verb.help for name, verb in VERBS.items()}
    recipes = dict(re.findall(r"^([a-z-]+):.*\n\t@(\S+(?: \S+){0,3})", MAKEFILE, re.MULTILINE))
    for name in VERBS:  # each runs the verb of its own name
        assert recipes[name].startswith(("$(sft)", "$(run)", "$(BIN)/python -m sft $@")), name


def test_the_command_lists_its_verbs_in_both_forms(capsys):
    assert run("--help", []) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed and verb.help in printed for name, verb in VERBS.items())
    assert run("--version", []) == 0
    assert capsys.readouterr().out == f"sft {sft.__version__}\n"
    with pytest.raises(UserError, match="no verb 'trian'; did you mean train"):
        run("trian", [])
    done = subprocess.run(
        [sys.executable, "-m", "sft", "show-data", "--help"],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, "--row ROW" in done.stdout) == (0, True)


@pytest.mark.parametrize("word", ["CONFIGS=mine.yaml", "config=mine.yaml", "LR=1e-4"])
def test_a_variable_that_no_target_reads_is_refused(word):
    """It would be ignored, and `make train CONFIGS=mine.yaml` would train the default."""
    command = ["make", "help", word]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
    name = word.partition("=")[0]
    assert done.returncode == 2
    assert f"{name}: no target reads it" in done.stderr


ODD = "a`touch made`$(touch made)$HOME \"'; touch made #% \\ ü\nb"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["infer", f"RUN={ODD}", "PROMPT=$x"], ["--model", ODD, "--prompt", "$x"]),
        (["infer", f"MODEL={ODD}", "AGENT=1"], ["--model", ODD]),
        (["infer", "AGENT=1"], ["--model", "outputs/nano/final_checkpoint/agent1"]),
        (["train", f"CONFIG={ODD}", "ARGS=a.b=1 'c.d=e f'"], ["--config", ODD, "a.b=1", "c.d=e f"]),
        (["process", f"OUTPUT={ODD}", f"INPUT={ODD}"], ["--output", ODD, f"data.train_path={ODD}"]),
        (["compare", f"A={ODD}", f"B={ODD}"], ["--a", ODD, "--b", ODD]),
        (["merge", "AGENT=0", f"RUN={ODD}"], ["--run", ODD, "--output", f"{ODD}/merged_agent0"]),
        (["merge-test", f"MERGED={ODD}", f"GGUF={ODD}"], ["--test", ODD, "--gguf", ODD]),
        (["eval-test", f"INPUT={ODD}"], [f"data.eval_path={ODD}"]),
    ],
)
def test_a_value_for_make_is_a_name_and_no_command(tmp_path, words, expected):
    """A stranger's folder may have any name; whoever completes it with Tab does not run it."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    stub = tmp_path / ".venv/bin/python"
    stub.parent.mkdir(parents=True)
    stub.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    stub.chmod(0o755)
    command = ["make", "-s", "-o", ".venv/.installed", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    given = json.loads(done.stdout)
    assert given[: 3 + len(expected)] == ["-m", "sft", words[0], *expected]
    assert not (tmp_path / "made").exists()


def test_one_process_is_not_started_where_several_are_asked_for(monkeypatch):
    monkeypatch.setenv("NUM_PROCESSES", "2")
    with pytest.raises(UserError, match=r"`train` is one process; use train-distributed"):
        run("train", [])


def test_a_server_of_curves_is_started_first_where_it_is_asked_for():
    for kind in ("distributed", "fsdp", "deepspeed"):
        for words in ([f"train-{kind}", "TB=1"], [f"train-{kind}-tb"]):
            printed = subprocess.run(
                ["make", "-n", "-o", ".venv/.installed", *words],
                cwd=ROOT, capture_output=True, text=True, check=True,
            )  # fmt: skip
            verbs = re.findall(r"-m sft (\S+)", printed.stdout)
            assert verbs == ["tensorboard", f"train-{kind}"]


def test_clean_removes_caches_and_outputs_only_when_reported(tmp_path):
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
        reported = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return "pip install" in reported.stdout

    pins.touch()
    assert installs()
    stamp.parent.mkdir()
    stamp.touch()
    assert not installs()
    os.utime(pins, (stamp.stat().st_mtime + 10,) * 2)
    assert installs()


def test_an_environment_without_pip_is_made_again(tmp_path):
    """Debian's python3 without python3-venv leaves such a one, and says so in a way of its own."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "requirements.txt").touch()
    (tmp_path / ".venv/bin").mkdir(parents=True)
    half = tmp_path / ".venv/bin/python"
    half.write_text("#!/bin/sh\nexit 1\n")
    half.chmod(0o755)
    python = tmp_path / "python3"
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\ntest "$1" = -c\n')
    python.chmod(0o755)
    done = subprocess.run(
        ["make", "setup", f"PYTHON={python}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (tmp_path / "calls").read_text().splitlines()[-1] == "-m venv --clear .venv"
    assert done.returncode == 2
    assert "sudo apt install python3-venv" in done.stderr


def names_of_the_map(block: str) -> Iterator[str]:
    """Yields 'data/cache', 'tasks/sft/task' ... as the map of docs/DESIGN.md lists them."""
    one = "[a-z0-9_]+"
    for line in re.sub(r"\n {12}", " ", block).splitlines():
        folder, _, rest = line.partition(" ")
        if folder.endswith(".py"):
            yield folder.removesuffix(".py")
            continue
        known = ", ".join(
            re.findall(rf"(?:{one}/\{{[^}}]*\}}|{one})(?:, (?:{one}/\{{[^}}]*\}}|{one}))*$", rest)
        )
        for inner, names in re.findall(r"([a-z0-9_]+)/\{([^}]*)\}", known):
            yield from (f"{folder}{inner}/{name.strip()}" for name in names.split(","))
        plain = re.sub(r"[a-z0-9_]+/\{[^}]*\}", "", known)
        yield from (f"{folder}{name}" for name in re.findall(r"[a-z0-9_]+", plain))


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


def test_every_verb_is_a_script():
    called = {}
    for path in (ROOT / "scripts").glob("*.py"):
        called |= dict.fromkeys(re.findall(r'^    main\("(.+)"\)$', path.read_text(), re.M), path)
        assert len(path.read_text().splitlines()) < 10, path
    assert called.keys() == VERBS.keys()
    others = {
        verb: path.stem for verb, path in called.items() if path.stem != verb.replace("-", "_")
    }
    assert others == {"tensorboard": "tensorboard_server"}  # the name of a package


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
        "Branches",
        "Checkpoint atomicity",
        "Console and logs",
        "Corruption",
        "Preemption",
        "Processes",
    ),
    *("Numbers", "Rows", "Configuration", "Security", "Environment"),
    "Not reproduced here, and why",
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


def test_the_mutants_that_are_reported_are_those_of_the_results():
    found = json.loads((ROOT / "benchmarks/results/mutation.json").read_text("utf-8"))
    total, text = found["total"], " ".join((ROOT / "CONTRIBUTING.md").read_text("utf-8").split())
    noticed = total["killed"] + total["timeout"]
    for part in (
        f"Of {total['mutants']:,} mutants a random sample of {total['tried']} was tried",
        f"{noticed} were noticed ({total['killed_percent']} %)",
        f"Of the {total['survived']} survivors {total['without_effect']} change no result",
        f"{total['killed_percent_of_those_with_effect']} % of the others",
    ):
        assert part in text
    reasons = json.loads((ROOT / "benchmarks/mutation_reasons.json").read_text("utf-8"))
    for path, entry in found["modules"].items():  # each survivor has a reason, and no other has
        assert {s["mutation"] for s in entry["survivors"]} == set(reasons.pop(path, {})), path
        assert all(survivor["reason"] for survivor in entry["survivors"]), path
    assert not reasons


def test_the_table_of_long_rows_is_that_of_the_results():
    rows = json.loads((ROOT / "benchmarks/results/context.json").read_text("utf-8"))["rows"]
    lines: dict[str, list[str]] = {}
    for row in rows:
        settings = " ".join(each.split("=")[1] for each in row["settings"])
        memory = row["reserved_gib"] if row["fits"] else "too long"
        key = f"{row['shape']} {settings}, {row['gpus']} GPUs"
        lines.setdefault(key, []).append(f"{row['context_parallel']}: {memory}")
    guide = (ROOT / "docs/LAUNCH.md").read_text("utf-8")
    for key, cells in lines.items():
        assert f"| {key} | {' | '.join(cells)} |" in guide
