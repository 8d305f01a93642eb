"""The optimizers that `train.optimizer` names, and the classes that they are. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

OptimizerName = Literal[
    "adamw",
    "adamw_8bit",
    "paged_adamw",
    "paged_adamw_8bit",
    "muon",
    "adafactor",
    "lion",
    "schedule_free",
    "torchao_adamw_8bit",
    "torchao_adamw_4bit",
]
ImportPath = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)+$")]


@dataclass(frozen=True)
class Named:
    """An optimizer that has a name."""

    path: str
    """Where its class is imported from."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the class that differ from its defaults; `optimizer_args` go first."""
    extra: str = ""
    """The extra of this package that installs it."""
    needs: str = ""
    """The package that the class imports later; "": the one that has it."""


OPTIMIZERS: dict[str, Named] = {
    "adamw": Named("torch.optim.AdamW", {"fused": True}),
    "adamw_8bit": Named("bitsandbytes.optim.AdamW8bit"),
    "paged_adamw": Named("bitsandbytes.optim.PagedAdamW32bit"),
    "paged_adamw_8bit": Named("bitsandbytes.optim.PagedAdamW8bit"),
    # An update of the size of AdamW's, so that both can have the same learning rate.
    "muon": Named("sft.train.optimizer.Muon", {"adjust_lr_fn": "match_rms_adamw"}),
    # The schedule gives the learning rate; torch.optim.Adafactor would scale and cap it.
    "adafactor": Named(
        "transformers.optimization.Adafactor", {"scale_parameter": False, "relative_step": False}
    ),
    # Its kernel of Triton would be chosen by the device, and a checkpoint would keep that choice.
    "lion": Named("optimi.Lion", {"triton": False}, "optimizers"),
    "schedule_free": Named("schedulefree.AdamWScheduleFree", {}, "optimizers"),
    "torchao_adamw_8bit": Named("sft.train.packed.AdamW8bit", {}, "torchao", "torchao"),
    "torchao_adamw_4bit": Named("sft.train.packed.AdamW4bit", {}, "torchao", "torchao"),
}
# These read `adam_beta1`, `adam_beta2` and `adam_epsilon`; Muon for what AdamW trains beside it.
LIKE_ADAM = (
    "adamw",
    "adamw_8bit",
    "paged_adamw",
    "paged_adamw_8bit",
    "muon",
    "schedule_free",
    "torchao_adamw_8bit",
    "torchao_adamw_4bit",
)
