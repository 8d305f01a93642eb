"""Source histories in files, and the windows of them that are trained on.

Each goal has a Parquet file (docs/research/DISTILL.md has the columns) in a folder that is named by
the settings. Existing files are kept, so a collection that was killed continues. Goals are learnt
in groups that do not depend on the number of cores, so the histories do not depend on it either.

A window has episodes of one goal, in the order in which the source learnt. Each comes from any
stream, because one policy acts in every stream. A window begins with some of the first episodes, in
which the source walks at random. For each, several streams are drawn, and the window takes the one
that visits most new cells. So the model learns to search. When an episode has found the goal, or
earlier, the window jumps to late episodes. So the model learns to use its first reward at once. The
episodes between are left out: there the source moves to a goal that only other streams have found,
which the model cannot know. The choice of episodes is a function of the window's number.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property
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
from sft.tasks.distill.curve import draw
from sft.tasks.distill.darkroom import SIZE, best_return, cell_of, goals, place_of, random_return
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
        own = Histories(*(each[i] for each in found.tensors()))
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
    named = {"{},{}".format(*place_of(goal)): means[i].tolist() for i, goal in enumerate(learnt)}
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


@dataclass(frozen=True)
class Windows:
    """Numbered windows of the streams [first, last) of all goals: as many as their episodes."""

    histories: Histories
    settings: Distill
    first: int
    last: int

    def __len__(self) -> int:
        return self.num_goals * (self.last - self.first) * self.num_episodes

    @property
    def num_goals(self) -> int:
        return len(self.histories.cells)

    @property
    def num_episodes(self) -> int:
        """Returns the number of episodes of a history."""
        return self.settings.num_steps // EPISODE

    @cached_property
    def _episodes(self) -> tuple[torch.Tensor, ...]:
        """Returns the tensors of the histories, (goals, streams, episodes, 20) each."""
        return tuple(each.unflatten(-1, (-1, EPISODE)) for each in self.histories.tensors())

    @cached_property
    def _rewarded(self) -> np.ndarray:
        """Returns whether the goal was found, (goals, own streams, episodes)."""
        return (self.histories.returns()[:, self.first : self.last] > 0).numpy()

    @cached_property
    def _visited(self) -> np.ndarray:
        """Returns whether an episode visits a cell, (goals, own streams, first episodes, cells)."""
        searching = self.settings.search_episodes
        reached = self._episodes[3][:, self.first : self.last, :searching].long()
        visited = torch.zeros(*reached.shape[:-1], SIZE * SIZE, dtype=torch.bool)
        return visited.scatter_(-1, reached, True).numpy()

    def choice(self, number: int) -> tuple[int, np.ndarray, np.ndarray]:
        """Returns (goal, streams, episodes) of a window."""
        random = np.random.default_rng([self.settings.source_seed, number])
        goal, size = number % self.num_goals, self.settings.context // EPISODE
        streams = random.integers(self.first, self.last, size)
        stays = random.integers(2 * size)  # half of the windows do not jump until the goal is found
        early = np.sort(random.integers(self.settings.search_episodes, size=size))[:stays]
        found = self._search(random, goal, early)
        streams[: len(found)] = found
        later = random.integers(self.settings.jump_to, self.num_episodes, size - len(found))
        return goal, streams, np.concatenate([early[: len(found)], np.sort(later)])

    def _search(self, random: np.random.Generator, goal: int, episodes: np.ndarray) -> list[int]:
        """Returns streams for these episodes, up to the first that finds the goal.

        For each episode some streams are drawn; the one that visits most new cells is taken.
        """
        streams: list[int] = []
        seen = np.zeros(SIZE * SIZE, dtype=bool)
        for episode in episodes:
            drawn = random.integers(self.last - self.first, size=self.settings.search_best_of)
            visited = self._visited[goal, drawn, episode]
            best = int((visited & ~seen).sum(-1).argmax())
            seen |= visited[best]
            streams.append(self.first + int(drawn[best]))
            if self._rewarded[goal, drawn[best], episode]:
                break
        return streams

    def gather(self, numbers: Sequence[int]) -> Histories:
        """Returns the histories (windows, context) of these windows."""
        chosen = [self.choice(number) for number in numbers]
        goal = torch.tensor([goal for goal, _, _ in chosen], dtype=torch.long)[:, None]
        size = self.settings.context // EPISODE
        stream, episode = (
            torch.from_numpy(np.array([c[i] for c in chosen]).reshape(-1, size)).long()
            for i in (1, 2)
        )
        return Histories(*(each[goal, stream, episode].flatten(1) for each in self._episodes))


def num_bytes(settings: Distill) -> int:
    """Returns the bytes of all histories, and of the rewards and visits that select windows."""
    number = len(goals(settings.split_seed)[0]) * settings.num_streams
    known = settings.num_steps // EPISODE + settings.search_episodes * SIZE * SIZE
    return number * (4 * settings.num_steps + known)


def digest(histories: Histories) -> str:
    """Returns a digest of the histories."""
    sha = hashlib.sha256()
    for each in histories.tensors():
        sha.update(each.numpy().tobytes())
    return sha.hexdigest()


def curve(folder: Path) -> list[float]:
    """Returns the mean return over goals of each episode of the sources."""
    found = json.loads((folder / CURVES).read_text("utf-8"))
    return np.mean(list(found.values()), 0).tolist()
