"""`sft.train`, `sft.plan`, `sft.evaluate`: in one process, again and again, and in two."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import forked
import pytest
from conftest import ROOT, clean_environment, run
from packaging.requirements import Requirement

import sft
from sft import api, commands
from sft.config.load import load_config
from sft.errors import ConfigError, UserError
from sft.runtime import trackers
from sft.tasks.registry import EXTRAS

NANO = ROOT / "configs/nano.yaml"


def test_importing_sft_loads_nothing_heavy():
    code = "import sft, sys; print(callable(sft.train), sft.__version__, *sys.modules)"
    done = run(sys.executable, "-c", code)
    is_callable, version, *modules = done.stdout.split()
    assert (is_callable, version) == ("True", sft.__version__)
    assert {"torch", "pydantic", "transformers", "sft.run"}.isdisjoint(modules)


HELP = """
import sys
from contextlib import suppress
from sft import commands
from sft.data import files
from sft.evaluate import compare

for verb in commands.VERBS:
    with suppress(SystemExit):
        commands.run(verb, ["--help"])
print(*sys.modules)
"""


def test_the_help_of_every_verb_rows_and_compare_load_nothing_heavy():
    done = run(sys.executable, "-c", HELP)
    *shown, modules = done.stdout.splitlines()
    assert sum(line.startswith("usage: ") for line in shown) == len(commands.VERBS)
    assert {"torch", "transformers", "accelerate"}.isdisjoint(modules.split())


def test_a_package_is_called_and_imported_from_alike():
    from sft.train.engine import Engine

    assert sft.train.engine.Engine is Engine
    for package in (sft.train, sft.plan, sft.evaluate):
        assert callable(package)
    with pytest.raises(ConfigError, match=r"train\.epoch .*: unknown key"):
        sft.train(NANO, {"train.epoch": 1})
    with pytest.raises(AttributeError, match="no attribute 'tarin'"):
        sft.tarin  # noqa: B018


def test_overrides_are_words_or_a_mapping():
    values = {"train.learning_rate": 1e-5, "epochs": 2, "train.output_dir": Path("outputs/x")}
    by_words = ["train.learning_rate=1e-5", "--epochs", "2", "train.output_dir=outputs/x"]
    found = api.configuration(NANO, values)
    assert found == api.configuration(NANO, by_words)
    assert (found.train.learning_rate, found.train.epochs) == (1e-5, 2)
    loaded = load_config(NANO)
    assert api.configuration(loaded, ()) is loaded
    assert api.configuration(loaded, {"train.epochs": 2}).train.epochs == 2
    with pytest.raises(ConfigError, match="expected a mapping"):
        api.configuration(loaded, ["train.epochs=2"])


def test_a_missing_package_is_one_message_that_names_the_extra(monkeypatch):
    monkeypatch.setattr("sft.errors.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r'deepspeed needs deepspeed.*pip install "sft\[deepspeed\]"'
    ):
        sft.train(NANO, {"train.engine": "deepspeed", "train.deepspeed_config": "x.json"})
    with pytest.raises(UserError, match=r'gymnasium, .*pip install "sft\[distill\]"'):
        sft.train(ROOT / "configs/ad_darkroom.yaml")


def test_pins_are_versions_that_the_package_takes():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for name, modules in {**EXTRAS, "deepspeed": ("deepspeed",)}.items():
        packages = {Requirement(each).name for each in extras[name]}
        assert packages == {module.replace("_", "-") for module in modules}
    # Services are not pinned: nobody needs them to train or to test.
    own = [extras[name] for name in extras if name not in trackers.PACKAGES]
    wanted = [*project["dependencies"], *itertools.chain(*own)]
    accepted = {each.name: each.specifier for each in map(Requirement, wanted)}
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = dict(re.findall(r"^([\w.-]+)(?:\[\w+\])?==(\S+)", "\n".join(lines), re.MULTILINE))
    assert pins.keys() == accepted.keys()
    for name, version in pins.items():
        assert version in accepted[name], name


# --- whole runs ----------------------------------------------------------------------------------

AGAIN = """
other = sft.train("configs/nano.yaml", overrides)
print("same metrics:", other.metrics == run.metrics, other.folder == run.folder)
try: sft.train("configs/nano.yaml", {"train.epochs": 0})
except ValueError as error: print("refused:", type(error).__name__)

"""


@pytest.mark.slow
def test_the_example_of_the_docs_runs_in_an_interactive_process(tmp_path):
    """As in a notebook: one process, statement by statement, and one more training in it."""
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/API.md").read_text(), re.DOTALL)
    example = example.replace("outputs/api", f"{tmp_path}/run")
    rows = (ROOT / "nano/valid.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "held_out.jsonl").write_text("".join(rows[:24]))
    given = '"train.max_steps": 20,'
    assert given in example
    held_out = f'"data.eval_path": "{tmp_path}/held_out.jsonl",'
    less = f'"train.max_steps": 4, "train.global_batch": 8, "data.max_rows": 64, {held_out}'
    example = example.replace(given, less)
    done = subprocess.run(
        [sys.executable, "-i", "-q"],
        input=example + AGAIN,
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert re.search(r"^\d+ bytes at most$", done.stdout, re.MULTILINE)
    assert "same metrics: True True" in done.stdout
    assert "refused: ConfigError" in done.stdout
    finished = json.loads((tmp_path / "run/status.json").read_text())
    assert (finished["state"], finished["version"]) == ("finished", sft.__version__)
    assert (
        tmp_path / "run.1/evaluation/evaluate/metrics.json"
    ).exists()  # moved aside by the second


PROGRAM = """
import json, os, sys
import sft

folder = sys.argv[1]
values = {"train.max_steps": 2, "train.output_dir": f"{folder}/run", "evaluation.num_examples": 2}
values |= {"data.max_rows": 80, "data.eval_path": None, "data.eval_fraction": 0.2}
values |= {"train.global_batch": 8}
run = sft.train("configs/nano.yaml", values)
again = sft.evaluate(run.folder, ["evaluation.num_examples=2"])
second = sft.train("configs/nano.yaml", values | {"train.output_dir": f"{folder}/second"})
result = {"loss": run.metrics["loss"], "again": again["loss"], "second": second.metrics["loss"]}
with open(f"{folder}/{os.environ['RANK']}.json", "w") as file:
    json.dump(result, file)
"""


@pytest.mark.thorough("the same calls by one process, ranks in test_parallel.py")
@pytest.mark.slow
def test_two_processes_get_the_same_results(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    printed = forked.launch(2, [str(program), str(tmp_path)])
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0] == ranks[1], printed
    assert ranks[0]["loss"] == ranks[0]["again"] == ranks[0]["second"]
