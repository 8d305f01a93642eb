"""What is not a plain file in a run folder is never followed, overwritten, waited for or read."""

from __future__ import annotations

import ast
import itertools
import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from sft.config.schema import Model
from sft.errors import CheckpointError, ExportError, ModelError
from sft.evaluate.predictions import Predictions
from sft.models.pretrained import load_tokenizer
from sft.plan.records import append_run
from sft.plan.speed import Kind, append_speed
from sft.runtime import checkpoint, plain, run_folder
from sft.runtime.attempt import RANKS, Lock, Status
from sft.runtime.checkpoint import MANIFEST, fault
from sft.runtime.console import write_json
from sft.runtime.log import Log
from sft.runtime.run_folder import FILES, FOLDERS
from sft.runtime.watchdog import Guard
from sft.serve.runs import load_run_config
from sft.tasks.sft.saved import read_adapter_config, read_base_record
from sft.train.checkpoints import read_state

SECRET = "mine, outside of the run folder"
KINDS: dict[str, Callable[[Path, Path], Any]] = {
    "a link": lambda path, outside: path.symlink_to(outside),
    "a link to nothing": lambda path, outside: path.symlink_to(outside.with_name("missing")),
    "a link to a device": lambda path, _: path.symlink_to("/dev/zero"),
    "a pipe": lambda path, _: os.mkfifo(path),
    "a folder": lambda path, _: path.mkdir(),
}
DAMAGED: dict[str, Callable[[Path], Any]] = {
    **{kind: lambda path, make=make: make(path, path.parent / "x") for kind, make in KINDS.items()},
    "huge": lambda path: _sparse(path, plain.LIMIT + 1),
    "deeply nested": lambda path: path.write_text("[" * 10**6),
    "nested objects": lambda path: path.write_text('{"a":' * 10**5 + "1" + "}" * 10**5),
    "binary": lambda path: path.write_bytes(bytes(range(256))),
    "zeros": lambda path: path.write_bytes(bytes(1000)),
    "empty": lambda path: path.write_bytes(b""),
    "a list": lambda path: path.write_text("[1]"),
    "a huge number": lambda path: path.write_text('{"step": ' + "9" * 10_000 + "}"),
}


def _sparse(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


@pytest.fixture
def outside(tmp_path) -> Path:
    path = tmp_path / "outside.txt"
    path.write_text(SECRET)
    return path


NESTED = ["evaluation/predictions.jsonl", ".ranks/0.json"]  # a folder there is none of our files


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *itertools.product(KINDS, FILES),
        *itertools.product([kind for kind in KINDS if kind != "a folder"], NESTED),
    ],
)
def test_what_is_no_plain_file_is_refused_before_anything_is_written(tmp_path, outside, kind, name):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    KINDS[kind](path, outside)
    with pytest.raises(CheckpointError) as error, Guard(tmp_path / "run"):
        pass
    assert error.value.exit_code == 4
    assert f"{path} is {' '.join(kind.split()[:2])}, not a plain file" in str(error.value)
    assert outside.read_text() == SECRET
    assert len(list((tmp_path / "run").iterdir())) == 1, "not even a lock"


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("kind", ["a link", "a pipe", "a link to nothing"])
def test_what_is_no_folder_is_refused(tmp_path, outside, kind, name):
    (tmp_path / "run").mkdir()
    KINDS[kind](tmp_path / "run" / name, tmp_path)
    with pytest.raises(CheckpointError, match="not a folder"), Guard(tmp_path / "run"):
        pass


@pytest.mark.parametrize("kind", KINDS)
def test_a_link_that_appears_later_is_not_followed_either(tmp_path, outside, kind, capsys):
    for name in ("training.log", run_folder.METRICS, "status.json", ".lock"):
        KINDS[kind](tmp_path / name, outside)
    log = Log(tmp_path)
    log.say("a line")
    log.open_metrics(0)
    log.log(1, {"train/loss": 1.0})
    log.close()
    for action in (lambda: Lock(tmp_path), lambda: write_json(tmp_path / "status.json", {})):
        with pytest.raises((OSError, CheckpointError)):
            action()
    assert plain.read_json(tmp_path / "status.json") == {}
    assert outside.read_text() == SECRET
    assert not outside.with_name("missing").exists()
    assert "training.log cannot be written" in capsys.readouterr().out


def _write_in_place(path: Path, mode: str) -> None:
    with plain.open_to_append(path) if mode == "append" else plain.open_file(path, mode) as file:
        file.write(b"more" if mode == "append" else "more")
    expected = {"a+": SECRET + "more", "r+": "more" + SECRET[4:], "w": "more"}
    assert path.read_text() == expected.get(mode, SECRET + "more")


def _write_log(path: Path) -> None:
    log = Log(path.parent)
    log.say("a line")
    log.open_metrics(0)
    log.log(1, {"train/loss": 1.0})
    log.close()
    assert path.read_text() != SECRET


WRITERS: dict[str, Callable[[Path], Any]] = {
    **{mode: lambda path, mode=mode: _write_in_place(path, mode) for mode in ("a+", "r+", "w")},
    "cut": lambda path: plain.cut(path, 3),
    "several processes": lambda path: _write_in_place(path, "append"),
    "metrics.jsonl": _write_log,
    "training.log": _write_log,
    "predictions.jsonl": lambda path: Predictions(path).append([{"index": 0, "key": "0" * 16}]),
    "memory.jsonl": lambda path: append_run(path.parent, "H100", 1, 2),
    "speed.jsonl": lambda path: append_speed(path.parent, "H100", Kind("lora", "bf16", 9), 2.0),
    ".lock": lambda path: Lock(path.parent).release(),
    "status.json": lambda path: write_json(path, {"a": 1}),
}


@pytest.mark.parametrize("name", WRITERS)
def test_another_name_of_a_file_keeps_what_it_has(tmp_path, name):
    """A backup of `cp -al` does not change when a run goes on, nor does a stranger's trap."""
    backup, path = tmp_path / "backup", tmp_path / "run" / name
    path.parent.mkdir()
    backup.write_text('{"index": ' if name == "predictions.jsonl" else SECRET)
    before = backup.read_text()
    path.hardlink_to(backup)
    WRITERS[name](path)
    assert backup.read_text() == before
    assert backup.stat().st_nlink == 1
    assert len(list(path.parent.glob(f".{path.name}.*"))) == 0, "a temporary file is left"


def test_two_processes_that_append_to_a_file_with_another_name_lose_no_line(tmp_path):
    (tmp_path / "backup").write_bytes(b"old\n")
    (path := tmp_path / "file").hardlink_to(tmp_path / "backup")
    held = plain.open_to_append(path)
    waiting = os.fork()
    if not waiting:
        held.close()  # else the lock is this process's, too
        with plain.open_to_append(path) as file:
            file.write(b"second\n")
        os._exit(0)
    held.write(b"first\n")
    held.close()
    assert os.waitpid(waiting, 0)[1] == 0
    assert path.read_bytes() == b"old\nfirst\nsecond\n"


def test_only_plain_opens_a_file_of_a_run_to_change_it():
    allowed = {
        "data/examples.py",  # of a cache that is being made
        "serve/chat.py",  # the file that /save names
    }
    found = {
        str(path.relative_to(ROOT / "sft"))
        for path in (ROOT / "sft").rglob("*.py")
        if re.search(r"(?<!plain)(?<!os)\.open\(\"[arwx]b?\+|\.open\(\"a", path.read_text("utf-8"))
    }
    assert found <= allowed, "use plain.open_file"


def test_a_link_in_the_place_of_a_temporary_file_is_not_followed(tmp_path, outside):
    (tmp_path / f".status.json.{os.getpid()}").symlink_to(outside)
    write_json(tmp_path / "status.json", {"a": 1})
    assert json.loads((tmp_path / "status.json").read_text()) == {"a": 1}
    assert outside.read_text() == SECRET


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_manifest_that_is_no_manifest_is_a_fault_at_once(tmp_path, damage):
    good = tmp_path / "checkpoint_step_1"
    for folder in (good, tmp_path / "checkpoint_step_2"):
        staging = checkpoint.make_staging(folder)
        (staging / "trainer.json").write_text(json.dumps({"step": run_folder.step_of(folder)}))
        checkpoint.seal(staging, folder)
    (folder / MANIFEST).unlink()
    DAMAGED[damage](folder / MANIFEST)
    started = time.monotonic()
    assert MANIFEST in str(fault(folder))
    assert not checkpoint.is_ours(folder)
    assert run_folder.find(tmp_path, "auto", lambda _: None) == good
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_record_that_is_none_counts_as_missing(tmp_path, damage):
    for name in ("status.json", run_folder.BEST, "trainer.json"):
        DAMAGED[damage](tmp_path / name)
        assert plain.read_json(tmp_path / name).get("state") is None
    with pytest.raises(CheckpointError):
        read_state(tmp_path, {})
    if damage not in KINDS:
        DAMAGED[damage](tmp_path / Lock.NAME)
        lock, status = Lock(tmp_path), Status(tmp_path)
        status.begin()
        assert plain.read_json(tmp_path / "status.json")["attempt"] == 1
        lock.release()


@pytest.mark.parametrize("damage", DAMAGED)
def test_what_is_no_file_of_a_run_or_model_from_elsewhere_is_refused_at_once(tmp_path, damage):
    """Its readers follow links, as in the folders of a hub's cache, but wait for no pipe."""
    path = tmp_path / "run" / "base.json"
    path.parent.mkdir()
    DAMAGED[damage](path)
    if path.exists():  # else it counts as missing: the manifest of a run tells the difference
        with pytest.raises(ExportError):
            read_base_record(path)
    path.rename(path.with_name("adapter_config.json"))
    with pytest.raises(ExportError):
        read_adapter_config(path.parent)
    path.with_name("adapter_config.json").rename(path.with_name("config.yaml"))
    (path.parent / run_folder.FINAL).mkdir()
    if damage == "a pipe" or damage.startswith(("a link", "a folder")):
        with pytest.raises(ExportError, match="expected a finished run"):
            load_run_config(path.parent)


def test_a_pipe_in_the_folder_of_a_model_is_refused_and_a_link_to_a_file_is_read(tmp_path):
    (tmp_path / "real.json").write_text('{"name": "a", "weights_sha256": "b"}')
    (tmp_path / "base.json").symlink_to(tmp_path / "real.json")
    assert read_base_record(tmp_path / "base.json").name == "a"
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(ModelError, match=r"tokenizer\.json is no file"):
        load_tokenizer(Model(name=str(tmp_path)))


def test_only_plain_reads_the_json_of_a_folder_from_elsewhere():
    """`json.loads(path.read_text())` would wait for a pipe and read a device without end."""
    allowed = {"plan/records.py", "data/files.py", "data/cache.py", "commands/setup_accelerate.py"}
    allowed |= {"runtime/plain.py", "config/adapters.py"}  # of a path that is a plain file
    allowed |= {"runtime/processes.py", "models/export.py", "tasks/distill/histories.py"}
    found = {
        str(path.relative_to(ROOT / "sft"))
        for path in (ROOT / "sft").rglob("*.py")
        if re.search(r"json\.loads\([^\n]*read_(text|bytes)\(", path.read_text("utf-8"))
    }
    assert found <= allowed, "use plain.load_json"


def test_the_lists_of_files_are_what_runs_write():
    assert {Status.NAME, Lock.NAME} <= set(FILES)
    assert {RANKS, checkpoint.SCRATCH} <= set(FOLDERS)


# --- everything that removes, renames or cuts ----------------------------------------------------

REMOVERS = {"unlink", "rmtree", "rmdir", "rename", "replace", "remove", "move"}
REMOVERS |= {"truncate", "ftruncate", "cut"}
OWNERS = ("os", "checkpoint", "plain")  # others that have `remove` or `cut` are no files
# What each module may remove or rename, and why that is ours.
EXPECTED = {
    "runtime/checkpoint.py": {
        "rmtree": 3,  # below a folder .sft, which is no link
        "rmdir": 1,  # .sft itself, if it is empty
        "rename": 5,  # what is staged to its name; what is there to .sft or an unused name
    },
    "runtime/run_folder.py": {
        "rename": 5,  # what came after a step, to abandoned/; what was being replaced, back
        "rmdir": 1,  # an empty folder <name>.moving
        "unlink": 2,  # origin.json of an attempt that has left nothing else; `remove_unfinished`
        "cut": 1,  # metrics.jsonl, when the rest has been copied
        "remove": 1,  # checkpoint.remove, of checkpoints that `is_ours`
    },
    "runtime/attempt.py": {
        "rename": 1,  # the run folder, to an unused name
        "unlink": 6,  # .lock; names of `own_ranks_files`; of `remove_record`
        "rmdir": 1,  # folders that are empty
        "truncate": 2,  # the lock that this run holds; on a full disk its status, in place
    },
    "runtime/watchdog.py": {"unlink": 1},  # the heartbeat of this rank
    "runtime/log.py": {"truncate": 1, "cut": 1},  # half a line; metrics after the step of a resume
    "runtime/plain.py": {
        "truncate": 1,  # for those that call `cut`
        "ftruncate": 1,  # for those that open it with "w"
        "unlink": 2,  # the temporary file of this process
        "replace": 1,  # the file by its copy
    },
    "runtime/tensor_file.py": {"truncate": 1},  # a file that it has just made, to its size
    "runtime/console.py": {"unlink": 2, "replace": 1},  # the temporary file of this process
    "runtime/launcher.py": {"rmdir": 1},  # a temporary folder of its own
    "models/export.py": {"unlink": 1},  # README.md of PEFT in a staging
    "tasks/crowd/task.py": {"unlink": 1},  # the same
    "evaluate/predictions.py": {"ftruncate": 1},  # half a line
    "evaluate/drift.py": {"unlink": 1, "replace": 1},  # the base's answers: a part to its name
    "tasks/distill/histories.py": {"unlink": 2, "replace": 1},  # .goal_*; the state of a group
    "tasks/distill/source.py": {"replace": 1},  # the state of a group: a part to its name
    "serve/vllm_engine.py": {"rmtree": 1},  # a temporary folder of its own
    "serve/merge.py": {"rmdir": 1, "rename": 1, "replace": 1},  # an empty output; what is staged
    "plan/records.py": {"unlink": 1},  # <24 hexadecimal digits>.json
    "data/remote.py": {"unlink": 4, "rmtree": 1, "replace": 1},  # digests as names, in remote/
    "data/cache.py": {"unlink": 1, "rmtree": 1, "remove": 1},  # rejected.jsonl; rows in the staging
    "verify/laws.py": {"rmtree": 1},  # a temporary folder of its own
    "commands/setup_accelerate.py": {"unlink": 1},  # a copy of its own
}


def test_every_call_that_removes_something_is_known():
    found: dict[str, Counter[str]] = {}
    for path in sorted((ROOT / "sft").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                called, owner = node.func.attr, node.func.value
                is_ours = isinstance(owner, ast.Name) and owner.id in OWNERS
                is_file = called not in ("remove", "cut") or is_ours
                is_text = called == "replace" and len(node.args) != 1
                if called in REMOVERS and is_file and not is_text:
                    name = str(path.relative_to(ROOT / "sft"))
                    found.setdefault(name, Counter())[called] += 1
    assert found == {name: Counter(calls) for name, calls in EXPECTED.items()}
