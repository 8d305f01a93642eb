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
from sft.tasks.distill.darkroom import cell_of, name_of, place_of, reference_returns, split_goals
from sft.tasks.distill.source import SOURCES, Histories

GROUPS = 4  # of goals, each learnt by one process; fewer and larger ones take less total time
COLUMNS = ("stream", "step", "row", "column", "action", "reward", "next_row", "next_column", "done")
CURVES = "curves.json"
Job = tuple[int, list[int]]  # seed, and the goals that one process learns


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


def jobs_of(settings: Distill) -> list[Job]:
    """Returns a job for each group of goals; `stable_baselines3` learns single ones."""
    trained, _ = split_goals(settings.split_seed)
    number = GROUPS if settings.source == "ppo" else len(trained)
    seeds = np.random.SeedSequence(settings.source_seed).generate_state(number)
    return [(int(seed), trained[i::number]) for i, seed in enumerate(seeds)]


def collect(settings: Distill, tick: Callable[[], None] = lambda: None) -> Path:
    """Returns the folder with the histories of all training goals; collects missing ones.

    It uses all cores, and calls `tick` when there is progress.
    """
    folder = folder_of(settings)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            for partial in folder.glob(".goal_*.parquet"):  # files of a killed collection
                partial.unlink()
            if jobs := missing_jobs(settings):
                _collect(settings, folder, jobs, tick)
    except OSError as error:
        raise HistoryError(
            f"cannot keep histories in {folder}: {error.strerror or error}; make room, or set "
            "distill.data_dir"
        ) from None
    return folder


def missing_jobs(settings: Distill) -> list[Job]:
    """Returns the jobs whose files are missing."""
    folder = folder_of(settings)
    return [
        job for job in jobs_of(settings) if not all(path_of(folder, g).exists() for g in job[1])
    ]


def _collect(settings: Distill, folder: Path, jobs: list[Job], tick: Callable[[], None]) -> None:
    console = make_console()
    number = sum(len(job_goals) for _, job_goals in jobs)
    console.print(f"source histories ({settings.source}) of {number} goals go to {folder}")
    with bar(console, "goals", number) as advance:
        for num_done in _run_jobs(settings, folder, jobs):
            advance(num_done)
            tick()
    _write_curves(settings, folder)


def _run_jobs(settings: Distill, folder: Path, jobs: list[Job]) -> Iterator[int]:
    """Runs the jobs on all cores and yields the number of goals of each that is done."""
    workers = min(len(jobs), hardware.usable_cores())
    if workers < 2:
        yield from (_run_job(settings, folder, *job) for job in jobs)
        return
    spawn = multiprocessing.get_context("spawn")  # after a fork, torch's threads may hang
    with ProcessPoolExecutor(workers, spawn, _start_worker, (os.getpid(),)) as pool:
        futures = [pool.submit(_run_job, settings, folder, *job) for job in jobs]
        try:
            for done in as_completed(futures):
                yield done.result()
        except BrokenProcessPool:
            raise HistoryError(
                "a process that collected histories was killed, most likely out of memory; "
                "run the command again: finished goals are kept"
            ) from None


def _start_worker(parent: int) -> None:
    children.prepare_worker(parent)
    torch.set_num_threads(1)  # each core has a process


def _run_job(settings: Distill, folder: Path, seed: int, job_goals: list[int]) -> int:
    """Learns the goals, writes their histories and returns their number."""
    source = SOURCES[settings.source]
    found = source(job_goals, settings.num_streams, settings.num_steps, seed)
    for i, goal in enumerate(job_goals):
        own = Histories(*(each[i] for each in found))
        path = path_of(folder, goal)
        partial = path.with_name(f".{path.name}")
        pq.write_table(_table(own), partial, compression="zstd")
        partial.replace(path)
    return len(job_goals)


def _table(own: Histories) -> pa.Table:
    """Returns one goal's histories (streams, steps) with a row for each step."""
    stream, step = np.indices(own.cells.shape)
    columns: tuple[np.ndarray, ...] = (
        stream.astype(np.uint16),
        step.astype(np.uint32),
        *place_of(own.cells.numpy()),
        own.actions.numpy(),
        own.rewards.numpy(),
        *place_of(own.next_cells.numpy()),
        step % EPISODE == EPISODE - 1,
    )
    return pa.table({name: c.ravel() for name, c in zip(COLUMNS, columns, strict=True)})


def _write_curves(settings: Distill, folder: Path) -> None:
    """Writes the mean return of each episode by goal, and draws their mean."""
    learnt, _ = split_goals(settings.split_seed)
    means = load(settings).returns().mean(1)
    named = {name_of(goal): means[i].tolist() for i, goal in enumerate(learnt)}
    write_json(folder / CURVES, named)
    curves: dict[str, list[float]] = {settings.source: curve(folder)}
    draw((folder / CURVES).with_suffix(".png"), curves, reference_returns(learnt))


def load(settings: Distill) -> Histories:
    """Returns the histories of all training goals, in the order of the split."""
    folder = folder_of(settings)
    shape = (settings.num_streams, settings.num_steps)
    parts = [_read(path_of(folder, goal), shape) for goal in split_goals(settings.split_seed)[0]]
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


def draw(
    path: Path,
    curves: Mapping[str, Sequence[float]],
    references: Mapping[str, Mapping[str, float]],
) -> None:
    """Writes a PNG of returns by episode, with the means of `references` as dotted lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    longest = max(map(len, curves.values()))
    for label, values in curves.items():
        axes.plot(range(1, len(values) + 1), values, label=label)
    for label, by_goal in references.items():
        mean = float(np.mean([*by_goal.values()]))
        axes.axhline(mean, linestyle=":", color="grey")
        axes.text(longest, mean, label, ha="right", va="bottom", color="grey")
    axes.set(xlabel="episode", ylabel="return", xlim=(1, longest))
    axes.legend(loc="center right")
    figure.savefig(path, dpi=120)
