"""Dark Key-to-Door: its rewards, its best returns, and all that the registry makes of it."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from conftest import ROOT

from sft.config.load import with_values
from sft.errors import ConfigError
from sft.runtime import hardware
from sft.tasks.distill import grid, histories, source, task
from sft.tasks.distill.config import Distill
from sft.tasks.distill.grid import Rooms, cell_of, place_of
from sft.tasks.distill.key_to_door import KeyToDoor
from sft.tasks.distill.rollout import play
from sft.tasks.distill.windows import split
from sft.tasks.distill.worlds import WORLDS, world_of
from sft.tasks.registry import load_run

pytestmark = pytest.mark.slow

DOWN, UP, RIGHT, LEFT, STAY = range(5)
CONFIG = ROOT / "configs/ad_key_to_door.yaml"


def goal_of(key: tuple[int, int], door: tuple[int, int]) -> int:
    return 81 * cell_of(*key) + cell_of(*door)


def rewards_of(goal: int, actions: list[int]) -> list[int]:
    rooms = Rooms(KeyToDoor(len(actions)), [goal])
    return [int(rooms.step(torch.tensor([action]))[1]) for action in actions]


@pytest.mark.parametrize(
    ("key", "door", "actions", "expected"),
    [
        ((5, 4), (5, 5), [DOWN, RIGHT, STAY], [1, 1, 0]),
        ((5, 4), (4, 5), [RIGHT, STAY, LEFT, DOWN, DOWN, UP], [0, 0, 0, 1, 0, 0]),  # no door yet
        ((5, 4), (4, 4), [DOWN, DOWN, UP, UP, STAY], [1, 0, 0, 1, 0]),  # each once
        ((4, 4), (4, 4), [STAY, STAY, STAY], [1, 1, 0]),  # a key at the start is found by arriving
    ],
)
def test_the_key_is_rewarded_once_and_then_the_door_once(key, door, actions, expected):
    assert rewards_of(goal_of(key, door), actions) == expected


def test_an_episode_begins_without_the_key():
    rooms = Rooms(KeyToDoor(2), [goal_of((5, 4), (6, 4))])
    for _ in range(2):
        rooms.reset()
        assert [int(rooms.step(torch.tensor([DOWN]))[1]) for _ in range(2)] == [1, 1]


@pytest.mark.parametrize("name", WORLDS)
def test_the_best_and_the_random_return_are_those_of_all_sequences_of_actions(name):
    """Of five steps, in which not every goal can be reached."""
    world = type(world_of(name))(5)
    every = torch.tensor([*product(range(5), repeat=5)])
    near = [goal_of((5, 4), (6, 5)), goal_of((4, 4), (4, 2)), goal_of((2, 4), (2, 7)), 77]
    for goal in near if name == "key_to_door" else [40, 31, 50, 0]:
        rooms, total = Rooms(world, torch.full((len(every),), goal)), torch.zeros(len(every))
        for actions in every.T:
            total += rooms.step(actions)[1]
        assert world.best_return(goal) == total.max()
        assert world.random_return(goal) == pytest.approx(float(total.double().mean()))


def test_the_best_return_is_that_of_the_shortest_way():
    """By the distances in the grid; arriving takes a step at least."""
    world, random = KeyToDoor(9), np.random.default_rng(0)
    for goal in random.integers(world.num_goals, size=40).tolist():
        key, door = (np.array(place_of(cell)) for cell in divmod(goal, 81))
        first = max(1, abs(key - (4, 4)).sum())
        second = first + max(1, abs(door - key).sum())
        assert world.best_return(goal) == int(first <= 9) + int(second <= 9)


def test_all_goals_can_be_solved_and_have_names_of_their_own():
    world = world_of("key_to_door")
    trained, unseen = world.split_goals(0)
    assert (len(set(trained)), len(unseen), set(trained) & set(unseen)) == (120, 8, set())
    assert {world.best_return(goal) for goal in unseen} == {2}
    assert len({world.name_of(goal) for goal in range(81**2)}) == 81**2
    assert world.name_of(goal_of((1, 2), (3, 4))) == "1,2,3,4"


def test_a_world_is_its_file_and_a_line_of_the_registry():
    naming = [p.name for p in ROOT.glob("sft/**/*.py") if "key_to_door" in p.read_text().lower()]
    assert sorted(naming) == ["worlds.py"]
    naming = [p.name for p in ROOT.glob("sft/**/*.py") if "KeyToDoor" in p.read_text()]
    assert sorted(naming) == ["key_to_door.py", "worlds.py"]


def test_lengths_are_those_of_its_episodes():
    with pytest.raises(ConfigError, match=r"context.*multiple of the steps.*key_to_door: 50"):
        load_run(CONFIG, ["distill.context=120"])


def test_it_is_collected_windowed_and_played(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "usable_cores", lambda: 1)
    monkeypatch.setattr(source, "EPOCHS", 1)
    monkeypatch.setattr(KeyToDoor, "num_trained", 5)
    small = {"num_streams": 4, "held_out_streams": 1, "num_steps": 200, "context": 100}
    small |= {"jump_to": 3, "width": 16, "num_layers": 1, "data_dir": str(tmp_path)}
    config = with_values(load_run(CONFIG), {f"distill.{key}": v for key, v in small.items()})
    settings: Distill = config.distill
    folder = histories.collect(settings)
    assert len(list(folder.glob("goal_?_?_?_?.parquet"))) == 5
    found = histories.load(settings)
    assert found.returns(50).shape == (5, 4, 4)
    assert 0 < found.returns(50).max() <= 2
    assert (found.cells[..., ::50] == grid.START).all()
    assert 0 < max(histories.source_curve(settings)) <= 1
    windows, _ = split(found, settings)
    assert windows.gather([0, 1]).cells.shape == (2, 100)
    model = task.build(settings, 0, torch.device("cpu")).eval()
    _, unseen = histories.goals_of(settings)
    returns = play(model, [(goal, 0) for goal in unseen], 4).returns  # longer than the context
    assert returns.shape == (8, 4)
    assert returns.max() <= 2


def test_a_world_is_a_part_of_a_run_but_the_first_one_as_in_older_runs(monkeypatch):
    monkeypatch.setattr(task.Distillation, "digests", classmethod(lambda *_: {}))
    worlds = {}
    for world in ("darkroom", "key_to_door"):
        config = load_run(CONFIG).model_copy()
        config = with_values(config, {"distill.world": world})
        worlds[world] = task.Distillation.identity_of(config, None)["distill"]
    assert "world" not in worlds["darkroom"]
    assert '"world":"key_to_door"' in worlds["key_to_door"]
