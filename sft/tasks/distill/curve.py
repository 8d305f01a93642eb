"""Draws returns by episode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path


def draw(path: Path, curves: Mapping[str, Sequence[float]], levels: Mapping[str, float]) -> None:
    """Writes a PNG. `curves`: returns from the first episode on; `levels`: dotted lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    longest = max(map(len, curves.values()))
    for label, values in curves.items():
        axes.plot(range(1, len(values) + 1), values, label=label)
    for label, value in levels.items():
        axes.axhline(value, linestyle=":", color="grey")
        axes.text(longest, value, label, ha="right", va="bottom", color="grey")
    axes.set(xlabel="episode", ylabel="return", xlim=(1, longest))
    axes.legend(loc="center right")
    figure.savefig(path, dpi=120)
