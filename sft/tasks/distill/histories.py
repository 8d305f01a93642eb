"""Source histories: collected by all cores, kept in files, and drawn as curves.

Each goal has a Parquet file (docs/research/DISTILL.md has the columns) in a folder that is named by
the settings. Existing files are kept, so a collection that was killed continues. Goals are learnt
in groups that do not depend on the number of cores, so the histories do not depend on it either.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from filelock import FileLock

from sft.errors import ExitCode, UserError
from sft.runtime import children, hardware
from sft.runtime.console import bar, make_console, write_json
from sft.tasks.distill.config import EPISODE, Distill
from sft.tasks.distill.darkroom import best_return, cell_of, goals, name_of, place_of, random_return
from sft.tasks.distill.source import SOURCES, Histories

GROUPS = 4  # groups of goals, one process each; fewer and larger groups take less total time
COLUMNS = ("stream", "step", "row", "column", "action", "reward", "next_row", "next_column", "done")
CURVES = "curves.json"


class HistoryError(UserError):
    """An error in making or reading source histories."""

    exit_code = ExitCode.DATA


def folder_of(settings: Distill) -> Path:
    """Returns the folder of histories, named by all settings that determine its files."""
    number, seed = f"{settings.num_streams}x{settings.num_steps}", settings.source_seed
    name = f"{settings.source}_{number}_split{settings.split_seed}_seed{seed}"
    return Path(settings.data_dir, name)


def path_of(folder: Path, goal: int) -> Path:
    return folder / "goal_{}_{}.parquet".format(*place_of(goal))


def jobs(settings: Distill) -> list[tuple[int, list[int]]]:
    """Returns (seed, goals) for each job of one process: a group of goals, or a single one."""
    trained, _ = goals(settings.split_seed)
    number = GROUPS if settings.source == "ppo" else len(trained)
    seeds = np.random.SeedSequence(settings.source_seed).generate_state(number)
    return [(int(seed), trained[i::number]) for i, seed in enumerate(seeds)]


def collect(settings: Distill, moved: Callable[[], None] = lambda: None) -> Path:
    """Returns the folder with the histories of all training goals; collects missing ones.

    It uses all cores, and calls `moved` whenever there is progress.
    """
    folder = folder_of(settings)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            for left in folder.glob(".*"):  # partial files of a killed collection
                left.unlink()
            if left_to_do := missing(settings):
                _collect(settings, folder, left_to_do, moved)
    except OSError as error:
        raise HistoryError(
            f"cannot keep histories in {folder}: {error.strerror or error}; make room, or set "
            "distill.data_dir"
        ) from None
    return folder


def missing(settings: Distill) -> list[tuple[int, list[int]]]:
    """Returns the jobs whose files are missing."""
    folder = folder_of(settings)
    return [job for job in jobs(settings) if not all(path_of(folder, g).exists() for g in job[1])]


def _collect(
    settings: Distill,
    folder: Path,
    missing: list[tuple[int, list[int]]],
    moved: Callable[[], None],
) -> None:
    console = make_console()
    number = sum(len(learnt) for _, learnt in missing)
    console.print(f"source histories ({settings.source}) of {number} goals go to {folder}")
    with bar(console, "goals", number) as advance:
        for learnt in _learn_all(settings, folder, missing):
            advance(len(learnt))
            moved()
    _write_curves(settings, folder)


def _learn_all(
    settings: Distill, folder: Path, missing: list[tuple[int, list[int]]]
) -> Iterator[list[int]]:
    """Learns on all cores and yields goals when their histories are written."""
    workers = min(len(missing), hardware.usable_cores())
    if workers < 2:
        for seed, learnt in missing:
            _learn(settings, folder, seed, learnt)
            yield learnt
        return
    spawn = multiprocessing.get_context("spawn")  # after a fork, torch's threads may hang
    with ProcessPoolExecutor(workers, spawn, _start_worker, (os.getpid(),)) as pool:
        waiting = {pool.submit(_learn, settings, folder, *job): job[1] for job in missing}
        try:
            for done in as_completed(waiting):
                done.result()
                yield waiting[done]
        except BrokenProcessPool:
            raise HistoryError(
                "a process that collected histories was killed, most likely out of memory; "
                "run the command again: finished goals are kept"
            ) from None


def _start_worker(parent: int) -> None:
    children.prepare_worker(parent)
    torch.set_num_threads(1)  # each core has a process


def _learn(settings: Distill, folder: Path, seed: int, learnt: list[int]) -> None:
    source = SOURCES[settings.source]
    found = source(learnt, settings.num_streams, settings.num_steps, seed)
    for i, goal in enumerate(learnt):
        own = Histories(*(each[i] for each in found))
        path = path_of(folder, goal)
        part = path.with_name(f".{path.name}")
        pq.write_table(_table(own), part, compression="zstd")
        part.replace(path)


def _table(own: Histories) -> pa.Table:
    """Returns one goal's histories (streams, steps) with a row for each step."""
    streams, steps = own.cells.shape
    at = np.arange(steps)
    before, after = (place_of(each.numpy()) for each in (own.cells, own.next_cells))
    columns: tuple[np.ndarray, ...] = (
        np.repeat(np.arange(streams, dtype=np.uint16), steps).reshape(streams, steps),
        np.broadcast_to(at.astype(np.uint32), (streams, steps)),
        *before,
        own.actions.numpy(),
        own.rewards.numpy(),
        *after,
        np.broadcast_to(at % EPISODE == EPISODE - 1, (streams, steps)),
    )
    return pa.table({name: c.ravel() for name, c in zip(COLUMNS, columns, strict=True)})


def _write_curves(settings: Distill, folder: Path) -> None:
    """Writes the mean return of each episode by goal, and draws their mean."""
    learnt, _ = goals(settings.split_seed)
    means = load(settings).returns().mean(1)
    named = {name_of(goal): means[i].tolist() for i, goal in enumerate(learnt)}
    write_json(folder / CURVES, named)
    levels = {
        "random": float(np.mean([random_return(goal) for goal in learnt])),
        "best": float(np.mean([best_return(goal) for goal in learnt])),
    }
    draw((folder / CURVES).with_suffix(".png"), {settings.source: curve(folder)}, levels)


def load(settings: Distill) -> Histories:
    """Returns the histories of all training goals, in the order of the split."""
    folder = folder_of(settings)
    shape = (settings.num_streams, settings.num_steps)
    parts = [_read(path_of(folder, goal), shape) for goal in goals(settings.split_seed)[0]]
    return Histories.concatenate(parts)


def _read(path: Path, shape: tuple[int, int]) -> Histories:
    try:
        table = pq.read_table(path, columns=list(COLUMNS[2:8]))
        row, column, action, reward, r, c = (each.to_numpy() for each in table.columns)
        found = (cell_of(row, column), action, reward, cell_of(r, c))
        tensors = (torch.from_numpy(np.array(each).reshape(1, *shape)) for each in found)
        return Histories(*tensors)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise HistoryError(
            f"{path}: expected the history of {shape[0]} streams and {shape[1]} steps: {error}; "
            "remove the file, and `make collect-darkroom` makes it again"
        ) from None


def digest(histories: Histories) -> str:
    """Returns a digest of the histories."""
    sha = hashlib.sha256()
    for each in histories:
        sha.update(each.numpy().tobytes())
    return sha.hexdigest()


def curve(folder: Path) -> list[float]:
    """Returns the mean return over goals of each episode of the sources."""
    found = json.loads((folder / CURVES).read_text("utf-8"))
    return np.mean(list(found.values()), 0).tolist()


def draw(path: Path, curves: Mapping[str, Sequence[float]], levels: Mapping[str, float]) -> None:
    """Writes a PNG. `curves`: returns from the first episode on; `levels`: dotted lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    longest = max(map(len, curves.values()))
    for label, values in curves.items():
        axes.plot(range(1, len(values) + 1), values, label=label)
    for label, value in levels.items():
        axes.axhline(value, linestyle=":", color="grey")
        axes.text(longest, value, label, ha="right", va="bottom", color="grey")
    axes.set(xlabel="episode", ylabel="return", xlim=(1, longest))
    axes.legend(loc="center right")
    figure.savefig(path, dpi=120)
