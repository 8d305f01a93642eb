"""The state of a run in a checkpoint, and whether it belongs to this run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sft import errors
from sft.config.schema import Train
from sft.errors import AnotherRunError
from sft.runtime import checkpoint


def identity(train: Train, of_task: dict[str, str]) -> dict[str, str]:
    """Returns the values that a run and the run that resumes it must share."""
    return {
        "train.seed": str(train.seed),
        "train.shuffle": str(train.shuffle),
        "train.global_batch": str(train.global_batch),
        "train.optimizer": train.optimizer,
        **of_task,
    }


STATE = "trainer.json"
COUNTS = ("step", "evaluated", "num_skipped", "optimizer_updates", "world_size")


def write_state(folder: Path, counts: dict[str, int], train: Train, now: dict[str, str]) -> None:
    """Writes trainer.json. `counts`: a number for each of `COUNTS`; `now`: the run's identity."""
    assert counts.keys() == set(COUNTS)
    state = {**counts, "identity": now, "settings": train.model_dump()}
    (folder / STATE).write_text(json.dumps(state, indent=1), "utf-8")


def changed_settings(state: dict[str, Any], train: Train, world_size: int) -> Iterator[str]:
    """Yields the settings of a resumed run that differ from the run that wrote `state`."""
    now = train.model_dump() | {"processes": world_size}
    then = state["settings"] | {"processes": state["world_size"]}
    for key in now:
        if then.get(key) != now[key]:
            yield f"{key} was {then.get(key)}, is {now[key]}"


def read_state(checkpoint_folder: Path, now: dict[str, str]) -> dict[str, Any]:
    """Returns trainer.json of a checkpoint.

    Raises AnotherRunError if the run that wrote it has another identity than `now`; the exit code
    is 3 if only the data differ.
    """
    path = checkpoint_folder / STATE
    if not path.exists():
        raise errors.CheckpointError(
            f"{checkpoint_folder} holds a model, not the state of a run: expected trainer.json; "
            "resume from a checkpoint_step_<n> folder"
        )
    state = json.loads(path.read_text("utf-8"))
    try:
        sound = all(type(state[key]) is int and state[key] >= 0 for key in COUNTS)
        then = dict(state["identity"])
        dict(state["settings"])
    except (KeyError, TypeError, ValueError):
        sound = False
    named = checkpoint.NAME.fullmatch(checkpoint_folder.name)
    if not sound or (named and int(named[1]) != state["step"]):
        raise errors.CheckpointError(f"{path} is not what a run writes into such a folder")
    if changed := [key for key in {**now, **then} if then.get(key) != now.get(key)]:
        error = AnotherRunError(
            f"{checkpoint_folder} belongs to another run; resuming would not continue it:\n  "
            + "\n  ".join(f"{key}: was {then.get(key)}, is {now.get(key)}" for key in changed)
            + "\nRestore these, or start anew with another train.output_dir."
        )
        error.exit_code = errors.ExitCode.DATA if changed == ["data"] else error.exit_code
        raise error
    return state
