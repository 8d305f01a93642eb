"""Collects the histories that distillation learns from; the verb `collect-darkroom`."""

from __future__ import annotations

from argparse import Namespace

from sft.errors import ConfigError
from sft.runtime.output import show
from sft.tasks.distill.config import DistillConfig
from sft.tasks.registry import load_run, task_of


def main(args: Namespace) -> None:
    """Writes the histories of all goals, on all cores, and prints their curve."""
    config = load_run(args.config, args.overrides)
    if not isinstance(config, DistillConfig):
        raise ConfigError(f"expected a configuration of task: distill, found task: {config.task}")
    task_of(config)  # raises UserError if packages are missing
    from sft.tasks.distill import histories

    folder = histories.collect(config.distill)
    shares = histories.source_curve(config.distill)
    shown = ", ".join(f"{i + 1}: {shares[i]:.0%}" for i in range(0, len(shares), 7))
    show(f"{folder}\nshare of the best return by episode: {shown}, {len(shares)}: {shares[-1]:.0%}")
