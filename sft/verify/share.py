"""Chooses `data.replay.share`: the smallest that keeps drift under the limit on short runs.

The short runs are whole ones of a few steps, in `<output_dir>.share/`, with the shares SHARES in
turn until one is under `evaluation.max_drift`. They drift less than a long run does, so the verdict
on that has the last word. A choice is kept in share.json, and made again if anything changes.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sft import run
from sft.config.load import with_values
from sft.config.schema import BASE_ANSWERS, Config, EarlyStopping, Replay
from sft.data import files
from sft.data.cache import MOST_REPLAYED
from sft.errors import ConfigError
from sft.evaluate.predictions import key_of
from sft.runtime.console import make_console, table, write_json
from sft.runtime.plain import read_json
from sft.serve import outcome
from sft.tasks.sft import replay

SHARES = (0.0, 0.05, 0.1, 0.2, MOST_REPLAYED)
STEPS = 50  # of a short run, at most
PLAIN: dict[str, Any] = {  # no more than the loss at the end
    "train.eval_steps": None,
    "train.save_steps": None,
    "train.save_best": None,
    "train.checkpoint_async": False,
    "train.tensorboard": False,
    "train.trackers": [],
    "train.early_stopping": EarlyStopping().model_dump(),
    "train.resume_from_checkpoint": None,
    "train.profile_steps": None,
    "evaluation.during": 0,
    "evaluation.num_examples": 0,
}


def with_share(config: Any) -> Any:
    """Returns `config` with the chosen share in place of `auto`. Collective.

    Raises ConfigError if no share keeps drift under the limit.
    """
    if not isinstance(config, Config) or config.data.replay.share != "auto":
        return config
    folder = Path(f"{config.train.output_dir}.share")
    own = {"train": {"resume_from_checkpoint", "output_dir"}}
    data = config.data
    contents = [file["digest"] for file in files.file_digests(data.train_path, data.cache_dir)]
    key = key_of(config.model_dump(mode="json", exclude=own), contents)
    known = read_json(folder / "share.json")
    if known.get("key") != key:
        known = {"key": key, "tried": _try_shares(config, folder)}
        if os.environ.get("RANK", "0") == "0":
            write_json(folder / "share.json", known)
    tried = known["tried"]
    if os.environ.get("RANK", "0") == "0":
        make_console().print(_shares_table(tried, config.evaluation.max_drift))
    chosen = tried[-1]
    if chosen["over"]:
        raise ConfigError(
            f"data.replay.share: expected a share up to {SHARES[-1]:g} whose drift is at most "
            f"evaluation.max_drift: {config.evaluation.max_drift:g}; found none in runs of at most "
            f"{STEPS} steps: over it are {', '.join(chosen['over'])} ({folder}/share.json). Allow "
            "more drift, or train less: a lower learning rate or rank"
        )
    return with_values(config, _replay_values(config, chosen["share"]))


def _try_shares(config: Config, folder: Path) -> list[dict[str, Any]]:
    """Returns a line for each share that was tried; the last is the chosen one, if any is."""
    tried = list[dict[str, Any]]()
    for share in SHARES:
        short = with_values(
            config,
            {
                **PLAIN,
                **_replay_values(config, share),
                "train.output_dir": str(folder / f"{share:g}"),
                "train.max_steps": min(STEPS, config.train.max_steps or STEPS),
            },
        )
        loss = run.train(short)["loss"]
        half = replay.MEASURED if config.data.replay.path == BASE_ANSWERS else None
        found = outcome.judge_run(Path(short.train.output_dir), [], half)
        drift = max(found["lost"]["drift"], key=lambda line: line["divergence"])
        line = {"share": share, "loss": loss, "drift": drift["divergence"], "in": drift["name"]}
        tried.append(line | {"over": found["gate"]["over"]})
        if not tried[-1]["over"]:
            break
    return tried


def _replay_values(config: Config, share: float) -> dict[str, Any]:
    if share == 0:
        return {"data.replay.path": None, "data.replay.share": Replay().share}
    return {"data.replay.share": share}


def _shares_table(tried: list[dict[str, Any]], limit: float | None) -> Any:
    rows = (
        (
            f"{line['share']:g}",
            f"{line['drift']:.3g} ({line['in']})",
            f"{line['loss']:.4g}",
            f"{line['loss'] - tried[0]['loss']:+.4g}",
            "over the limit" if line["over"] else "chosen",
        )
        for line in tried
    )
    columns = ("share", "largest drift", "held-out loss", "cost to the task", "")
    return table(f"data.replay.share: auto, evaluation.max_drift: {limit:g}", columns, rows)
