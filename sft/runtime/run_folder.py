"""Knows what a run writes into its folder, and what of it may be moved or removed.

The checkpoints in a run folder are one lineage: each continues the one before. The manifest of a
checkpoint names its parent with a digest, and the attempt that wrote it. Before a run continues
from a checkpoint otherwise than it did, `set_aside` moves what came after that checkpoint to
`abandoned/attempt_<n>/`. The move is recorded before it begins, so a run that was killed meanwhile
completes it when it starts again. Nothing is removed from `abandoned/`.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from sft.errors import CheckpointError
from sft.runtime import checkpoint, plain
from sft.runtime.checkpoint import fault
from sft.runtime.console import parse_temporary, write_json
from sft.runtime.plain import read_json

NAME = re.compile(r"checkpoint_step_(\d+)")
FINAL = "final_checkpoint"
METRICS = "metrics.jsonl"
BEST = "best.json"
HISTORY = "history.jsonl"  # every attempt, and the digests of every checkpoint's tensors
ORIGIN = "origin.json"  # the checkpoint of another folder with which the run began
# What only a run that has finished writes, or a command that uses it:
RESULTS = re.compile(rf"{FINAL}|evaluation|classify|merged(_agent\d+)?(\.failed(\.\d+)?)?")
BASE_RESULTS = ("base.json", "base.jsonl")  # in evaluation/: those of the model before training
DURING = "during"  # in evaluation/: answers while it trained, a file for each step
ABANDONED = "abandoned"
FILES = (
    *("status.json", ".lock", "traceback.txt", "launcher.log", "requeue.json", "config.yaml"),
    *("plan.json", "audit.json", "audit.html", "coverage.json", "rejected.jsonl", "training.log"),
    *(METRICS, HISTORY, BEST, ORIGIN),
    *("metrics.json", "predictions.jsonl", *BASE_RESULTS),  # in a folder of an evaluation
)
WRITTEN_FIRST = ("status.json", ".lock", "traceback.txt", "launcher.log", "requeue.json", ORIGIN)
FOLDERS = (".ranks", "evaluation", "tensorboard", ABANDONED, checkpoint.SCRATCH)
MOVING = ".moving"  # ends the name of a folder into which checkpoints are being moved
BRANCH = "branch.json"  # in such a folder: what is moved, and why


def refuse_foreign(run: Path) -> None:
    """Raises CheckpointError if a link, pipe or device is where a run writes a file or a folder."""
    within = [path for name in (".ranks", "evaluation") for path in (run / name).glob("*")]
    files = [path for path in within if path.is_symlink() or not path.is_dir()]
    plain.refuse_others([*(run / name for name in FILES), *files], [run / name for name in FOLDERS])


def refuse_to_overwrite(folder: Path) -> None:
    """Raises CheckpointError if a folder without a run has files with names that a run writes.

    Such a file belongs to a user, for example the configuration of an experiment.
    """
    names = [each for each in FILES if each not in WRITTEN_FIRST]
    places = [folder / name for name in (*names, *(f"evaluation/{name}" for name in names))]
    if found := [path for path in places if path.exists()]:
        raise CheckpointError(
            f"{', '.join(map(str, found))}: no run has written this, and a run in {folder} would "
            f"overwrite it; set train.output_dir to a new folder, such as {folder / 'run'}"
        )


# -- checkpoints


def newest_first(run: Path) -> list[Path]:
    """Returns the checkpoint folders of a run, newest first, whether valid or not."""
    folders = [path for path in run.glob("checkpoint_step_*") if NAME.fullmatch(path.name)]
    return sorted(folders, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    return int(folder.name.rsplit("_", 1)[1])


def reference(folder: Path, run: Path) -> dict[str, str]:
    """Returns what the manifest of a checkpoint in `run` says about its parent `folder`."""
    sha256 = checkpoint.manifest_sha256(folder)
    return {"folder": os.path.relpath(folder.resolve(), run.resolve()), "manifest_sha256": sha256}


def find_fault(folder: Path, *, digests: bool = True) -> str | None:
    """Returns why a run must not continue from a checkpoint in its folder, or None.

    It is damaged, is that of another step, or continues another parent than the one beside it.
    """
    if reason := fault(folder, digests=digests):
        return reason
    state = read_json(folder / "trainer.json")
    if NAME.fullmatch(folder.name) and state.get("step", step_of(folder)) != step_of(folder):
        return f"it is the checkpoint of step {state['step']}"
    parent = checkpoint.read_manifest(folder).get("parent") or {}
    name = str(parent.get("folder"))
    is_beside = NAME.fullmatch(name) and name != folder.name
    if is_beside and fault(folder.with_name(name), digests=False) is None:
        sha256 = checkpoint.manifest_sha256(folder.with_name(name))
        # A manifest with a damaged digest is no other parent.
        if sha256 != parent.get("manifest_sha256") and fault(folder.with_name(name)) is None:
            return f"it continues another {name} than the one beside it"
    return None


def find(run: Path, wanted: str, warn: Callable[[str], None]) -> Path | None:
    """Returns the checkpoint to resume from: `wanted`, or the newest valid one if that is `auto`.

    Before its first checkpoint, a run that began with one of another folder has that one. Returns
    None only if `auto` finds no checkpoint at all. Raises CheckpointError if there are some and
    none is valid, so that training never restarts from zero silently.
    """
    candidates = [Path(wanted).resolve() if Path(wanted).is_symlink() else Path(wanted)]
    if wanted != "auto":
        _refuse_moved(candidates[0])
    else:
        candidates = newest_first(run)
        if all(find_fault(folder, digests=False) for folder in candidates):
            candidates = [*_restore_replaced(run), *candidates]
    rejected = []
    for folder in candidates:
        reason = find_fault(folder) if wanted == "auto" else fault(folder)
        if reason is None:
            return folder
        rejected.append(f"{folder}: {reason}")
        warn(f"checkpoint rejected: {rejected[-1]}")
    if not rejected:
        return _find_origin(run)
    raise CheckpointError(
        "no valid checkpoint to resume from:\n  "
        + "\n  ".join(rejected)
        + "\nGive train.resume_from_checkpoint=<a good folder>, or remove these to start anew."
    )


def record_origin(run: Path, folder: Path | None) -> None:
    """Records with which checkpoint of another folder a new run begins, if with any."""
    try:
        if not folder:
            (run / ORIGIN).unlink(missing_ok=True)
            return
        values = {"folder": str(folder.resolve()), "sha256": checkpoint.manifest_sha256(folder)}
        if read_json(run / ORIGIN) != values:
            write_json(run / ORIGIN, values, sync=True)
    except OSError as error:
        raise CheckpointError(f"cannot write {run / ORIGIN}: {error.strerror}") from None


def _find_origin(run: Path) -> Path | None:
    """Returns the recorded one, or None. Raises CheckpointError if it is not what it was."""
    if not (run / ORIGIN).exists():
        return None
    recorded = read_json(run / ORIGIN)
    folder = Path(str(recorded.get("folder")))
    reason = fault(folder)
    if reason is None and checkpoint.manifest_sha256(folder) != recorded.get("sha256"):
        reason = "it is another checkpoint now"
    if reason is None:
        return folder
    raise CheckpointError(
        f"{run} has no checkpoint yet, and the one that its run began with cannot be used: "
        f"{folder}: {reason}. Give train.resume_from_checkpoint=<that checkpoint, wherever it is "
        "now>, or null to start anew"
    )


def _refuse_moved(wanted: Path) -> None:
    moved = sorted(wanted.parent.glob(f"{ABANDONED}/*/{wanted.name}"))
    if moved and not wanted.exists():
        raise CheckpointError(
            f"{wanted} is not in the lineage of the run any more: it was moved to "
            f"{' and '.join(map(str, moved))}; to continue from it, give that folder and another "
            "train.output_dir"
        )


def newest_valid(run: Path) -> Path | None:
    """Returns the checkpoint that `auto` would take; compares sizes only, not digests."""
    found = newest_first(run)
    return next((path for path in found if find_fault(path, digests=False) is None), None)


def _restore_replaced(run: Path) -> list[Path]:
    """Restores valid checkpoints that a killed run was replacing. Returns them newest first."""
    result = []
    for old in checkpoint.scratch_folder(run).glob(f"checkpoint_step_*{checkpoint.REPLACED}"):
        folder = run / old.name.removesuffix(checkpoint.REPLACED)
        if NAME.fullmatch(folder.name) and not folder.exists() and fault(old) is None:
            result.append(old.rename(folder))
    return sorted(result, key=step_of, reverse=True)


def prune(run: Path, keep: int, spared: Sequence[str] = (), step: int | None = None) -> None:
    """Removes checkpoints older than the newest `keep` valid ones, and what killed saves left.

    The names in `spared` stay, and so do folders that hold anything that no run wrote. Checkpoints
    newer than the run's own `step` are not counted and not removed.
    """
    num_valid = 0
    for folder in newest_first(run):
        if step is not None and step_of(folder) > step:
            continue
        if num_valid < keep:
            num_valid += find_fault(folder, digests=False) is None
        elif folder.name not in spared and checkpoint.is_ours(folder):
            checkpoint.remove(folder)
    checkpoint.clear_scratch(run)


# -- branches


def set_aside(run: Path, step: int, attempt: int | None, is_changed: bool) -> str | None:
    """Moves what the run has after `step` out of its lineage; returns a sentence about it, or None.

    That is its later checkpoints, the metrics of later steps and a later best checkpoint. If there
    are any, or the run `is_changed`, it is also what the finished run wrote.
    """
    later = [folder for folder in newest_first(run) if step_of(folder) > step]
    if not later and not (is_changed and (run / FINAL).exists()):
        return None
    moving = _unused_name(run / ABANDONED, f"attempt_{attempt or 1}")
    moving.mkdir(parents=True)
    record = {"after_step": step, "attempt": attempt, "since": time.strftime("%F %T")}
    write_json(moving / BRANCH, record, sync=True)
    return _complete_move(run, moving, step)


def complete_moves(run: Path) -> list[str]:
    """Completes the moves that a killed run has begun; returns a sentence about each.

    Raises CheckpointError if that is impossible, for example on a full disk.
    """
    done = []
    for moving in sorted((run / ABANDONED).glob(f"*{MOVING}")):
        step = read_json(moving / BRANCH).get("after_step")
        try:
            if isinstance(step, int):
                done.append(_complete_move(run, moving, step))
            elif not any(moving.iterdir()):
                moving.rmdir()
        except OSError as error:
            raise CheckpointError(
                f"cannot move what came after step {step} to {moving}: {error.strerror}"
            ) from None
    return done


def remove_unfinished(run: Path) -> None:
    """Removes the temporary files of FILES that killed processes left (`console.atomic_write`)."""
    for path in [*run.glob(".*"), *run.glob("evaluation/.*")]:
        file, process = parse_temporary(path.name) or ("", 0)
        if file in FILES and not psutil.pid_exists(process):
            with suppress(OSError):  # a folder is not ours
                path.unlink()


def _unused_name(folder: Path, name: str) -> Path:
    """Returns the path to move to; its name without MOVING is that of the result."""
    names = [name, *(f"{name}.{number}" for number in range(1, 10_000))]
    taken = {path.name.removesuffix(MOVING) for path in folder.glob("*")}
    return folder / f"{next(each for each in names if each not in taken)}{MOVING}"


def _complete_move(run: Path, moving: Path, step: int) -> str:
    """Moves each part by one rename; parts that a killed run has moved are not there any more.

    The newest checkpoint goes first, so at any instant the others are one lineage.
    """
    _move_metrics(run / METRICS, moving / METRICS, step)
    for source in _results_after(run, step):
        target = moving / source.relative_to(run)
        target.parent.mkdir(parents=True, exist_ok=True)
        source.rename(target)
    for folder in newest_first(run):
        if step_of(folder) > step:
            folder.rename(moving / folder.name)
    target = moving.with_name(moving.name.removesuffix(MOVING))
    moving.rename(target)
    for changed in (target, target.parent, run):
        checkpoint.sync(changed)
    moved = sorted(path.name for path in target.iterdir() if path.name != BRANCH)
    return (
        f"the run continues after step {step:,}: what came later was moved to {target} "
        f"({', '.join(moved)})"
    )


def _results_after(run: Path, step: int) -> Iterator[Path]:
    best = read_json(run / BEST).get("step")
    if not isinstance(best, int) or best > step:
        yield from filter(Path.exists, [run / BEST])
    for path in sorted(path for path in run.iterdir() if RESULTS.fullmatch(path.name)):
        if path.name == "evaluation" and path.is_dir():
            kept = (*BASE_RESULTS, DURING)
            yield from [each for each in path.iterdir() if each.name not in kept]
            later = (
                each for each in path.glob(f"{DURING}/step_*") if _step_of_answers(each) > step
            )
            yield from sorted(later)
        else:
            yield path


def during(run: Path, step: int) -> Path:
    """Returns the file of the answers that were scored after `step`, while it trained."""
    return run / "evaluation" / DURING / f"step_{step}.jsonl"


def _step_of_answers(path: Path) -> int:
    number = path.stem.removeprefix("step_")
    return int(number) if number.isdecimal() else -1


# -- metrics


def metrics_end(path: Path, step: int) -> int:
    """Returns the length in bytes of the lines of metrics.jsonl up to `step`."""
    kept = 0
    with plain.open_file(path, "rb") as file:
        for line in file:
            if not 0 <= _step_of_line(line) <= step:
                break
            kept += len(line)
    return kept


def last_step(path: Path) -> int:
    """Returns the step of the last line of metrics.jsonl; 0 if there is none."""
    with plain.open_file(path, "rb") as file:
        return max((_step_of_line(line) for line in file), default=0)


def _step_of_line(line: bytes) -> int:
    """Returns the step of a line of metrics.jsonl, or -1 if a kill or a full disk cut it short."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else -1
    except (ValueError, TypeError, KeyError):
        return -1


def _move_metrics(path: Path, target: Path, step: int) -> None:
    """Moves the lines after `step` to `target`, which appears whole before the lines go."""
    end = metrics_end(path, step) if path.exists() else 0
    if path.exists() and path.stat().st_size > end:
        if not target.exists():
            part = target.with_name(f".{target.name}")
            part.write_bytes(path.read_bytes()[end:])
            checkpoint.sync(part)
            part.rename(target)
        plain.cut(path, end)
