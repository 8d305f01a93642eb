"""Makes the model and its histories small, so that `make verify-*` can try many whole runs."""

from __future__ import annotations

from pathlib import Path

from sft.tasks.base import Shrunk
from sft.tasks.distill import histories
from sft.tasks.distill.config import EPISODE, DistillConfig
from sft.tasks.distill.data import windows

LAYERS = 2
WIDTH = 32


def shrink(config: DistillConfig, folder: Path, exact: bool) -> Shrunk:
    """Returns values with a narrow model and short histories of PPO, which it collects.

    Each goal has a window in two parts.
    """
    given = config.distill
    context = min(given.context, 2 * EPISODE)
    wide = given.width > WIDTH
    sizes = {
        "num_layers": min(given.num_layers, LAYERS),
        "width": WIDTH if wide else given.width,
        "num_heads": 4 if wide else given.num_heads,
        "context": context,
        "search_episodes": 1,
        "jump_to": 1,
        "slide": None,
        "source": "ppo",
        "num_streams": 2,
        "num_steps": 2 * context,
        "held_out_streams": 1,
        "data_dir": str(folder / "histories"),
        "eval_episodes": 1,
        "eval_seeds": 1,
        "eval_quick": 1,
    }
    settings = given.model_copy(update=sizes)
    histories.collect(settings)
    lengths = [*windows(settings).lengths]
    changes = [
        (
            "model",
            f"{settings.num_layers} layers of {settings.width} instead of {given.num_layers} of "
            f"{given.width}, context of {context} instead of {given.context} transitions",
        ),
        ("histories", f"2 streams of {2 * context} steps of each goal, collected for this"),
    ]
    values = {f"distill.{key}": value for key, value in sizes.items()}
    batch = 2 * len(lengths) // 5  # two whole ones and half of one
    # The bias of keys has no gradient but rounding, of which AdamW would make updates.
    smooth = {"distill.dropout": 0.0, "train.adam_epsilon": max(1e-6, config.train.adam_epsilon)}
    return Shrunk(values, changes, smooth, batch, "windows")
