"""Runs source algorithms, which learn each goal from the beginning and record their steps.

Both are the PPO of Stable-Baselines3 with the published settings. `ppo` stacks the networks of many
goals in matrices and trains them together: the same updates in a tenth of the time.
`stable_baselines` is the library itself, one goal after the other; tests compare `ppo` with it.

One policy acts in every stream of a goal, and is updated after every episode.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from sft.tasks.distill.grid import MOVES, NEXT, NUM_CELLS, Room, Rooms, World, cell_of, place_of

# The published settings; the others are Stable-Baselines3's defaults.
BATCH, EPOCHS, RATE = 50, 20, 3e-4
GAMMA, LAMBDA, CLIP, VALUE_WEIGHT, MAX_NORM = 0.99, 0.95, 0.2, 0.5, 0.5
HIDDEN, ADAM_EPSILON = 64, 1e-5
Step = tuple[torch.Tensor, ...]  # cells, actions, rewards and next cells of all streams


class Histories(NamedTuple):
    """The steps of sources, (goals, streams, steps): whole episodes one after the other."""

    cells: torch.Tensor
    actions: torch.Tensor
    rewards: torch.Tensor
    next_cells: torch.Tensor
    """The cell in which each step ended, including the last step of an episode."""

    def returns(self, episode: int) -> torch.Tensor:
        """Returns the returns (goals, streams, episodes); `episode`: its number of steps."""
        return self.rewards.float().unflatten(-1, (-1, episode)).sum(-1)

    @staticmethod
    def concatenate(parts: Sequence[Histories]) -> Histories:
        """Returns the histories of the goals of all parts."""
        return Histories(*map(torch.cat, zip(*parts, strict=True)))


class _Networks:
    """The policies and values of all goals, each like Stable-Baselines3's MlpPolicy.

    They have two hidden layers with tanh and are stacked by kind, then by goal.
    """

    def __init__(self, num_goals: int, generator: torch.Generator):
        def matrices(number: int, inputs: int, outputs: int, gain: float) -> torch.Tensor:
            stack = torch.empty(number, outputs, inputs)
            for each in stack:
                nn.init.orthogonal_(each, gain, generator=generator)
            return stack.transpose(1, 2).contiguous()

        g, root = num_goals, math.sqrt(2)
        weights = [
            matrices(2 * g, 2, HIDDEN, root),
            matrices(2 * g, HIDDEN, HIDDEN, root),
            matrices(g, HIDDEN, len(MOVES), 0.01),
            matrices(g, HIDDEN, 1, 1.0),
        ]
        biases = [torch.zeros(len(each), 1, each.shape[2]) for each in weights]
        self.weights, self.biases, self.num_goals = weights, biases, num_goals
        self.parameters = [*weights, *biases]
        for each in self.parameters:
            each.requires_grad_()
        self.optimizer = torch.optim.Adam(self.parameters, RATE, eps=ADAM_EPSILON, fused=True)

    def __call__(self, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (log probabilities of actions, values) for places (goals, batch, 2)."""
        w, b = self.weights, self.biases
        x = places.repeat(2, 1, 1)
        for layer in (0, 1):
            x = torch.tanh(torch.baddbmm(b[layer], x, w[layer]))
        logits = torch.baddbmm(b[2], x[: self.num_goals], w[2])
        values = torch.baddbmm(b[3], x[self.num_goals :], w[3])
        return logits.log_softmax(-1), values.squeeze(-1)

    def update(self, loss: torch.Tensor) -> None:
        """Makes a step of Adam; the gradient of each goal is clipped separately."""
        self.optimizer.zero_grad()
        loss.backward()
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        own = [each.view(-1, self.num_goals, each[0].numel()) for each in gradients]
        norms = torch.stack([each.square().sum((0, 2)) for each in own]).sum(0).sqrt()
        scale = (MAX_NORM / (norms + 1e-6)).clamp(max=1.0)
        for each in own:
            each.mul_(scale[:, None])
        self.optimizer.step()


def ppo(
    world: World,
    goals: Sequence[int],
    num_streams: int,
    num_steps: int,
    seed: int,
    after_episode: Callable[[], None] = lambda: None,
    kept: Path | None = None,
) -> Histories:
    """Returns the histories of all `goals`, which are trained side by side.

    On one thread of one machine they depend only on the arguments. After each episode its state is
    in the file `kept`; if there is one, the histories go on from it, with the same result.
    """
    generator = torch.Generator().manual_seed(seed)
    networks = _Networks(len(goals), generator)
    rooms = Rooms(world, torch.tensor(goals)[:, None].expand(-1, num_streams).contiguous())
    episodes = [] if kept is None or not kept.exists() else _read_state(kept, networks, generator)
    for _ in episodes:
        after_episode()
    for _ in range(len(episodes), num_steps // world.episode):
        episode, probabilities, values = _play(networks, rooms, generator)
        episodes.append(episode)
        advantages = _advantages(episode.rewards.float(), values)
        _update(networks, episode, probabilities, advantages, advantages + values, generator)
        if kept is not None:
            _write_state(kept, networks, generator, episodes)
        after_episode()
    columns = zip(*episodes, strict=True)
    return Histories(*(torch.cat(column, -1).to(torch.uint8) for column in columns))


def _write_state(
    path: Path, networks: _Networks, generator: torch.Generator, episodes: list[Histories]
) -> None:
    """Writes all that later episodes depend on. A kill leaves the file of the episode before."""
    state = {
        "parameters": [each.detach() for each in networks.parameters],
        "optimizer": networks.optimizer.state_dict(),
        "generator": generator.get_state(),
        "episodes": [[each.to(torch.uint8) for each in episode] for episode in episodes],
    }
    part = path.with_name(f"{path.name}.part")
    torch.save(state, part)
    part.replace(path)


def _read_state(path: Path, networks: _Networks, generator: torch.Generator) -> list[Histories]:
    """Reads what `_write_state` wrote, and returns the episodes."""
    state = torch.load(path, weights_only=True)
    for own, saved in zip(networks.parameters, state["parameters"], strict=True):
        own.data.copy_(saved)
    networks.optimizer.load_state_dict(state["optimizer"])
    generator.set_state(state["generator"])
    return [Histories(*episode) for episode in state["episodes"]]


PLACES = torch.tensor([place_of(cell) for cell in range(NUM_CELLS)], dtype=torch.float32)


@torch.no_grad()
def _play(
    networks: _Networks, rooms: Rooms, generator: torch.Generator
) -> tuple[Histories, torch.Tensor, torch.Tensor]:
    """Plays one episode in every stream: (its steps, log probabilities of actions, values).

    All tensors are (goals, streams, steps).
    """
    cells, steps = rooms.reset(), []
    for _ in range(rooms.world.episode):
        logs, values = networks(PLACES[cells])
        drawn = torch.multinomial(logs.exp().flatten(0, 1), 1, generator=generator)
        actions = drawn.view_as(cells)
        taken = logs.gather(-1, actions[..., None]).squeeze(-1)
        before = cells
        cells, rewards, _ = rooms.step(actions)
        steps.append((before, actions, rewards, cells, taken, values))
    *episode, taken, values = (torch.stack(column, -1) for column in zip(*steps, strict=True))
    return Histories(*episode), taken, values


def _advantages(rewards: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Returns generalised advantages along the last dimension, which is one episode."""
    result, later = torch.empty_like(values), torch.zeros_like(values[..., 0])
    after = later  # the value after the last step is 0
    for step in reversed(range(rewards.shape[-1])):
        error = rewards[..., step] + GAMMA * after - values[..., step]
        later = error + GAMMA * LAMBDA * later
        after, result[..., step] = values[..., step], later
    return result


def _update(
    networks: _Networks,
    episode: Histories,
    before: torch.Tensor,
    advantages: torch.Tensor,
    returns: torch.Tensor,
    generator: torch.Generator,
) -> None:
    """Runs the epochs of one update; each goal has its own order."""
    flat = [each.flatten(1) for each in (episode.actions, before, advantages, returns)]
    places = PLACES[episode.cells.flatten(1)]
    for _ in range(EPOCHS):
        order = torch.rand(places.shape[:2], generator=generator).argsort(1)
        shuffled = [places.gather(1, order[..., None].expand_as(places))]
        shuffled += [each.gather(1, order) for each in flat]
        batches = (each.split(BATCH, 1) for each in shuffled)
        for seen, actions, old, advantage, aim in zip(*batches, strict=True):
            logs, values = networks(seen)
            ratio = (logs.gather(-1, actions[..., None]).squeeze(-1) - old).exp()
            spread = advantage.std(1, keepdim=True) + 1e-8
            gain = (advantage - advantage.mean(1, True)) / spread
            clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
            policy = -torch.min(ratio * gain, clipped * gain).mean(1)
            value = (aim - values).square().mean(1)
            networks.update((policy + VALUE_WEIGHT * value).sum())


# --- Stable-Baselines3 ---------------------------------------------------------------------------


def stable_baselines(
    world: World,
    goals: Sequence[int],
    num_streams: int,
    num_steps: int,
    seed: int,
    after_episode: Callable[[], None] = lambda: None,
    kept: Path | None = None,
) -> Histories:
    """Returns histories of Stable-Baselines3's own PPO, one goal after the other.

    Nothing is `kept` of a goal that is not finished.
    """
    parts = []
    for goal in goals:
        steps: list[Step] = []
        learner = make_learner(world, goal, num_streams, seed)

        def record_step(values: dict[str, Any], of_learner: Any, steps: list[Step] = steps) -> bool:
            goes_on = record(steps, values, of_learner)
            if len(steps) % world.episode == 0:
                after_episode()
            return goes_on

        learner.learn(num_streams * num_steps, callback=record_step)
        columns = zip(*steps, strict=True)
        stacked = (torch.stack(column, -1)[None].to(torch.uint8) for column in columns)
        parts.append(Histories(*stacked))
    return Histories.concatenate(parts)


def make_learner(world: World, goal: int, num_streams: int, seed: int) -> Any:
    """Returns a PPO of Stable-Baselines3 that has not learnt yet."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.vec_env import DummyVecEnv

    return PPO(
        "MlpPolicy",
        DummyVecEnv([partial(Room, world, goal)] * num_streams),
        n_steps=world.episode,
        batch_size=BATCH,
        n_epochs=EPOCHS,
        learning_rate=RATE,
        seed=seed,
        device="cpu",
    )


def record(steps: list[Step], values: dict[str, Any], _: Any) -> bool:
    """Appends the last step of all streams; the callback of Stable-Baselines3, with its local
    values. Returns whether to go on."""
    cells, actions = cell_of(*values["obs_tensor"].T), torch.from_numpy(values["actions"])
    steps.append((cells, actions, torch.from_numpy(values["rewards"]), NEXT[cells, actions]))
    return True


SOURCES = {"ppo": ppo, "stable_baselines3": stable_baselines}
