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
from sft.tasks.distill import darkroom, histories
from sft.tasks.distill.config import DistillConfig

LAST = 50  # final episodes, whose return measures what was learnt in context
CURVE = "in_context_return.png"


@dataclass(frozen=True)
class Tried:
    """The results on unseen goals, the same on every rank."""

    goals: list[int]
    returns: torch.Tensor  # (goals, seeds, episodes)
    regions: list[int]  # steps of each region that the model ended
    num_forced: int


def results(tried: Tried) -> dict[str, Any]:
    """Returns the returns in context of the last, the first and all episodes, by goal and seed."""
    number = tried.returns.shape[2]
    few = min(LAST, number)
    parts = {
        f"last_{few}": tried.returns[..., -few:],
        f"first_{few}": tried.returns[..., :few],
        f"all_{number}": tried.returns,
    }
    return {name: _summary(tried, part.mean(-1)) for name, part in parts.items()}


def _summary(tried: Tried, means: torch.Tensor) -> dict[str, Any]:
    """Summarises means (goals, seeds)."""
    return {
        "mean": float(means.mean()),
        "per_goal": dict(zip(map(_named, tried.goals), means.mean(1).tolist(), strict=True)),
        "per_seed": means.mean(0).tolist(),
        "per_goal_and_seed": dict(zip(map(_named, tried.goals), means.tolist(), strict=True)),
    }


def _named(goal: int) -> str:
    return "{},{}".format(*darkroom.place_of(goal))


def show(
    config: DistillConfig, tried: Tried, held_out: dict[str, float], out: Path
) -> Iterator[RenderableType]:
    """Writes metrics.json and the curve, and yields the table and where the curve is."""
    out.mkdir(parents=True, exist_ok=True)
    returns = results(tried)
    floors = {_named(goal): darkroom.random_return(goal) for goal in tried.goals}
    tops = {_named(goal): darkroom.best_return(goal) for goal in tried.goals}
    curve = tried.returns.mean((0, 1)).tolist()
    written: dict[str, Any] = {"in_context_return": returns, "random": floors, "best": tops}
    if config.distill.compress:
        written["regions"] = _regions(tried)
    write_json(out / "metrics.json", {**written, "held_out": held_out, "curve": curve})
    yield _table(returns, floors, tops)
    if config.distill.compress:
        yield f"regions that the model has ended: {_regions(tried)}"
    lines = {"random": float(np.mean([*floors.values()])), "best": float(np.mean([*tops.values()]))}
    curves = {"in context, unseen goals": curve}
    if (source := histories.folder_of(config.distill)).exists():  # else the run is from elsewhere
        curves["source, its own goals"] = histories.curve(source)
    histories.draw(out / CURVE, curves, lines)
    yield f"curve: {out / CURVE}"


def _regions(tried: Tried) -> dict[str, float]:
    steps = np.array(tried.regions)
    counts = {"ended": len(steps), "forced": tried.num_forced}
    return counts | ({"mean_steps": float(steps.mean())} if len(steps) else {})


def _table(returns: dict[str, Any], floors: dict[str, float], tops: dict[str, int]) -> Table:
    def row(name: str, floor: float, values: list[float], top: float) -> list[str]:
        return [name, *(f"{value:.2f}" for value in (floor, *values, top))]

    rows = [
        row(goal, floor, [each["per_goal"][goal] for each in returns.values()], tops[goal])
        for goal, floor in floors.items()
    ]
    lowest, top = float(np.mean([*floors.values()])), float(np.mean([*tops.values()]))
    rows.append(row("mean", lowest, [each["mean"] for each in returns.values()], top))
    columns = ("goal", "random", *(name.replace("_", " ") for name in returns), "best")
    return table("Return in context on goals that were never seen", columns, rows, left=0)
