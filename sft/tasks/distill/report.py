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
from sft.tasks.distill.darkroom import best_return, name_of, random_return

LAST = 50  # final episodes, whose return measures what was learnt in context
CURVE = "in_context_return.png"
Levels = dict[str, dict[str, float]]  # "random" and "best": returns by goal


@dataclass(frozen=True)
class UnseenResults:
    """The results on unseen goals, the same on every rank."""

    goals: list[int]
    returns: torch.Tensor  # (goals, seeds, episodes)
    regions: list[int]  # steps of each region that the model ended itself
    num_forced: int  # regions that were full before the model ended them


def summarise_returns(found: UnseenResults) -> dict[str, Any]:
    """Returns means over the last, the first and all episodes, by goal and seed."""
    number = found.returns.shape[2]
    few = min(LAST, number)
    parts = {
        f"last_{few}": found.returns[..., -few:],
        f"first_{few}": found.returns[..., :few],
        f"all_{number}": found.returns,
    }
    names = [name_of(goal) for goal in found.goals]
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
    returns = summarise_returns(found)
    levels: Levels = {
        "random": {name_of(goal): random_return(goal) for goal in found.goals},
        "best": {name_of(goal): best_return(goal) for goal in found.goals},
    }
    means = {name: float(np.mean([*each.values()])) for name, each in levels.items()}
    curve = found.returns.mean((0, 1)).tolist()
    written: dict[str, Any] = {"in_context_return": returns, **levels}
    if config.distill.compress:
        counts = {"ended": len(found.regions), "forced": found.num_forced}
        steps = {"mean_steps": float(np.mean(found.regions))} if found.regions else {}
        written["regions"] = counts | steps
    write_json(folder / "metrics.json", {**written, "held_out": held_out, "curve": curve})
    yield _table(returns, levels, means)
    if config.distill.compress:
        yield f"regions that the model has ended: {written['regions']}"
    curves = {"in context, unseen goals": curve}
    if (source := histories.folder_of(config.distill)).exists():  # else the run is from elsewhere
        curves["source, its own goals"] = histories.curve(source)
    histories.draw(folder / CURVE, curves, means)
    yield f"curve: {folder / CURVE}"


def _table(returns: dict[str, Any], levels: Levels, means: dict[str, float]) -> Table:
    def row(name: str, random: float, values: list[float], best: float) -> list[str]:
        return [name, *(f"{value:.2f}" for value in (random, *values, best))]

    rows = [
        row(goal, random, [each["per_goal"][goal] for each in returns.values()], best)
        for (goal, random), best in zip(
            levels["random"].items(), levels["best"].values(), strict=True
        )
    ]
    own = [each["mean"] for each in returns.values()]
    rows.append(row("mean", means["random"], own, means["best"]))
    columns = ("goal", "random", *(name.replace("_", " ") for name in returns), "best")
    return table("Return in context on goals that were never seen", columns, rows, left=0)
