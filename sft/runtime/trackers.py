"""Trackers of experiments (`train.trackers`), by Accelerate's classes; only on the main process.

Each takes its key and its server from its own environment variables or login, never from a file of
the run. Once a run has started, no failure of a tracker ends it (`runtime/log`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from sft.errors import UserError, redact

PACKAGES = {
    "wandb": "wandb",
    "mlflow": "mlflow",
    "trackio": "trackio",
    "comet": "comet_ml",
    "swanlab": "swanlab",
}
PROJECT = "sft"


def refuse_missing(names: Sequence[str]) -> None:
    """Raises UserError for a tracker that is not installed."""
    for name in names:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise UserError(
                f'train.trackers: {name} is not installed; pip install ".[{name}]", or remove it '
                "from the list"
            )


def start_tracker(name: str, run: str, values: dict[str, dict[str, Any]]) -> Any:
    """Returns Accelerate's tracker `name`, with a started run that has the configuration `values`.

    Raises UserError if it cannot start, for example without a key or a network.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    try:
        tracker = LOGGER_TYPE_TO_CLASS[PACKAGES[name]](PROJECT, **_options(name, run))
        tracker.start()
        tracker.store_init_configuration(_flatten(values))
        return tracker
    except Exception as error:  # noqa: BLE001  # whatever the library raises
        reason = redact(" ".join(str(error).split()))[:300].rstrip(".") or type(error).__name__
        raise UserError(
            f"train.trackers: {name} cannot start: {reason}; log in as its documentation says, or "
            "remove it from the list"
        ) from None


def _options(name: str, run: str) -> dict[str, Any]:
    """Returns what each library calls the name of a run."""
    if name == "comet":
        from comet_ml import ExperimentConfig

        return {"experiment_config": ExperimentConfig(name=run)}
    key = {"mlflow": "run_name", "swanlab": "experiment_name"}.get(name, "name")
    return {key: run}


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the values by dotted path; those that are no number are texts, without secrets."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            found |= _flatten(value, f"{path}.")
        else:
            found[path] = value if isinstance(value, int | float) else redact(str(value))
    return found
