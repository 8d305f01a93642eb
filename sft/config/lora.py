"""The section `tuning`, and in it `lora`: what adapters can be, by the names of PEFT's LoraConfig.

`Lora` has the keys that are supported; `REFUSED` says of each other one why it is not. A test
compares both with the fields of PEFT's own class, which this module does not import.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, model_validator

from sft.config.section import (
    Count,
    CountOrZero,
    Fraction,
    OnlyWith,
    Positive,
    Section,
    Text,
    Texts,
)
from sft.errors import shorten

CHANGES_BASE = ("pissa", "olora")  # these subtract the initial adapter from the base
INITS = ("gaussian", "orthogonal", *CHANGES_BASE, "pissa_niter_<n>", "loftq", "eva")
ONLY_BEGINS = (
    "loftq",
    "orthogonal",
    "eva",
)  # these only initialise, so they are not repeated when an adapter is loaded

_BY_RUN = "the run sets it"
_BASE = "the saved adapter would not fit the base that others load"
_LOSS = "it needs a term of the loss, or a pass over the data, that this project does not have"
REFUSED = {
    **dict.fromkeys(
        (
            "task_type",
            "peft_type",
            "auto_mapping",
            "peft_version",
            "base_model_name_or_path",
            "inference_mode",
        ),
        _BY_RUN,
    ),
    "revision": "set model.revision",
    "fan_in_fan_out": "PEFT sets it for each layer",
    "megatron_config": "this project does not train with Megatron",
    "megatron_core": "this project does not train with Megatron",
    "layer_replication": f"it changes the architecture of the base: {_BASE}",
    "kasa_config": f"it cuts the weights of the base: {_BASE}",
    "corda_config": _LOSS,
    "lora_ga_config": _LOSS,
    "eva_config": "init_lora_weights: eva keeps the rank of each adapter; there is nothing to set",
    "monteclora_config": _LOSS,
    "arrow_config": "it mixes several trained adapters; train one",
    "use_bdlora": "it is a layout for servers that split an adapter over GPUs",
    "velora_config": "it approximates the gradient, so law 1 does not hold",
    "alora_invocation_tokens": "where it is active depends on the prompt, and a merge cannot be",
    "use_qalora": "it needs a base in GPTQ format, of whose layers this project reads no groups",
    "qalora_group_size": "it is read with use_qalora only, which is not supported",
    "loftq_config": "init_lora_weights: loftq fits the 4-bit base of tuning.mode: qlora in one "
    "step; there is nothing to set",
    "runtime_config": "it is no property of the adapter; DoRA is initialised on the run's device",
}


def _check_regex(text: str) -> str:
    """Returns a regular expression. Raises ValueError if it is none."""
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"expected a regular expression, found {text!r}: {error}") from None
    return text


def check_targets(targets: Any) -> Any:
    """Returns `target_modules`. Raises ValueError for a name, which PEFT would take as a regex."""
    if targets == "all-linear":  # PEFT's own word
        return "auto"
    if isinstance(targets, str) and targets != "auto":
        if re.fullmatch(r"\w*", targets):
            raise ValueError(
                "expected auto, a list of names, or a regular expression that matches the whole "
                f"name of a module, found {targets!r}; did you mean [{targets}]?"
            )
        _check_regex(targets)
    return targets


def _check_init(value: Any) -> Any:
    """Returns `init_lora_weights`. Raises ValueError for one that is not supported."""
    known = {*INITS} - {"pissa_niter_<n>"}
    if isinstance(value, bool) or (isinstance(value, str) and value in known):
        return value
    if isinstance(value, str) and re.fullmatch(r"pissa_niter_\d{1,4}", value):
        return value
    why = {
        "corda": f"; corda: {_LOSS}",
        "lora_ga": f"; lora_ga: {_LOSS}",
        "mica": "; mica: it freezes half of the adapter; set train.groups for that",
    }
    hint = why.get(value, "") if isinstance(value, str) else ""
    raise ValueError(f"expected true, false, {', '.join(INITS)}, found {value!r}{hint}")


Regex = Annotated[Text, AfterValidator(_check_regex)]
Init = Annotated[bool | str, BeforeValidator(_check_init)]


def names_layer(pattern: str) -> bool:
    """Returns whether a name or regular expression may match only some of the layers."""
    return bool(re.search(r"(^|\W)\d", pattern))


class Lora(Section):
    """Further settings of the adapters, under the names of PEFT's LoraConfig (peft 0.21). Its `r`,
    `lora_alpha`, `lora_dropout` and `target_modules` may stand here or in `tuning`."""

    only_with: ClassVar[OnlyWith | None] = OnlyWith("tuning.mode", ("lora", "qlora"))
    refused = REFUSED
    use_rslora: bool = False
    """Scale the adapters by lora_alpha / sqrt(r) in place of lora_alpha / r."""
    use_dora: bool = False
    """Train the magnitude of each row of a weight separately from its direction (DoRA); slower."""
    init_lora_weights: Init = True
    """Initial weights of the adapters: `true` (PEFT's default: B is 0), `false` (random, not 0),
    `gaussian`, `orthogonal` (r must be even), `pissa`, `pissa_niter_<n>`, `olora`, `loftq`, `eva`.
    `pissa` and `olora` change the base during training; the saved adapter has twice the rank, and
    fits the original base. `loftq` fits the adapters to the error of the 4-bit base. `eva`: A is
    the directions in which the inputs of the layer vary most, over the first rows of the run."""
    exclude_modules: Texts | Regex | None = None
    """Modules that get no adapter although `target_modules` names them: names, or a regular
    expression of whole names."""
    target_parameters: Texts | None = None
    """Parameters outside of linear layers that get an adapter, such as experts:
    `[mlp.experts.gate_up_proj]`. As in PEFT, `exclude_modules` and `layers_to_transform` apply to
    `target_modules` only; with `target_modules: auto`, they apply to experts, too."""
    layers_to_transform: CountOrZero | list[CountOrZero] | None = None
    """Numbers of the layers, from 0, that get adapters. null: all."""
    layers_pattern: Texts | Text | None = None
    """Name of the list of layers that `layers_to_transform` counts, or several. null: any list."""
    rank_pattern: dict[Regex, Count] = {}
    """Other values of `r`, by the end of a module's name (a regular expression): `{q_proj: 32}`."""
    alpha_pattern: dict[Regex, Positive] = {}
    """Other values of `lora_alpha`, by the end of a module's name."""
    modules_to_save: Texts | None = None
    """Modules of which a whole copy is trained and saved, such as `[lm_head, embed_tokens]`."""
    trainable_token_indices: list[CountOrZero] | dict[Text, list[CountOrZero]] | None = None
    """Ids of the tokens whose embeddings are trained; or lists of ids, by the name of a module."""
    ensure_weight_tying: bool = False
    """Keep tied weights tied where `modules_to_save`, `target_modules` or
    `trainable_token_indices` name one of them."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases of the base that are trained: none, all, or those of layers with an adapter."""
    lora_bias: bool = False
    """Add a bias to B. It can be merged only into a layer of the base that has a bias."""

    @property
    def trained_ids(self) -> set[int]:
        """Returns the ids in `trainable_token_indices`, of all modules."""
        given = self.trainable_token_indices or []
        return {i for own in (given.values() if isinstance(given, dict) else [given]) for i in own}

    @property
    def changes_base(self) -> bool:
        """Returns whether the adapters begin as a part of the base that is subtracted from it."""
        init = self.init_lora_weights
        return isinstance(init, str) and init.startswith(CHANGES_BASE)


class Tuning(Section):
    """The weights that are trained."""

    mode: Literal["lora", "qlora", "full"] = "lora"
    """`full`: all weights. `lora`: adapters on a frozen base. `qlora`: adapters on a frozen base in
    4 bits (NF4, or as `quantization` says)."""
    quantization: Literal["nf4", "fp4", "int8", "none"] | None = None
    """How the frozen base is stored: in 4 bits (`nf4`, `fp4`) or in the compute dtype (`none`).
    null: as `mode` says, where `qlora` means `nf4`. `mode: lora` with 4 bits becomes `qlora`.
    `int8` is refused (docs/ADAPTERS.md)."""
    r: Count = 16
    """Rank of the adapters."""
    lora_alpha: Positive = 32.0
    """Scale of the adapters: their output is multiplied by lora_alpha / r."""
    lora_dropout: Fraction = 0.0
    """Probability of dropping an input of an adapter during training."""
    target_modules: Annotated[
        Literal["auto"] | list[Text] | Text, BeforeValidator(check_targets)
    ] = "auto"
    """Modules that get an adapter: names, or a regular expression of whole names. `auto`: every
    matrix by which text is multiplied, in linear layers and elsewhere (experts), except the
    vocabulary head and routers."""
    router: Literal["frozen", "trained"] = "frozen"
    """Routers of a mixture of experts. `trained`: like the other weights, with the load-balancing
    loss that the model's configuration asks for, computed over the global batch."""
    lora: Lora = Lora()
    """Further settings of the adapters, by PEFT's names (section `tuning.lora`)."""

    @model_validator(mode="before")
    @classmethod
    def _move_shared(cls, values: Any) -> Any:
        """Moves keys of `lora` that this section has, too; makes lora with 4 bits qlora.

        Raises ValueError for a key with two values.
        """
        if isinstance(values, dict) and values.get("quantization") in ("nf4", "fp4"):
            mode = values.get("mode", "lora")
            values = values | {"mode": "qlora" if mode == "lora" else mode}
        lora = values.get("lora") if isinstance(values, dict) else None
        if not isinstance(lora, dict):
            return values
        shared = {key: lora[key] for key in cls.model_fields if key in lora and key != "lora"}
        for key in shared.keys() & values.keys():
            if values[key] != shared[key]:
                raise ValueError(
                    f"{key} is {shorten(values[key])} here and {shorten(shared[key])} in "
                    "tuning.lora; remove one"
                )
        own = {key: value for key, value in lora.items() if key not in shared}
        return values | shared | {"lora": own}

    @property
    def four_bits(self) -> str:
        """Returns the 4-bit data type in which `qlora` stores the base: nf4 or fp4."""
        return "fp4" if self.quantization == "fp4" else "nf4"

    @property
    def differs_by_layer(self) -> bool:
        """Returns whether layers of the same kind may have different adapters."""
        lora, names = self.lora, []
        for each in (self.target_modules, lora.exclude_modules, lora.target_parameters):
            names += [each] if isinstance(each, str) else each or []
        names += [*(lora.modules_to_save or ()), *lora.rank_pattern, *lora.alpha_pattern]
        return lora.layers_to_transform is not None or any(map(names_layer, names))

    def identity(self) -> str:
        """Returns what runs that continue each other share, as JSON.

        A key that came later is left out while it has its default, so that older runs continue.
        """
        first = dict.fromkeys(("mode", "r", "lora_alpha", "lora_dropout", "target_modules"))
        values = {key: self.model_dump()[key] for key in first}
        return json.dumps(values | self.model_dump(exclude_defaults=True), separators=(",", ":"))

    def describe(self) -> str:
        """Returns the settings of the adapters in one line, for a model card."""
        text = f"r {self.r}, lora_alpha {self.lora_alpha:g}, modules {self.target_modules}"
        own = self.lora.model_dump(exclude_defaults=True)
        return ", ".join([text, *(f"{key} {value}" for key, value in own.items())])
