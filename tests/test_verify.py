"""The tools that try laws 1 and 2 find them kept by a sound run, and broken by one that is not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import forked
import pytest
import torch
from conftest import ROOT, representatives
from rich.console import Console
from safetensors.torch import save_file
from shapes import architectures, configured

from sft import errors
from sft.config.load import load_config
from sft.runtime import hardware
from sft.tasks.registry import load_run
from sft.tasks.sft.shrink import small_model
from sft.verify import laws, runs
from sft.verify.runs import SmallConfig, make_small

# --- parts ---------------------------------------------------------------------------------------

WIDE = architectures(
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=6,
    num_attention_heads=8,
    attention_dropout=0.1,
)


@pytest.mark.parametrize("name", WIDE)
def test_the_small_model_is_of_the_same_architecture(tmp_path, name):
    config = configured(tmp_path, WIDE[name])
    built, changes = small_model(config, exact=True)
    assert type(built).__name__.startswith(name)
    text = built.config.get_text_config()
    assert (text.num_hidden_layers, text.hidden_size) == (2, 64)
    assert text.vocab_size == WIDE[name].vocab_size
    assert all(not m.p for m in built.modules() if isinstance(m, torch.nn.Dropout))
    assert [what for what, _ in changes] == ["model", "model"]  # its sizes, and its dropout
    built.train()  # or attention would not drop anything either
    ids = torch.arange(12)[None]
    assert torch.equal(built(input_ids=ids).logits, built(input_ids=ids).logits)


@pytest.mark.parametrize(("point", "left"), [("saving:3", 2), ("saved:3", 3), ("saved:4", 4)])
def test_a_run_dies_at_the_point_that_was_chosen(tmp_path, point, left):
    child = os.fork()
    if child == 0:
        runs.die_at(point)
        for step in range(1, 6):
            staging = tmp_path / f"checkpoint_step_{step}.staging"
            staging.mkdir()
            (staging / "file").write_text("written")
            staging.rename(tmp_path / f"checkpoint_step_{step}")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    names = {path.name for path in tmp_path.iterdir()}
    staged = {"checkpoint_step_3.staging"} if point == "saving:3" else set()
    assert names == {f"checkpoint_step_{step}" for step in range(1, left + 1)} | staged


def forks(world: int, _folder: Path, program: list[str]) -> str:
    return forked.launch(world, program)


@pytest.mark.slow
def test_fresh_processes_are_gone_when_they_are_reported(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, time\n"
        f"open({str(tmp_path)!r} + '/' + os.environ.get('RANK', 'alone'), 'w')\n"
        "words = ['printed by', os.environ.get('RANK', 'alone'), *sys.argv[1:]]\n"
        "os.write(1, (' '.join(words) + '\\n').encode())\n"
    )
    assert runs.run_fresh(1, tmp_path, [str(script), "a=b"]) == "printed by alone a=b\n"
    printed = runs.run_fresh(2, tmp_path, [str(script)])
    assert {"printed by 0", "printed by 1"} <= set(printed.splitlines()), printed
    assert {path.name for path in tmp_path.iterdir()} == {"script.py", "alone", "0", "1"}


def test_deviations_are_relative_and_infinite_where_something_is_missing(tmp_path):
    assert laws.max_deviation({1: 2.0, 2: 11.0}, {1: 2.0, 2: 10.0}) == pytest.approx(0.1)
    assert laws.max_deviation({1: 2.0}, {1: 2.0, 2: 10.0}) == float("inf")
    assert laws.max_deviation({}, {}) == float("inf")
    for name, tensors in {
        "one": {"a": torch.ones(4), "b": torch.zeros(2)},
        "near": {"a": torch.ones(4) * 1.5, "b": torch.zeros(2)},
        "less": {"a": torch.ones(4)},
        "none": {},
    }.items():
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    loaded = {path.name: laws.load_weights(path) for path in tmp_path.iterdir()}
    assert laws.max_deviation(loaded["near"], loaded["one"]) == pytest.approx(0.5)
    for name in ("less", "none"):
        assert laws.max_deviation(loaded[name], loaded["one"]) == float("inf")
        assert laws.max_deviation(loaded[name], loaded[name]) in (0, float("inf"))
    assert laws.max_deviation(loaded["none"], loaded["none"]) == float("inf")


def test_every_cut_is_tried_once():
    small = SmallConfig(load_config(ROOT / "configs/nano.yaml"), Path(), [9, 5, 4], [])
    files = [Path("configs/deepspeed_z2.json")]
    for world, number in ((1, 4), (2, 7)):
        found = laws.list_cuts(small, world, files)
        assert len({cut.name for cut in found}) == len(found) == number
        for each in found:  # what it asks for is a configuration
            load_config(ROOT / "configs/nano.yaml", each.settings())


def test_a_broken_row_is_an_error_and_a_refused_one_is_not():
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    titles = ("what", "found")
    sound = laws.Verdict(("first",), [("same", True)])
    refused = laws.Verdict(("second",), [], "error: it cannot", refused=True)
    laws.print_verdicts(console, "law", titles, [sound, refused])
    assert "error: it cannot" in console.export_text(clear=False)
    for broken in (
        laws.Verdict(("third",), [("OTHER", False)]),
        laws.Verdict(("third",), [], "it failed"),
    ):
        with pytest.raises(errors.VerificationError, match="third") as raised:
            laws.print_verdicts(console, "law", titles, [sound, broken])
        assert raised.value.exit_code == 1


def test_too_few_rows_are_an_error(tmp_path):
    rows = (ROOT / "nano/train.jsonl").read_text().splitlines()[:3]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    config = load_config(ROOT / "configs/nano.yaml", [f"data.train_path={tmp_path}/rows.jsonl"])
    with pytest.raises(errors.VerificationError, match="at least 3 usable training rows"):
        make_small(config, tmp_path)


@pytest.mark.parametrize("exact", [False, True])
def test_that_varlen_has_no_kernel_in_fp32_is_a_change(tmp_path, exact):
    overrides = ["model.attn_implementation=varlen", "data.max_rows=64"]
    config = load_config(ROOT / "configs/nano.yaml", overrides)
    changes = dict(make_small(config, tmp_path, exact=exact).changes)
    assert changes.get("packed rows", "").startswith("SDPA with a mask: varlen has no") == exact


def test_runs_that_are_cut_otherwise_are_compared_with_the_own_optimizer_if_it_is_smooth(tmp_path):
    """Muon computes in bf16: what rounding makes of its updates is as large as faults are."""
    for own, used in (("adafactor", "adafactor"), ("muon", "adamw")):
        overrides = ["data.max_rows=64", f"train.optimizer={own}"]
        config = load_config(ROOT / "configs/nano.yaml", overrides)
        small = make_small(config, tmp_path / own, exact=True)
        assert small.config.train.optimizer == used
        said = dict(small.changes).get("train.optimizer", "")
        assert said[:34] == ("" if used == own else "adamw instead of muon, which makes")
        assert make_small(config, tmp_path / own).config.train.optimizer == own


DARKROOM = ["distill.compress=true", "distill.dropout=0.1", "distill.width=48"]


def small_darkroom(folder: Path, monkeypatch) -> SmallConfig:
    monkeypatch.setattr(hardware, "usable_cores", lambda: 1)  # a pool takes longer to start
    config = load_run(ROOT / "configs/ad_darkroom.yaml", DARKROOM)
    return make_small(config, folder, exact=True)


@pytest.mark.slow
def test_distillation_is_made_small(tmp_path, monkeypatch):
    small = small_darkroom(tmp_path, monkeypatch)
    train, distill = small.config.train, small.config.distill
    assert (distill.num_layers, distill.width, distill.context) == (2, 32, 40)
    assert distill.compress  # as configured
    assert distill.dropout == 0
    assert (train.learning_rate, train.adam_epsilon) == (3e-3, 1e-6)
    assert small.lengths == [43] * (73 * 4)  # a stream of four episodes for each goal
    assert small.steps_per_epoch == 3
    assert len(small.lengths) % train.global_batch != 0
    assert small.quarter_batch_tokens < 43 * train.global_batch == small.whole_batch_tokens
    changes = dict(small.changes)
    assert changes["distill.dropout"] == "0.0 instead of 0.1"
    assert "2 layers of 32 instead of 4 of 48" in changes["model"]


# --- whole runs ----------------------------------------------------------------------------------

LORA = ["tuning.mode=lora", "tuning.lora_dropout=0.1", "evaluation.num_examples=0"]
CELLS = ("step", "examples", "losses", "weights", "optimizer")


def trials(folder: Path, *overrides: str, exact: bool = False) -> runs.Trials:
    config = load_config(ROOT / "configs/nano.yaml", [*LORA, *overrides])
    return runs.Trials(make_small(config, folder, exact=exact), forks)


BROKEN = """
import runpy
import sys
import torch
from sft.train import engine

{fault}

sys.argv[1:1] = ["train"]
runpy.run_module("sft", run_name="__main__")
"""


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """Runs of the test have this fault from now on."""

    def put(fault: str) -> None:
        script = tmp_path / "broken.py"
        script.write_text(BROKEN.format(fault=fault))
        monkeypatch.setattr(runs, "TRAIN", [str(script)])

    return put


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> tuple[runs.Trials, laws.Kill, runs.Run, runs.Run]:
    """A run that was killed in a save, and the uninterrupted one."""
    made = trials(tmp_path_factory.mktemp("resume"))
    kill = laws.kill_points(made.small, 1)[-1]
    dead = made.run("killed", 1, kill=kill.point)
    assert dead.state == "running"
    return made, kill, dead, made.run("whole", 1)


def resumed(killed) -> dict[str, bool] | str:
    """What holds of a run that is resumed from the killed one; or why there is none."""
    made, kill, dead, whole = killed
    folder = dead.folder.with_name("resumed")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(dead.folder, folder)
    return holding(laws.judge_resumed(made, kill, folder, 1, 1, whole))


def holding(row: laws.Verdict) -> dict[str, bool] | str:
    assert row.holds == (not row.problem and all(holds for _, holds in row.cells))
    return row.problem or {name: holds for name, (_, holds) in zip(CELLS, row.cells, strict=True)}


@pytest.mark.slow
def test_a_sound_run_resumes_as_the_law_says(killed):
    assert resumed(killed) == dict.fromkeys(CELLS, True)


RESUME_FAULTS = {  # each leaves an uninterrupted run as it is; and what must be seen to differ
    "dropout counts the steps of this process": (
        """
sound = engine.Engine._seed
def seed(self, *arguments):
    self.first = getattr(self, "first", self.step)
    self.step -= self.first
    sound(self, *arguments)
    self.step += self.first
engine.Engine._seed = seed
""",
        {"losses", "weights", "optimizer"},
    ),
    "the optimizer starts afresh": (
        """
sound = engine.Engine.read
def read(self, folder):
    self.parallel.load_optimizer = lambda *_: None
    return sound(self, folder)
engine.Engine.read = read
""",
        {"losses", "weights", "optimizer"},
    ),
    "the epoch starts afresh": (
        """
sound, resume, skipped = engine.global_batch_ids, engine.Engine.resume, [0]
def resumed(self, folder):
    resume(self, folder)
    skipped[0] = self.step
engine.Engine.resume = resumed
engine.global_batch_ids = lambda number, seed, step, batch: sound(
    number, seed, step - skipped[0], batch
)
""",
        {"examples", "losses", "weights", "optimizer"},
    ),
    "the run starts afresh": ("engine.Engine.resume = lambda *_: None", {"step"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", representatives(RESUME_FAULTS, 2))
def test_a_run_that_resumes_otherwise_is_found_out(killed, broken, name):
    fault, differs = RESUME_FAULTS[name]
    broken(fault)
    assert resumed(killed) == {cell: cell not in differs for cell in CELLS}


@pytest.mark.slow
def test_a_torn_checkpoint_is_found_out(killed):
    made, kill, dead, whole = killed
    torn = dead.folder.with_name("torn")
    shutil.copytree(dead.folder, torn)
    with (torn / "checkpoint_step_2/optimizer-00001-of-00001.safetensors").open("ab") as file:
        file.write(b"0")
    row = laws.judge_resumed(made, kill, torn, 1, 1, whole)
    assert "optimizer-00001-of-00001.safetensors has" in row.problem
    assert not row.holds


@pytest.mark.thorough("law 2 in test_distill.py")
@pytest.mark.slow
def test_distillation_keeps_both_laws(tmp_path, monkeypatch):
    made = runs.Trials(small_darkroom(tmp_path, monkeypatch), forks)
    (row,) = laws.try_resuming(made, 1, laws.kill_points(made.small, 1)[-1:])
    assert holding(row) == dict.fromkeys(CELLS, True)
    cut = laws.Cut(1, "one process", "padded", 1)
    whole = runs.Run(tmp_path / "whole", "finished", "")
    row = laws.judge_cut(cut, made.run("alone", 1, *cut.settings()), whole)
    assert row.holds, row
    assert row.cells[1][0] != "0e+00"  # it was cut


@pytest.fixture(scope="module")
def exact(tmp_path_factory) -> tuple[runs.Trials, list[laws.Verdict], runs.Run]:
    """A run without dropout; and one that two processes resumed, held against it."""
    made = trials(tmp_path_factory.mktemp("exact"), exact=True)
    kill = replace(laws.kill_points(made.small, 1)[0], resumed_by=(2,))
    rows = laws.try_resuming(made, 1, [kill])
    return made, rows, runs.Run(made.small.folder / "whole", "finished", "")


@pytest.mark.slow
def test_two_processes_go_on_where_one_was_killed(exact):
    (row,) = exact[1]
    assert holding(row) == dict.fromkeys(CELLS, True)
    assert "; by 2 processes" in row.title[0]
    assert row.cells[2][0] != "0e+00"  # it was not the same process again


def cut(exact, world: int, layout: str, max_tokens: int) -> dict[str, bool] | str:
    made, _, whole = exact
    chosen = laws.Cut(world, "any", layout, max_tokens)
    name = f"cut{len(list(made.small.folder.iterdir()))}"
    row = laws.judge_cut(chosen, made.run(name, world, *chosen.settings()), whole)
    return row.problem or dict(zip(CELLS[1:4], (holds for _, holds in row.cells), strict=True))


@pytest.mark.slow
def test_another_cut_gives_the_same_run(exact):
    assert cut(exact, 1, "packed", exact[0].small.whole_batch_tokens) == dict.fromkeys(
        CELLS[1:4], True
    )


CUT_FAULTS = {  # processes, the fault, and what must be seen to differ
    "the order depends on the number of processes": (
        2,
        """
import os
sound = engine.global_batch_ids
engine.global_batch_ids = lambda number, seed, step, batch: sound(
    number, seed + int(os.environ.get("WORLD_SIZE", "1")) - 1, step, batch
)
""",
        {"examples", "losses", "weights"},
    ),
    "micro-batches are weighed as if they were equal": (
        1,
        """
sound = engine.Engine._count
engine.Engine._count = lambda self, batches: len(batches) * sound(self, batches[:1])
""",
        {"losses", "weights"},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CUT_FAULTS)
def test_a_run_that_depends_on_its_cut_is_found_out(exact, broken, name):
    world, fault, differs = CUT_FAULTS[name]
    broken(fault)
    found = cut(exact, world, "padded", exact[0].small.quarter_batch_tokens)
    assert found == {cell: cell not in differs for cell in CELLS[1:4]}


@pytest.mark.thorough("test_watchdog.py kills at chosen instants")
@pytest.mark.slow
def test_runs_killed_at_random_instants_end_as_if_they_had_not_been(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import chaos

    monkeypatch.setattr(chaos, "STEPS", 12)
    out = tmp_path / "chaos.json"
    arguments = ["--kills", "2", "--only", "LoRA, DDP x 2"]
    monkeypatch.setattr(sys, "argv", ["chaos.py", *arguments, "--json", str(out)])
    assert chaos.main() == 0
    results = json.loads(out.read_text())
    assert results["kills"] == 2
    assert results["mismatches"] == results["unusable"] == 0
    assert results["most_steps_lost"] <= results["save_steps"]
    assert all(each["runs"] >= 1 for each in results["configurations"])
