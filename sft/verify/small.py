"""Makes a configuration small."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from sft.config.load import with_values
from sft.config.schema import EPISODE, AnyConfig, Config, DistillConfig
from sft.data import batches, cache
from sft.errors import VerificationError
from sft.models import attention, load
from sft.models.load import shallow
from sft.runtime import hardware, precision
from sft.tasks import base
from sft.tasks.distill import histories
from sft.tasks.registry import traits

LAYERS = 2
WIDTHS = {  # of the small model, where its configuration names them
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_attention_heads": 4,
    "head_dim": 16,
    "num_experts": 4,
    "num_local_experts": 4,
}
DISTILL_WIDTH = 32  # of the small model of histories
EXAMPLES = 8  # of a global batch, at most
HELD_OUT = 6  # rows


# --- the configuration, made small -------------------------------------------------------------


@dataclass(frozen=True)
class Small:
    """A configuration that trains in seconds; all that its runs write is in `folder`."""

    config: AnyConfig
    folder: Path
    lengths: list[int]  # tokens of the examples, falling
    told: list[tuple[str, str]]  # what is not as the user configured it

    @property
    def steps_per_epoch(self) -> int:
        return batches.steps_per_epoch(len(self.lengths), self.config.train.global_batch)

    @property
    def whole(self) -> int:
        """Token budget under which any global batch is one micro-batch."""
        return self.lengths[0] * self.config.train.global_batch

    @property
    def quarter(self) -> int:
        """One under which two processes have several micro-batches each."""
        return max(self.lengths[0], sum(self.lengths[: self.config.train.global_batch]) // 4)


@dataclass(frozen=True)
class Shrunk:
    """What is small of a task."""

    values: dict[str, Any]  # of its sections, by dotted path
    told: list[tuple[str, str]]
    smooth: dict[str, Any]  # values without which another cut draws other random numbers
    batch: int  # examples of a global batch, at most
    lengths: Callable[[Any], Sequence[int]]  # of the examples; Any is the small configuration
    among: str  # what they were looked for in


def make_small(config: AnyConfig, folder: Path, *, exact: bool = False) -> Small:
    """`config` with a small model of random weights, and few examples, so that an epoch has three
    steps and a partial last batch; half of a second epoch follows.

    `exact`: without dropout and in fp32, so that runs that are cut differently can be compared.
    """
    if not hardware.detect().devices:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it guesses so
    made = SHRINKING[config.task](config, folder, exact)
    told = [*made.told]
    values: dict[str, Any] = {
        "train.output_dir": str(folder / "run"),
        "train.micro_batch": "auto",
        "train.gradient_accumulation_steps": "auto",
        "train.eval_steps": 2,
        "train.save_steps": 1,
        "train.resume_from_checkpoint": None,
        "train.tensorboard": False,
        "train.wandb": False,
        **made.values,
    }
    if exact:
        wanted = {"train.precision": "fp32", "train.optimizer": "adamw", **made.smooth}
        given = config.model_dump()
        given["train"]["precision"], _ = precision.resolve_precision(config.train)
        found = {path: given[path.split(".")[0]][path.split(".")[1]] for path in wanted}
        told += [(p, f"{wanted[p]} instead of {found[p]}") for p in wanted if found[p] != wanted[p]]
        values |= wanted
        if traits(config).attention == attention.NAME:
            had_by = f"of SDPA with a mask: {attention.NAME} has no kernel in fp32"
            told.append(("packed rows", had_by))
    shrunk, batch = with_values(config, values), made.batch
    lengths = sorted(made.lengths(shrunk), reverse=True)
    while batch > 1 and batches.steps_per_epoch(len(lengths), batch) < 3:
        batch -= 1
    per_epoch = batches.steps_per_epoch(len(lengths), batch)
    if per_epoch < 3:
        raise VerificationError(
            "expected at least 3 usable training rows, to interrupt an epoch in its middle and at "
            f"its end; found {len(lengths)} among {made.among}"
        )
    steps = per_epoch + 3
    examples = traits(shrunk).words.examples
    number = f"{len(lengths)} {examples} to train on"
    told.append(("data", f"{number}, {batch} a step, {per_epoch} an epoch"))
    told.append(("steps", f"{steps}, each of them saved, every second evaluated"))
    shrunk = with_values(shrunk, {"train.global_batch": batch, "train.max_steps": steps})
    small = Small(shrunk, folder, lengths, told)
    return replace(small, config=with_values(shrunk, {"train.max_tokens": small.quarter}))


def _fine_tuning(config: Config, folder: Path, exact: bool) -> Shrunk:
    built, told = small_model(config, exact)
    place = str(folder / "model")
    built.save_pretrained(place)  # type: ignore[operator]
    load.load_tokenizer(config.model).save_pretrained(place)
    batch = min(config.train.global_batch, EXAMPLES)
    rows = 2 * batch + max(1, batch // 2) + HELD_OUT
    values = {
        "model.name": place,
        "model.revision": None,
        "data.max_rows": rows,
        "data.eval_path": None,
        "data.eval_fraction": HELD_OUT / rows,
        "data.cache_dir": str(folder / "cache"),
        "evaluation.num_examples": min(config.evaluation.num_examples, 2),
        "evaluation.max_new_tokens": min(config.evaluation.max_new_tokens, 8),
    }
    told.append(("tuning", config.tuning.mode))
    smooth = {"tuning.lora_dropout": 0.0, "crowd.dropconnect": 0.0}
    among = f"the first {rows} of {config.data.train_path}"
    return Shrunk(
        values, told, smooth, batch, lambda small: cache.prepare(small).train.lengths, among
    )


def _distillation(config: DistillConfig, folder: Path, exact: bool) -> Shrunk:
    """Histories of PPO, which are collected here: with a window in two goes for each goal."""
    given = config.distill
    context = min(given.context, 2 * EPISODE)
    wide = given.width > DISTILL_WIDTH
    sizes = {
        "num_layers": min(given.num_layers, LAYERS),
        "width": DISTILL_WIDTH if wide else given.width,
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
    lengths = base.Work.windows(settings).lengths
    told = [
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
    return Shrunk(values, told, smooth, batch, lambda _: lengths, "windows")


SHRINKING: dict[str, Callable[[Any, Path, bool], Shrunk]] = {
    Config.task: _fine_tuning,
    DistillConfig.task: _distillation,
}


def small_model(config: Config, exact: bool = False) -> tuple[nn.Module, list[tuple[str, str]]]:
    """A model of the configured architecture with two narrow layers and random weights, and what
    is to be told about it. `exact`: without dropout."""
    whole = load.architecture(config.model)
    few = shallow(whole, min(LAYERS, whole.get_text_config().num_hidden_layers))
    told = []
    if exact and (dropped := _without_dropout(few)):
        told.append(("model", f"no dropout ({', '.join(dropped)})"))
    problem = ""
    for candidate in (narrow(few), few):  # not every architecture lets its widths be chosen
        torch.manual_seed(config.train.seed)
        try:
            built = AutoModelForCausalLM.from_config(
                candidate,
                dtype=torch.float32,
                trust_remote_code=config.model.trust_remote_code,
                attn_implementation="eager",
            )
            with torch.no_grad():
                built(input_ids=torch.arange(8)[None])
        except Exception as error:  # noqa: BLE001  # whatever its code raises
            problem = f"{type(error).__name__}: {error}"
            continue
        was, now = whole.get_text_config(), candidate.get_text_config()
        sizes = f"{now.num_hidden_layers} layers of {now.hidden_size}"
        sizes += f" instead of {was.num_hidden_layers} of {was.hidden_size}, random weights"
        return built, [("model", f"{type(built).__name__}: {sizes}"), *told]
    raise VerificationError(f"cannot make a small model of {config.model.name}: {problem}")


def narrow(architecture: Any) -> Any:
    """A copy of a transformers configuration whose layers are narrow."""
    result = copy.deepcopy(architecture)
    text = result.get_text_config()
    if text.hidden_size <= WIDTHS["hidden_size"]:
        return result
    heads, groups = text.num_attention_heads, getattr(text, "num_key_value_heads", None)
    for name, size in WIDTHS.items():
        if getattr(text, name, None) is not None:
            setattr(text, name, size)
    if groups is not None:  # as many as heads, fewer, or one
        text.num_key_value_heads = 4 if groups == heads else min(groups, 2)
    return result


def _without_dropout(architecture: Any) -> list[str]:
    """Turns every dropout of a configuration off; names of those that were on."""
    found = []
    for part in {
        id(each): each for each in (architecture, architecture.get_text_config())
    }.values():
        for name, value in vars(part).items():
            if (
                ("dropout" in name or name.endswith("_pdrop"))
                and isinstance(value, float)
                and value
            ):
                found.append(name)
        for name in found:
            if hasattr(part, name):
                setattr(part, name, 0.0)
    return found
