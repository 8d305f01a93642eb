"""Law 6, a checkpoint is whole or it does not exist: commit, kill, damage, find, prune, restore."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from sft.errors import CheckpointError
from sft.runtime import checkpoint
from sft.runtime.checkpoint import MANIFEST, SCRATCH, commit, fault
from sft.runtime.run_folder import find, newest_first, prune, reference

FILES = ["trainer.json", "model.safetensors", "deep/er/x.json"]


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=not torch.cuda.is_available())


def content(step: int) -> Callable[[Path], None]:
    """A writer of a small checkpoint that says which step it is of."""

    def write(folder: Path) -> None:
        (folder / "trainer.json").write_text(json.dumps({"step": step}))
        save_file({"w": torch.full((8,), float(step))}, folder / "model.safetensors")
        (folder / "deep/er").mkdir(parents=True)
        (folder / "deep/er/x.json").write_text('{"x": "some text"}')

    return write


def step_of(folder: Path | None) -> int:
    """The step in the files of a sound checkpoint; they all agree."""
    assert folder is not None
    assert fault(folder) is None
    step = json.loads((folder / "trainer.json").read_text())["step"]
    assert load_file(folder / "model.safetensors")["w"].tolist() == [step] * 8
    return step


@pytest.fixture(scope="module")
def sound(tmp_path_factory, accelerator) -> Path:
    """A committed checkpoint to copy; never changed."""
    folder = tmp_path_factory.mktemp("sound") / "checkpoint_step_1"
    commit(folder, content(1), accelerator)
    return folder


@pytest.fixture
def folder(tmp_path, sound) -> Path:
    """A sound checkpoint to damage."""
    return shutil.copytree(sound, tmp_path / sound.name)


@pytest.fixture(scope="module")
def three(tmp_path_factory, accelerator) -> Path:
    """A run folder with checkpoints of steps 20, 100 and 3 to copy; never changed."""
    run = tmp_path_factory.mktemp("three")
    for step in (20, 100, 3):
        commit(run / f"checkpoint_step_{step}", content(step), accelerator)
    return run


@pytest.fixture
def run(tmp_path, three) -> Path:
    """A run folder with checkpoints of steps 20, 100 and 3."""
    return shutil.copytree(three, tmp_path / "run")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# --- commit ------------------------------------------------------------------------------------


def test_a_checkpoint_appears_at_once_and_whole(tmp_path, accelerator):
    final = tmp_path / "new/checkpoint_step_7"
    seen = []

    def write(staging: Path) -> None:
        content(7)(staging)
        seen.append((staging == final, final.exists(), newest_first(final.parent)))

    commit(final, write, accelerator)
    assert seen == [(False, False, [])]
    assert names(final.parent) == {final.name}
    assert set(tree(final)) == {*FILES, MANIFEST}
    assert step_of(final) == 7


def test_the_manifest_lists_every_file_with_size_and_sha256(sound):
    expected = {
        name: {"bytes": (sound / name).stat().st_size, "sha256": checkpoint.sha256(sound / name)}
        for name in FILES
    }
    assert json.loads((sound / MANIFEST).read_text())["files"] == expected
    known = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
    (sound.parent / "hello").write_text("hello")
    assert checkpoint.sha256(sound.parent / "hello") == known


def test_every_file_and_folder_is_synced_before_the_rename(tmp_path, accelerator, monkeypatch):
    final = tmp_path / "checkpoint_step_7"
    synced: list[tuple[str, bool]] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").resolve()
        synced.append((str(path.relative_to(tmp_path)), final.exists()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    commit(final, content(7), accelerator)
    before = {path.removeprefix(f"{SCRATCH}/") for path, renamed in synced if not renamed}
    files = {f"{final.name}/{name}" for name in [*FILES, MANIFEST]}
    folders = {final.name, f"{final.name}/deep", f"{final.name}/deep/er"}
    assert before >= files
    assert before >= folders, "else a crash of the machine can lose what is in them"
    assert (".", True) in synced, "the rename itself"


def fail_at_once(staging: Path) -> None:
    raise OSError(28, "No space left on device")


def fail_half_way(staging: Path) -> None:
    content(8)(staging)
    raise RuntimeError("No space left on device")


def remove_the_folder(staging: Path) -> None:
    shutil.rmtree(staging)  # so that sealing fails, not writing


@pytest.mark.parametrize("writer", [fail_at_once, fail_half_way, remove_the_folder])
@pytest.mark.parametrize("step", [3, 200])
def test_a_failing_write_leaves_earlier_checkpoints_untouched(run, accelerator, writer, step):
    before = tree(run)
    with pytest.raises(CheckpointError, match="earlier checkpoints are untouched") as caught:
        commit(run / f"checkpoint_step_{step}", writer, accelerator)
    assert caught.value.exit_code == 4
    assert tree(run) == before
    assert names(run) == {f"checkpoint_step_{n}" for n in (3, 20, 100)}, "no staging left"


def test_a_failing_rename_leaves_the_replaced_checkpoint_in_place(run, accelerator, monkeypatch):
    before = tree(run)
    real = Path.rename

    def rename(path: Path, target: Path) -> Path:
        if path.parent.name == SCRATCH and path.suffix != checkpoint.REPLACED:
            raise OSError(5, "Input/output error")
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(CheckpointError, match="Input/output error"):
        commit(run / "checkpoint_step_20", content(8), accelerator)
    assert tree(run) == before


def test_a_folder_that_cannot_be_made_is_reported_as_a_checkpoint_error(tmp_path, accelerator):
    (tmp_path / "run").write_text("a file where the run folder should be")
    with pytest.raises(CheckpointError, match="checkpoint_step_1"):
        commit(tmp_path / "run/checkpoint_step_1", content(1), accelerator)


def test_a_commit_replaces_a_checkpoint_of_the_same_name_as_a_whole(run, accelerator):
    final = run / "checkpoint_step_20"
    for left in (final.name, f"{final.name}{checkpoint.REPLACED}"):
        (run / SCRATCH / left).mkdir(parents=True)
        (run / SCRATCH / left / "left.json").write_text("{}")
    commit(final, content(21), accelerator)
    assert step_of(final) == 21
    assert set(tree(final)) == {*FILES, MANIFEST}
    assert names(run) == {f"checkpoint_step_{n}" for n in (3, 20, 100)}


def sleep_while_writing(reached: Any) -> Callable[[Path], None]:
    def write(staging: Path) -> None:
        content(200)(staging)
        reached.set()
        time.sleep(60)

    return write


def sleep_while_sealing(reached: Any) -> Callable[[Path], None]:
    def sync(path: Path) -> None:
        if path.name == MANIFEST:
            reached.set()
            time.sleep(60)

    checkpoint.sync = sync  # type: ignore[assignment]  # of the child process only
    return content(200)


def sleep_between_the_renames(reached: Any) -> Callable[[Path], None]:
    real = Path.rename

    def rename(path: Path, target: Path) -> Path:
        if path.parent.name == SCRATCH:
            reached.set()
            time.sleep(60)
        return real(path, target)

    Path.rename = rename  # type: ignore[method-assign]  # of the child process only
    return content(200)


@pytest.mark.parametrize(
    "moment", [sleep_while_writing, sleep_while_sealing, sleep_between_the_renames]
)
@pytest.mark.parametrize("step", [200, 100])
def test_kill_9_in_the_middle_of_a_commit_costs_one_interval(run, accelerator, moment, step):
    """The victim is a forked process: it has its own memory and files, and dies without a word."""
    context = multiprocessing.get_context("fork")
    reached = context.Event()
    final = run / f"checkpoint_step_{step}"
    victim = context.Process(target=lambda: commit(final, moment(reached), accelerator))
    victim.start()
    try:
        assert reached.wait(20)
    finally:
        os.kill(victim.pid, signal.SIGKILL)
        victim.join()
    assert victim.exitcode == -signal.SIGKILL
    warnings: list[str] = []
    survivor = step_of(find(run, "auto", warnings.append))
    replaced = moment is sleep_between_the_renames and step == 100
    assert survivor == (20 if replaced else 100)
    assert warnings == []
    commit(final, content(step), accelerator)
    assert step_of(find(run, "auto", warnings.append)) == step
    assert names(run) == {f"checkpoint_step_{n}" for n in (3, 20, 100, step)}


WORKER = """
import json, sys
from pathlib import Path
from accelerate import Accelerator
from sft.errors import CheckpointError
from sft.runtime.checkpoint import commit

accelerator = Accelerator(cpu=True)
run, rank = Path(sys.argv[1]), accelerator.process_index

def write(staging):
    (staging / f"rank{rank}.json").write_text("{}")

def fail_on_rank_1(staging):
    write(staging)
    if rank == 1:
        raise OSError(28, "No space left on device")

result = {"world": accelerator.num_processes}
commit(run / "checkpoint_step_1", write, accelerator)
try:
    commit(run / "checkpoint_step_2", fail_on_rank_1, accelerator)
except CheckpointError as error:
    result["error"] = str(error)
accelerator.wait_for_everyone()
commit(run / "checkpoint_step_3", write, accelerator)
(run.parent / f"result{rank}.json").write_text(json.dumps(result))
"""


@pytest.mark.slow
def test_a_writer_that_fails_on_one_rank_fails_the_commit_on_all(tmp_path):
    script, run = tmp_path / "worker.py", tmp_path / "run"
    script.write_text(WORKER)
    reported = forked.launch(2, [str(script), str(run)])
    results = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("result*.json"))]
    assert [result["world"] for result in results] == [2, 2], reported
    for result in results:
        assert "No space left on device" in result["error"]
    assert names(run) == {"checkpoint_step_1", "checkpoint_step_3"}
    for folder in newest_first(run):
        assert fault(folder) is None
        assert set(tree(folder)) == {"rank0.json", "rank1.json", MANIFEST}


# --- damage ------------------------------------------------------------------------------------


def cut_to(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])


def flip(path: Path, byte: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "deleted": Path.unlink,
    "halved": lambda path: cut_to(path, path.stat().st_size // 2),
    "one byte short": lambda path: cut_to(path, path.stat().st_size - 1),
    "one byte long": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "first bit flipped": lambda path: flip(path, 0),
    "last bit flipped": lambda path: flip(path, -1),
    "middle bit flipped": lambda path: flip(path, path.stat().st_size // 2),
    "emptied": lambda path: path.write_bytes(b""),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a folder instead": lambda path: (path.unlink(), path.mkdir()),
}


def test_a_sound_checkpoint_has_no_fault(folder):
    assert fault(folder) is None


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_found_and_named(folder, name, damage):
    DAMAGE[damage](folder / name)
    reason = fault(folder)
    assert reason is not None
    assert name in reason


def test_no_flipped_bit_of_the_manifest_changes_what_is_verified(folder):
    path = folder / MANIFEST
    expected, original = json.loads(path.read_text())["files"], path.read_bytes()
    for i in range(len(original)):
        flip(path, i, bit=i % 8)
        if fault(folder) is None:  # white space, at most
            assert json.loads(path.read_text())["files"] == expected
        path.write_bytes(original)


MANIFESTS = {
    "list": [],
    "text": "files",
    "number": 5,
    "null": None,
    "no files": {},
    "no format": {"files": {"trainer.json": {"bytes": 11, "sha256": "0"}}},
    "a newer format": {"format": 2, "files": {"trainer.json": {"bytes": 11, "sha256": "0"}}},
    "files a list": {"format": 1, "files": FILES},
    "files null": {"format": 1, "files": None},
    "an empty list of files": {"format": 1, "files": {}},
    "entries null": {"format": 1, "files": dict.fromkeys(FILES)},
    "an entry without sha256": {"format": 1, "files": {"trainer.json": {"bytes": 11}}},
    "a file above": {"format": 1, "files": {"../outside.json": {"bytes": 2, "sha256": "0"}}},
    "an absolute path": {"format": 1, "files": {"/etc/hostname": {"bytes": 2, "sha256": "0"}}},
    "a path with a null": {"format": 1, "files": {"a\0b": {"bytes": 2, "sha256": "0"}}},
}


@pytest.mark.parametrize("manifest", MANIFESTS.values(), ids=MANIFESTS)
def test_an_edited_manifest_is_a_fault(folder, manifest):
    (folder / MANIFEST).write_text(json.dumps(manifest))
    reason = fault(folder)
    assert reason is not None
    assert MANIFEST in reason


@pytest.mark.parametrize(
    "data", [b"", b"garbage", b"\xff\xfe", b"{", b'{"files": {}} x', b"\0" * 9]
)
def test_a_manifest_that_is_no_json_is_a_fault(folder, data):
    (folder / MANIFEST).write_bytes(data)
    assert MANIFEST in str(fault(folder))


def test_a_checkpoint_of_a_newer_version_is_refused(folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"format": 2}))
    assert "is of format 2, this version reads 1" in str(fault(folder))


def test_tensors_that_the_manifest_does_not_name_are_a_fault(folder):
    shutil.copy(folder / "model.safetensors", folder / "model-2.safetensors")
    assert fault(folder) == f"model-2.safetensors is not in {MANIFEST}"


def test_a_file_outside_is_refused_even_if_it_matches(folder):
    outside = folder.parent / "outside.json"
    outside.write_text("{}")
    entry = {"bytes": 2, "sha256": checkpoint.sha256(outside)}
    (folder / MANIFEST).write_text(json.dumps({"format": 1, "files": {"../outside.json": entry}}))
    assert "outside the folder" in str(fault(folder))


def test_a_file_swapped_with_another_is_a_fault(folder):
    (folder / "trainer.json").write_text('{"step": 2}')  # as long as before
    assert fault(folder) == f"trainer.json is damaged: its sha256 is not the one in {MANIFEST}"


# --- find --------------------------------------------------------------------------------------


def test_the_newest_is_found_by_number_not_by_name_or_time(run):
    warnings: list[str] = []
    assert find(run, "auto", warnings.append) == run / "checkpoint_step_100"
    assert warnings == []
    assert [path.name.split("_")[-1] for path in newest_first(run)] == ["100", "20", "3"]


def test_a_damaged_one_is_passed_over_with_a_warning_that_says_why(run):
    (run / "checkpoint_step_100/trainer.json").write_text("")
    warnings: list[str] = []
    assert find(run, "auto", warnings.append) == run / "checkpoint_step_20"
    (reported,) = warnings
    assert "checkpoint_step_100: trainer.json has 0 bytes, expected 13" in reported


def test_where_all_are_damaged_the_run_stops_and_never_starts_from_zero(run):
    for folder in newest_first(run):
        (folder / "trainer.json").unlink()
    with pytest.raises(CheckpointError, match="no valid checkpoint to resume from") as caught:
        find(run, "auto", lambda reported: None)
    assert caught.value.exit_code == 4
    for step in (3, 20, 100):
        assert f"checkpoint_step_{step}: trainer.json is missing" in str(caught.value)


def test_where_there_is_none_there_is_nothing_to_resume(tmp_path):
    assert find(tmp_path, "auto", pytest.fail) is None
    assert find(tmp_path / "missing", "auto", pytest.fail) is None


def test_a_folder_that_is_asked_for_is_taken_or_refused_never_replaced_by_another(run):
    wanted = run / "checkpoint_step_3"
    assert find(run, str(wanted), pytest.fail) == wanted
    for damaged in (wanted, run / "missing"):
        (wanted / "trainer.json").unlink(missing_ok=True)
        with pytest.raises(CheckpointError, match=damaged.name):
            find(run, str(damaged), lambda reported: None)


@pytest.mark.parametrize(
    "name",
    ["checkpoint_step_900.staging", f"{SCRATCH}/checkpoint_step_900", "checkpoint_step_", "x"],
)
def test_only_committed_checkpoints_are_found_and_pruned(run, name):
    shutil.copytree(run / "checkpoint_step_3", run / name)  # sound, but not committed
    assert step_of(find(run, "auto", pytest.fail)) == 100
    assert len(newest_first(run)) == 3


# --- prune -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "kept"), [(1, {100}), (2, {20, 100}), (3, {3, 20, 100}), (9, {3, 20, 100})]
)
def test_pruning_keeps_the_newest_by_number(run, keep, kept):
    (run / "final_checkpoint").mkdir()
    (run / "training.log").write_text("")
    prune(run, keep)
    expected = {f"checkpoint_step_{n}" for n in kept} | {"final_checkpoint", "training.log"}
    assert names(run) == expected
    assert step_of(find(run, "auto", pytest.fail)) == 100


def test_pruning_removes_what_a_killed_pruning_left(run):
    for name in ("checkpoint_step_3.removed", f"checkpoint_step_1{checkpoint.REPLACED}", "x"):
        shutil.copytree(run / "checkpoint_step_3", run / SCRATCH / name)
    prune(run, 2)
    assert names(run) == {"checkpoint_step_20", "checkpoint_step_100"}


def test_pruning_counts_no_damaged_one_so_a_sound_one_always_stays(run):
    (run / "checkpoint_step_100/trainer.json").unlink()
    cut_to(run / "checkpoint_step_20/model.safetensors", 10)
    prune(run, 1)
    assert step_of(find(run, "auto", lambda reported: None)) == 3


# --- one lineage, and only what is ours ----------------------------------------------------------


def save(
    run: Path, step: int, parent: Path | None, accelerator: Accelerator, mark: int = 0
) -> Path:
    """A checkpoint that continues `parent`; `mark` makes it another one of the same step."""

    def write(folder: Path) -> None:
        content(step)(folder)
        (folder / "mark.json").write_text(str(mark))

    lineage = {"attempt": 1, "parent": reference(parent, run) if parent else None}
    commit(run / f"checkpoint_step_{step}", write, accelerator, 0, lineage)
    return run / f"checkpoint_step_{step}"


def test_a_manifest_names_parent_and_attempt(tmp_path, accelerator):
    first = save(tmp_path, 2, None, accelerator)
    second = save(tmp_path, 4, first, accelerator)
    manifest = json.loads((second / MANIFEST).read_text())
    assert manifest["attempt"] == 1
    assert manifest["parent"] == {
        "folder": "checkpoint_step_2",
        "manifest_sha256": checkpoint.manifest_sha256(first),
    }
    elsewhere = reference(first, tmp_path / "other")["folder"]
    assert elsewhere == "../checkpoint_step_2"


def test_a_checkpoint_of_another_branch_is_passed_over(tmp_path, accelerator):
    first = save(tmp_path, 2, None, accelerator)
    second = save(tmp_path, 4, first, accelerator)
    save(tmp_path, 6, second, accelerator)
    save(tmp_path, 4, first, accelerator, mark=1)  # of another branch, in the place of the parent
    warnings: list[str] = []
    assert find(tmp_path, "auto", warnings.append) == second
    assert "checkpoint_step_6: it continues another checkpoint_step_4" in warnings[0]


def test_a_damaged_parent_is_no_other_parent(tmp_path, accelerator):
    first = save(tmp_path, 2, None, accelerator)
    second = save(tmp_path, 4, first, accelerator)
    manifest = json.loads((first / MANIFEST).read_text())
    manifest["files"]["mark.json"]["sha256"] = "0" * 64  # its sizes are right
    (first / MANIFEST).write_text(json.dumps(manifest))
    assert find(tmp_path, "auto", pytest.fail) == second
    cut_to(first / MANIFEST, 50)
    assert find(tmp_path, "auto", pytest.fail) == second


def test_a_checkpoint_under_the_name_of_another_step_is_passed_over(run):
    shutil.copytree(run / "checkpoint_step_20", run / "checkpoint_step_101")
    warnings: list[str] = []
    assert find(run, "auto", warnings.append) == run / "checkpoint_step_100"
    assert "checkpoint_step_101: it is the checkpoint of step 20" in warnings[0]


def test_what_a_user_added_or_copied_is_never_removed(run, accelerator):
    copies = ["checkpoint_step_3.old", "checkpoint_step_3_good.old", "checkpoint_step_3.staging"]
    copies += ["checkpoint_step_3.removed", "checkpoint_step_3 (copy)", "my.replaced"]
    for name in copies:
        shutil.copytree(run / "checkpoint_step_3", run / name)
    (run / "checkpoint_step_2").mkdir()  # without a manifest: made by hand
    (run / "checkpoint_step_2/mine.txt").write_text("mine")
    (run / "checkpoint_step_3/notes.txt").write_text("the best one")
    (run / "checkpoint_step_1").symlink_to(run / "checkpoint_step_3.old")
    before = tree(run)
    for step in (200, 300):
        commit(run / f"checkpoint_step_{step}", content(step), accelerator)
        prune(run, 1)
    kept = {name: data for name, data in before.items() if "step_20/" not in name}
    kept = {name: data for name, data in kept.items() if "step_100/" not in name}
    assert kept.items() <= tree(run).items()
    assert (run / "checkpoint_step_1").is_symlink()
    assert not (run / "checkpoint_step_200").exists()


def test_what_a_user_made_in_the_place_of_a_checkpoint_gets_another_name(run, accelerator):
    for name in ("checkpoint_step_20", "checkpoint_step_20.1"):
        (run / name).mkdir(exist_ok=True)
        (run / name / "mine.txt").write_text("mine")
    commit(run / "checkpoint_step_20", content(20), accelerator)
    assert step_of(run / "checkpoint_step_20") == 20
    for number in (1, 2):
        assert (run / f"checkpoint_step_20.{number}/mine.txt").read_text() == "mine"


def test_a_link_in_the_place_of_the_scratch_folder_is_refused(run, tmp_path, accelerator):
    outside = tmp_path / "outside"
    (outside / "checkpoint_step_200").mkdir(parents=True)
    (outside / "checkpoint_step_200/mine.txt").write_text("mine")
    (run / SCRATCH).symlink_to(outside)
    with pytest.raises(CheckpointError, match="is a link"):
        commit(run / "checkpoint_step_200", content(200), accelerator)
    assert (outside / "checkpoint_step_200/mine.txt").read_text() == "mine"


@pytest.mark.slow
def test_processes_that_share_a_scratch_folder_do_not_disturb_each_other(tmp_path):
    """Each removes the scratch folder when it is empty, while others are about to use it."""

    def work(number: int) -> None:
        for _ in range(200):
            staging = checkpoint.make_staging(tmp_path / f"folder{number}")
            (staging / "x").write_text("x")
            checkpoint.seal(staging, tmp_path / f"folder{number}")
            checkpoint.remove(tmp_path / f"folder{number}")

    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=work, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert not list(tmp_path.iterdir())
