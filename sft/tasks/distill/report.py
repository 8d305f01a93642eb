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
from sft.tasks.distill.darkroom import name_of, reference_returns

LAST = 50  # final episodes, whose return measures what was learnt in context
CURVE = "in_context_return.png"


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
    references = reference_returns(found.goals)
    curve = found.returns.mean((0, 1)).tolist()
    written: dict[str, Any] = {"in_context_return": returns, **references}
    if config.distill.compress:
        counts = {"ended": len(found.regions), "forced": found.num_forced}
        steps = {"mean_steps": float(np.mean(found.regions))} if found.regions else {}
        written["regions"] = counts | steps
    write_json(folder / "metrics.json", {**written, "held_out": held_out, "curve": curve})
    yield _table(returns, references)
    if config.distill.compress:
        yield f"regions that the model has ended: {written['regions']}"
    curves = {"in context, unseen goals": curve}
    if (source := histories.folder_of(config.distill)).exists():  # else the run is from elsewhere
        curves["source, its own goals"] = histories.curve(source)
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
