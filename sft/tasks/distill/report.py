"""Reports returns in context, and their curve."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import RenderableType
from rich.table import Table

from sft.runtime.console import table, write_json
from sft.tasks.distill import histories
from sft.tasks.distill.config import DistillConfig
from sft.tasks.distill.grid import World
from sft.tasks.distill.worlds import world_of

LAST = 50  # final episodes, whose return measures what was learnt in context
CURVE = "in_context_return.png"


@dataclass(frozen=True)
class UnseenResults:
    """The results on unseen goals, the same on every rank."""

    goals: list[int]
    returns: torch.Tensor  # (goals, seeds, episodes)
    regions: list[int]  # steps of each region that the model ended itself
    num_forced: int  # regions that were full before the model ended them


def summarise_returns(world: World, found: UnseenResults) -> dict[str, Any]:
    """Returns means over the last, the first and all episodes, by goal and seed."""
    number = found.returns.shape[2]
    few = min(LAST, number)
    parts = {
        f"last_{few}": found.returns[..., -few:],
        f"first_{few}": found.returns[..., :few],
        f"all_{number}": found.returns,
    }
    names = [world.name_of(goal) for goal in found.goals]
    summaries = {}
    for name, part in parts.items():
        means = part.mean(-1)  # (goals, seeds)
        summaries[name] = {
            "mean": float(means.mean()),
            "per_goal": dict(zip(names, means.mean(1).tolist(), strict=True)),
            "per_seed": means.mean(0).tolist(),
            "per_goal_and_seed": dict(zip(names, means.tolist(), strict=True)),
        }
    return summaries


def show(
    config: DistillConfig, found: UnseenResults, held_out: dict[str, float], folder: Path
) -> Iterator[RenderableType]:
    """Writes metrics.json and the curve, and yields the table and where the curve is."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = config.distill
    world = world_of(settings.world)
    returns, references = summarise_returns(world, found), world.reference_returns(found.goals)
    curve = found.returns.mean((0, 1)).tolist()
    by_goal = dict(zip(references["best"], found.returns.mean(1).tolist(), strict=True))
    shares = histories.shares_of_best(by_goal, references["best"])
    written: dict[str, Any] = {"in_context_return": returns, **references}
    if settings.compress:
        counts = {"ended": len(found.regions), "forced": found.num_forced}
        steps = {"mean_steps": float(np.mean(found.regions))} if found.regions else {}
        written["regions"] = counts | steps
    written |= {"held_out": held_out, "curve": curve, "share_of_best": shares}
    write_json(folder / "metrics.json", written)
    yield _table(returns, references)
    if settings.compress:
        yield f"regions that the model has ended: {written['regions']}"
    curves = {"in context, unseen goals": shares}
    if histories.folder_of(settings).exists():  # else the run is from elsewhere
        curves["source, its own goals"] = histories.source_curve(settings)
    histories.draw(folder / CURVE, curves, references)
    yield f"curve: {folder / CURVE}"


def _table(returns: dict[str, Any], references: dict[str, dict[str, float]]) -> Table:
    columns = {name.replace("_", " "): each["per_goal"] for name, each in returns.items()}
    columns = {"random": references["random"], **columns, "best": references["best"]}
    rows = [
        [goal, *(f"{each[goal]:.2f}" for each in columns.values())] for goal in references["best"]
    ]
    rows.append(["mean", *(f"{np.mean([*each.values()]):.2f}" for each in columns.values())])
    title = "Return in context on goals that were never seen"
    return table(title, ("goal", *columns), rows, left=0)
