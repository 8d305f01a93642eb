"""The Darkroom, the sources that learn it, and their histories in files."""

from __future__ import annotations

from functools import partial

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import representatives
from gymnasium.utils.env_checker import check_env

from sft.runtime import hardware
from sft.tasks.distill import grid, histories, source
from sft.tasks.distill.config import Distill
from sft.tasks.distill.grid import MOVES, START, Room, Rooms, cell_of, place_of
from sft.tasks.distill.histories import HistoryError
from sft.tasks.distill.windows import Windows
from sft.tasks.distill.worlds import world_of

pytestmark = pytest.mark.slow

DARKROOM = world_of("darkroom")
# Published: unseen goals for seed 0, their best return, and what random actions got.
UNSEEN = [(4, 2), (5, 6), (6, 8), (7, 2), (3, 6), (0, 5), (5, 8), (5, 4)]
BEST = [19, 18, 15, 16, 18, 16, 16, 20]
RANDOM = [0.45, 0.37, 0.10, 0.14, 0.35, 0.12, 0.12, 0.97]


def test_the_split_and_the_returns_are_the_published_ones():
    trained, unseen = DARKROOM.split_goals(0)
    assert [place_of(goal) for goal in unseen] == UNSEEN
    assert sorted(trained + unseen) == list(range(81))
    assert [DARKROOM.best_return(goal) for goal in unseen] == BEST
    floors = [DARKROOM.random_return(goal) for goal in unseen]
    assert floors == pytest.approx(RANDOM, abs=0.025)  # those were estimated by playing
    assert np.mean(floors) == pytest.approx(0.33, abs=0.01)
    assert DARKROOM.split_goals(1)[1] != unseen


def test_a_room_is_a_sound_environment_of_gymnasium():
    check_env(Room(DARKROOM, cell_of(4, 2)), skip_render_check=True)


def test_many_rooms_are_each_one_room():
    """Against the rules written out, walls included."""
    random = np.random.default_rng(0)
    places = [(0, 0), (4, 4), (8, 8), (3, 5)]
    goals = [cell_of(*place) for place in places]
    rooms, singles = Rooms(DARKROOM, goals), [Room(DARKROOM, goal) for goal in goals]
    for _ in range(3):
        assert rooms.reset().tolist() == [START] * 4
        at = [np.array([4, 4]) for _ in places]
        assert [single.reset()[0].tolist() for single in singles] == [[4, 4]] * 4
        for step in range(20):
            drift = [1, 2, 0, 4][step % 4] if step % 3 else 1  # into the wall above, too
            actions = [drift, *random.integers(0, 5, 3)]
            cells, rewards, over = rooms.step(torch.tensor(actions))
            for i, single in enumerate(singles):
                at[i] = np.clip(at[i] + MOVES[actions[i]], 0, 8)
                seen, reward, terminated, truncated, _ = single.step(int(actions[i]))
                assert place_of(int(cells[i])) == tuple(at[i]) == tuple(seen)
                assert float(rewards[i]) == reward == (tuple(at[i]) == places[i])
                assert (terminated, truncated) == (over, False) == (step == 19, False)
    with pytest.raises(AssertionError, match="reset"):
        rooms.step(torch.tensor([0] * 4))


# --- sources -------------------------------------------------------------------------------------


def test_our_ppo_learns_what_that_of_stable_baselines_learns(monkeypatch):
    """From the same weights and the same episode: four epochs of one batch each, which no order of
    the examples can change."""
    pytest.importorskip("stable_baselines3")
    monkeypatch.setattr(source, "EPOCHS", 4)
    monkeypatch.setattr(source, "BATCH", 2000)
    learner = source.make_learner(DARKROOM, cell_of(4, 5), 100, seed=1)
    networks = source._Networks(1, torch.Generator())

    def theirs() -> list[torch.Tensor]:
        policy = learner.policy.mlp_extractor.policy_net
        value = learner.policy.mlp_extractor.value_net
        heads = [learner.policy.action_net, learner.policy.value_net]
        hidden = [torch.stack([policy[i].weight.T, value[i].weight.T]) for i in (0, 2)]
        biases = [torch.stack([policy[i].bias, value[i].bias])[:, None] for i in (0, 2)]
        weights = [*hidden, *(head.weight.T[None] for head in heads)]
        return [p.detach() for p in [*weights, *biases, *(h.bias[None, None] for h in heads)]]

    for own, value in zip(networks.parameters, theirs(), strict=True):
        own.data.copy_(value)
    start = [own.detach().clone() for own in networks.parameters]
    steps: list[source.Step] = []
    learner.learn(2000, callback=partial(source.record, steps))
    columns = zip(*steps, strict=True)
    episode = source.Histories(*(torch.stack(column, -1)[None] for column in columns))
    with torch.no_grad():
        logs, values = networks(source.PLACES[episode.cells.flatten(1)])
    taken = logs.gather(-1, episode.actions.flatten(1)[..., None]).view(1, 100, 20)
    values = values.view(1, 100, 20)
    advantages = source._advantages(episode.rewards.float(), values)
    generator = torch.Generator().manual_seed(0)
    source._update(networks, episode, taken, advantages, advantages + values, generator)
    for own, before, value in zip(networks.parameters, start, theirs(), strict=True):
        moved = (value - before).abs().max()
        assert moved > 5e-4
        assert (own - value).abs().max() < 0.01 * moved


@pytest.mark.slow
def test_the_return_of_a_source_rises(monkeypatch):
    monkeypatch.setattr(source, "EPOCHS", 8)
    found = source.ppo(DARKROOM, [cell_of(4, 5), cell_of(3, 3)], 50, 160, seed=0)
    returns = found.returns(20).mean(1)  # (goals, episodes)
    assert found.cells.shape == (2, 50, 160)
    assert (returns[:, -1] > 2 * returns[:, 0] + 0.5).all()
    assert (returns[:, 0] < 2.5).all()


@pytest.mark.parametrize("name", representatives(list(source.SOURCES)))
def test_histories_are_whole_episodes_of_the_room(name):
    if name == "stable_baselines3":
        pytest.importorskip(name)
    goals = [cell_of(5, 5), cell_of(0, 0)]
    found = source.SOURCES[name](DARKROOM, goals, 3, 60, 7)
    again = source.SOURCES[name](DARKROOM, goals, 3, 60, 7)
    for own, other in zip(found, again, strict=True):
        assert own.shape == (2, 3, 60)
        assert torch.equal(own, other)
    cells, actions, after = (x.long() for x in (found.cells, found.actions, found.next_cells))
    assert torch.equal(grid.NEXT[cells, actions], after)  # at the end of an episode as well
    assert torch.equal(found.rewards.bool(), after == torch.tensor(goals)[:, None, None])
    assert (cells[..., ::20] == START).all()
    within = torch.arange(59) % 20 != 19
    assert torch.equal(cells[..., 1:][..., within], after[..., :-1][..., within])
    assert len(actions.unique()) == 5


# --- files ---------------------------------------------------------------------------------------


@pytest.fixture
def few(tmp_path, monkeypatch) -> Distill:
    """Settings of short histories, which are collected in this process."""
    monkeypatch.setattr(hardware, "usable_cores", lambda: 1)
    monkeypatch.setattr(source, "EPOCHS", 1)
    return Distill(
        data_dir=str(tmp_path), num_streams=4, held_out_streams=1, num_steps=120, context=40
    )


def test_a_collection_that_was_stopped_goes_on(few, monkeypatch):
    folder = histories.collect(few)
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(list(folder.glob("goal_*.parquet"))) == 73
    _, group = histories.jobs_of(few)[2]
    stamps = {path: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}
    histories.path_of(few, group[3]).unlink()
    (folder / ".goal_0_0.parquet").write_text("half")
    assert histories.collect(few) == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
    again = {path for path, stamp in stamps.items() if path.stat().st_mtime_ns != stamp}
    assert again == {histories.path_of(few, goal) for goal in group}

    for goal in group:
        histories.path_of(few, goal).unlink()
    play, played, beats = source._play, [], []

    def beat() -> None:
        beats.append(len(played))
        if len(played) == 2:
            raise KeyboardInterrupt

    def played_episode(*arguments):
        played.append(0)
        return play(*arguments)

    monkeypatch.setattr(source, "_play", played_episode)
    with pytest.raises(KeyboardInterrupt):
        histories.collect(few, beat)
    assert beats == [1, 2]  # one for each episode
    histories.collect(few)
    assert len(played) == 6  # none of its episodes was played again
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole


@pytest.mark.thorough("all but the processes in test_a_collection_that_was_stopped_goes_on")
def test_processes_collect_what_one_process_does(tmp_path, monkeypatch):
    sizes = {"num_streams": 2, "held_out_streams": 1, "num_steps": 40, "context": 40}
    found, beats = {}, []
    for cores in (1, 2):
        monkeypatch.setattr(hardware, "usable_cores", lambda cores=cores: cores)
        settings = Distill(data_dir=str(tmp_path / str(cores)), jump_to=3, **sizes)
        monkeypatch.setattr(histories, "POLL", 0.05)
        histories.collect(settings, lambda cores=cores: beats.append(cores))
        found[cores] = histories.load(settings)
    assert all(map(torch.equal, found[1], found[2]))
    assert beats.count(1) == 4 * 2  # of each group's episodes
    assert beats.count(2) > 1


def test_a_file_has_the_documented_columns(few):
    histories.collect(few)
    goal = DARKROOM.split_goals(0)[0][5]
    table = pq.read_table(histories.path_of(few, goal)).to_pydict()
    assert list(table) == list(histories.COLUMNS)
    assert table["stream"] == [stream for stream in range(4) for _ in range(120)]
    assert table["step"] == list(range(120)) * 4
    assert table["done"] == [step % 20 == 19 for step in range(120)] * 4
    own = histories.load(few)
    assert table["row"] == (own.cells[5] // 9).flatten().tolist()
    assert table["next_column"] == (own.next_cells[5] % 9).flatten().tolist()
    assert table["reward"] == own.rewards[5].flatten().tolist()
    assert len(histories.source_curve(few)) == 6


def test_a_damaged_file_is_refused_by_name(few):
    histories.collect(few)
    path = histories.path_of(few, DARKROOM.split_goals(0)[0][9])
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(HistoryError, match=rf"{path.name}: expected the history of 4 streams"):
        histories.load(few)


SEARCHING = Distill(
    num_streams=6, num_steps=400, context=80, search_episodes=3, jump_to=5, held_out_streams=2
)


def test_windows_are_episodes_of_one_goal_in_their_order():
    """Every field but the rewards reports where it comes from. The first two goals are found by
    stream 1 in each episode, by stream 2 from the second one on; the third goal by nobody."""
    settings = SEARCHING.model_copy(update={"search_best_of": 1})
    index = torch.arange(3 * 6 * 400).view(3, 6, 400)
    rewards = torch.zeros(3, 6, 20, 20)
    rewards[:2, 1, :, -1] = rewards[:2, 2, 1:, 0] = 1
    history = source.Histories(index, index, rewards.flatten(2), index % 81)
    windows = Windows(history, settings, 0, 4)
    found = windows.gather(range(300)).cells.view(300, 4, 20)
    assert (found % 20 == torch.arange(20)).all()  # whole episodes
    goals, streams = found[..., 0] // 2400, found[..., 0] // 400 % 6
    episodes = found[..., 0] % 400 // 20
    assert (goals == (torch.arange(300) % 3)[:, None]).all()
    assert set(streams.flatten().tolist()) == {0, 1, 2, 3}  # not those that are held out
    assert (episodes.diff(dim=1) >= 0).all()
    early = episodes < 3
    assert set(episodes[early].tolist()) == {0, 1, 2}
    assert set(episodes[~early].tolist()) == set(range(5, 20))
    won = rewards[goals, streams, episodes].any(-1)
    assert not early[:, 1:][won[:, :-1]].any()  # what has found the goal jumps
    stayed = early[goals[:, 0] == 2].sum(1).bincount(minlength=5) / 100
    assert (stayed[:4] > 0).all()
    assert stayed[4] == pytest.approx(0.5, abs=0.15)  # half of them to the end
    assert torch.equal(windows.gather([17]).cells, windows.gather(range(300)).cells[17:18])
    assert len(windows) == 3 * 4 * 20


def test_a_search_goes_on_where_it_has_not_been():
    """Streams 0 to 3 go to six, five, four and one cell; those of 1 and 3 are also those of 0."""
    visits = [range(6), range(5), range(10, 14), range(1)]
    cells = torch.stack([torch.tensor((list(each) * 20)[:20]) for each in visits])
    after = cells.repeat(1, 20)[None]
    history = source.Histories(after, after, torch.zeros(1, 4, 400), after)
    settings = SEARCHING.model_copy(update={"search_best_of": 64})
    windows = Windows(history, settings, 0, 4)
    long = [streams for _, streams, episodes in map(windows.choose, range(99)) if episodes[1] < 3]
    assert len(long) > 20
    assert {tuple(streams[:2]) for streams in long} == {(0, 2)}
