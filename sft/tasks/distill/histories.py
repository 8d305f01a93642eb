"""Source histories: collected by all cores, kept in files, and drawn as curves.

Each goal has a Parquet file (docs/research/DISTILL.md has the columns) in a folder that is named by
the settings. Goals are learnt in groups that do not depend on the number of cores, so the histories
do not depend on it either. A group that is not finished has a file with its state after the last
episode. So a collection that was killed loses an episode at most.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from filelock import FileLock

from sft.errors import ExitCode, UserError
from sft.runtime import children, hardware
from sft.runtime.console import bar, make_console, write_json
from sft.tasks.distill.config import Distill
from sft.tasks.distill.grid import cell_of, place_of
from sft.tasks.distill.source import SOURCES, Histories
from sft.tasks.distill.worlds import world_of

GROUPS = 4  # of goals, each learnt by one process; fewer and larger ones take less total time
COLUMNS = ("stream", "step", "row", "column", "action", "reward", "next_row", "next_column", "done")
CURVES = "curves.json"
POLL = 1.0  # seconds between two looks at how far the workers are
Job = tuple[int, list[int]]  # seed, and the goals that one process learns
_of_worker: dict[str, Any] = {}  # the counter of episodes that all workers share


class HistoryError(UserError):
    """An error in making or reading source histories."""

    exit_code = ExitCode.DATA


def folder_of(settings: Distill) -> Path:
    """Returns the folder of histories, named by all settings that determine its files."""
    number, seed = f"{settings.num_streams}x{settings.num_steps}", settings.source_seed
    name = f"{settings.source}_{number}_split{settings.split_seed}_seed{seed}"
    is_default = settings.world == Distill.model_fields["world"].default
    return Path(settings.data_dir, name if is_default else f"{settings.world}_{name}")


def goals_of(settings: Distill) -> tuple[list[int], list[int]]:
    """Returns (training goals, unseen goals)."""
    return world_of(settings.world).split_goals(settings.split_seed)


def path_of(settings: Distill, goal: int) -> Path:
    """Returns the file of a goal's histories."""
    name = world_of(settings.world).name_of(goal).replace(",", "_")
    return folder_of(settings) / f"goal_{name}.parquet"


def jobs_of(settings: Distill) -> list[Job]:
    """Returns a job for each group of goals; `stable_baselines3` learns single ones."""
    trained, _ = goals_of(settings)
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
            for part in folder.glob(".goal_*.parquet"):  # files of a killed collection
                part.unlink()
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
    return [
        job for job in jobs_of(settings) if not all(path_of(settings, g).exists() for g in job[1])
    ]


def _collect(settings: Distill, folder: Path, jobs: list[Job], tick: Callable[[], None]) -> None:
    console = make_console()
    number = sum(len(job_goals) for _, job_goals in jobs)
    console.print(f"source histories ({settings.source}) of {number} goals go to {folder}")
    episodes = settings.num_steps // settings.episode
    with bar(console, "episodes of all goals", number * episodes) as advance:

        def add(number: int) -> None:
            advance(number)
            tick()

        _run_jobs(settings, jobs, add)
    _write_curves(settings, folder)


def _run_jobs(settings: Distill, jobs: list[Job], add: Callable[[int], None]) -> None:
    """Runs the jobs on all cores. `add` receives how many episodes of a goal were learnt."""
    workers = min(len(jobs), hardware.usable_cores())
    if workers < 2:
        for job in jobs:
            _run_job(settings, *job, add)
        return
    spawn = multiprocessing.get_context("spawn")  # after a fork, torch's threads may hang
    counter = spawn.Value("q", 0)
    with ProcessPoolExecutor(workers, spawn, _start_worker, (os.getpid(), counter)) as pool:
        pending = {pool.submit(_run_job, settings, *job) for job in jobs}
        seen = 0
        try:
            while pending:
                done, pending = wait(pending, POLL)
                for each in done:
                    each.result()
                if counter.value > seen:
                    add(counter.value - seen)
                    seen = counter.value
        except BrokenProcessPool:
            raise HistoryError(
                "a process that collected histories was killed, most likely out of memory; "
                "run the command again: it goes on from the last episode"
            ) from None


def _start_worker(parent: int, counter: Any) -> None:
    children.prepare_worker(parent)
    torch.set_num_threads(1)  # each core has a process
    _of_worker["counter"] = counter


def _count(number: int) -> None:
    """Adds to the number of episodes of all workers."""
    counter = _of_worker["counter"]
    with counter.get_lock():
        counter.value += number


def _run_job(
    settings: Distill, seed: int, job_goals: list[int], add: Callable[[int], None] = _count
) -> None:
    """Learns the goals and writes their histories."""
    learn, state = SOURCES[settings.source], folder_of(settings) / f".group_{seed}.pt"
    sizes = settings.num_streams, settings.num_steps
    after = partial(add, len(job_goals))
    found = learn(world_of(settings.world), job_goals, *sizes, seed, after, state)
    for i, goal in enumerate(job_goals):
        own = Histories(*(each[i] for each in found))
        path = path_of(settings, goal)
        part = path.with_name(f".{path.name}")
        pq.write_table(_table(own, settings.episode), part, compression="zstd")
        part.replace(path)
    state.unlink(missing_ok=True)


def _table(own: Histories, episode: int) -> pa.Table:
    """Returns one goal's histories (streams, steps) with a row for each step."""
    stream, step = np.indices(own.cells.shape)
    columns: tuple[np.ndarray, ...] = (
        stream.astype(np.uint16),
        step.astype(np.uint32),
        *place_of(own.cells.numpy()),
        own.actions.numpy(),
        own.rewards.numpy(),
        *place_of(own.next_cells.numpy()),
        step % episode == episode - 1,
    )
    return pa.table({name: c.ravel() for name, c in zip(COLUMNS, columns, strict=True)})


def _write_curves(settings: Distill, folder: Path) -> None:
    """Writes the mean return of each episode by goal, and draws their mean."""
    learnt, _ = goals_of(settings)
    world, means = world_of(settings.world), load(settings).returns(settings.episode).mean(1)
    named = {world.name_of(goal): means[i].tolist() for i, goal in enumerate(learnt)}
    write_json(folder / CURVES, named)
    references = world.reference_returns(learnt)
    curves: dict[str, list[float]] = {settings.source: shares_of_best(named, references["best"])}
    draw((folder / CURVES).with_suffix(".png"), curves, references)


def load(settings: Distill) -> Histories:
    """Returns the histories of all training goals, in the order of the split."""
    shape = (settings.num_streams, settings.num_steps)
    learnt, _ = goals_of(settings)
    return Histories.concatenate([_read(path_of(settings, goal), shape) for goal in learnt])


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


def source_curve(settings: Distill) -> list[float]:
    """Returns the source's curve: its returns by episode, as shares of the best ones."""
    found = json.loads((folder_of(settings) / CURVES).read_text("utf-8"))
    learnt, _ = goals_of(settings)
    return shares_of_best(found, world_of(settings.world).reference_returns(learnt)["best"])


def shares_of_best(
    returns: Mapping[str, Sequence[float]], best: Mapping[str, float]
) -> list[float]:
    """Returns the mean over goals of each return divided by the best one of its goal.

    Goals differ in what can be reached, so means of returns over other goals cannot be compared.
    """
    return np.mean([np.divide(each, best[goal]) for goal, each in returns.items()], 0).tolist()


def draw(
    path: Path,
    curves: Mapping[str, Sequence[float]],
    references: Mapping[str, Mapping[str, float]],
) -> None:
    """Writes a PNG of shares of the best return by episode; that of random actions is dotted."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    longest = max(map(len, curves.values()))
    for label, values in curves.items():
        axes.plot(range(1, len(values) + 1), values, label=label)
    floor = {goal: [value] for goal, value in references["random"].items()}
    for label, share in (("random", shares_of_best(floor, references["best"])[0]), ("best", 1.0)):
        axes.axhline(share, linestyle=":", color="grey")
        axes.text(longest, share, label, ha="right", va="bottom", color="grey")
    axes.set(xlabel="episode", ylabel="share of the best return", xlim=(1, longest), ylim=(0, 1.1))
    axes.legend(loc="center right")
    figure.savefig(path, dpi=120)
