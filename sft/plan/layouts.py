"""Chooses how processes share a model: engine, shards, parts of rows, and what is recomputed.

These settings change speed and memory only (law 1), so the fastest that fits is chosen. Weights in
bf16 change the result, and are tried only if nothing else fits. Each trial is the plan that a run
with these settings would make. A bound on its time and its memory, which needs no trace, decides
which settings are tried first, and which need no trial: they cannot be the fastest, or cannot fit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, product
from pathlib import Path
from typing import Any

from rich.console import Console

from sft.config.load import with_values
from sft.config.schema import KeepWhole, RunConfig, Train
from sft.errors import UserError
from sft.models.dtypes import DTYPES
from sft.plan.choose import GPUS_PER_MACHINE, LADDER, Planner, resolve_layout
from sft.plan.counts import count_parameters
from sft.plan.memory import NF4_BYTES, RUNG_KEYS
from sft.plan.plan import ASSUMED_LINK, HOST_RATE, Plan, make_plan
from sft.plan.sharding import parts_on_rank
from sft.runtime.console import Advance, bar
from sft.runtime.hardware import Hardware, resolve_precision
from sft.tasks.base import Workload
from sft.tasks.registry import task_of
from sft.train.parallel.trial import state_bytes

ZERO3 = "configs/deepspeed_z3.json"
GAIN = 0.02  # a layout that could be faster by less than this is not tried
MOST_GPUS = 1024  # among which a number is searched that is enough
FSDP: dict[str, Any] = {"engine": "fsdp"}
ENGINES: tuple[dict[str, Any], ...] = (
    {"engine": "ddp"},
    FSDP,
    FSDP | {"shard_within": "node"},
    FSDP | {"offload": True},
    {"engine": "deepspeed", "deepspeed_config": ZERO3},
)


@dataclass(frozen=True)
class Layout:
    """Settings to try. Of those in one family, more parts and higher rungs take less memory."""

    family: str
    parts: int  # of a row: `train.context_parallel`
    rung: int  # of LADDER
    values: dict[str, Any] = field(compare=False)  # that differ from the defaults, by dotted key

    def order(self) -> tuple[int, int]:
        """Returns a key that grows as memory falls."""
        return self.parts, self.rung

    def is_in_family_of(self, other: Layout) -> bool:
        return self.family == other.family

    def resembles(self, other: Layout) -> bool:
        """Returns whether only the parts differ."""
        return self.is_in_family_of(other) and self.rung == other.rung

    def takes_more_than(self, other: Layout) -> bool:
        """Returns whether it takes at least the memory of the other one."""
        fewer = self.parts <= other.parts and self.rung <= other.rung
        return fewer and self.is_in_family_of(other)


AS_STATED = Layout("", 1, 0, {})


@dataclass(frozen=True)
class Question:
    """A model on devices, whose layout is open but for the keys of `train` that are stated."""

    config: RunConfig
    workload: Workload
    machine: Hardware
    world_size: int
    stated: frozenset[str]
    link: float | None = None  # GB/s

    @property
    def on_gpu(self) -> bool:
        return bool(self.machine.devices)

    @cached_property
    def tiers(self) -> list[list[Layout]]:
        """Returns layouts with the same result, and those with weights in bf16."""
        train = self.config.train
        found = [self._layouts({})]
        precision, _ = resolve_precision(train, self.machine.devices)
        if train.precision == "auto" and precision == "bf16":
            found.append(self._layouts({"precision": "bf16_pure"}))
        return found

    def _layouts(self, common: dict[str, Any]) -> list[Layout]:
        """Returns all that agree with what is stated, with these values in common."""
        info, defaults = task_of(self.config).info(self.config), Train.model_fields
        ladder = LADDER[:1] if info.small else LADDER if self.on_gpu else LADDER[:-1]
        result = []
        for engine, parts, rung in product(ENGINES, self._parts(info.sizes), range(len(ladder))):
            shared, step = engine | common, (ladder[rung].checkpointing, ladder[rung].offload)
            values = shared | {"context_parallel": parts} | dict(zip(RUNG_KEYS, step, strict=True))
            if all(values.get(key, value) == value for key, value in self._fixed.items()):
                named = {k: v for k, v in values.items() if v != defaults[k].default}
                given = {f"train.{k}": v for k, v in ({"engine": values["engine"]} | named).items()}
                family = f"{shared}, offloads: {step[1]}"  # which saves nothing in few layers
                result.append(Layout(family, parts, rung, given))
        return result

    @cached_property
    def _fixed(self) -> dict[str, Any]:
        """Returns the values of the stated keys, and of those that make no sense here."""
        fixed: dict[str, Any] = {} if self.on_gpu else {"offload": False}
        if self.machine.is_here or self.world_size <= GPUS_PER_MACHINE:  # all are on one machine
            fixed["shard_within"] = None
        if not Path(ZERO3).is_file():
            fixed["deepspeed_config"] = None
        stated = {key: getattr(self.config.train, key) for key in self.stated}
        return fixed | {key: value for key, value in stated.items() if value != "auto"}

    def _parts(self, sizes: Any) -> list[int]:
        """Returns how many processes may share a row."""
        heads = getattr(sizes, "num_attention_heads", None)
        if not heads or not task_of(self.config).shares_sequences:
            return [1]
        return [n for n in range(1, self.world_size + 1) if not (self.world_size % n or heads % n)]

    def plan(self, layout: Layout) -> Plan:
        """Returns the plan of a run with this layout."""
        config = with_values(self.config, layout.values)
        made = make_plan(config, self.workload, self.machine, self.world_size, is_question=True)
        return replace(made, layout=layout.values, link=self.link)

    def try_plan(self, layout: Layout) -> Plan | None:
        """Returns the plan; None if it is not possible, as layers that cannot be checkpointed."""
        try:
            return self.plan(layout)
        except UserError:
            return None

    def bound(self, layout: Layout, recomputed: float = 0.0) -> tuple[float, float] | None:
        """Returns the bytes that a process lacks at least, and the least seconds of a step.

        It needs no trace. The bytes are those of weights, gradients and optimizer that are in its
        GPU. `recomputed`: the share of the forward pass, if it is known. Returns None if such a
        configuration is not possible.
        """
        try:
            config = with_values(self.config, layout.values)
            task_of(config).refuse_untrainable(config)
            precision, _ = resolve_precision(config.train, self.machine.devices)
            packed, _ = resolve_layout(config, precision, self.on_gpu)
            planner = Planner(
                config, self.workload, self.machine, self.world_size, precision, packed
            )
            group = planner.group(config, False)
        except UserError:
            return None
        rung, counts = LADDER[layout.rung], count_parameters(config)
        train, mode = config.train, planner.info.mode
        frozen = NF4_BYTES if mode == "qlora" else DTYPES[precision].itemsize
        weights = train.trained_bytes * counts.trained
        state = {"weights": round(weights + frozen * (counts.parameters - counts.trained))}
        state |= {"optimizer": state_bytes(train, counts.shapes)}
        if not train.optimizer_in_backward:
            state |= {"gradients": weights}
        kept, everywhere = (
            sum(parts_on_rank("update", state, config, precision, group, on).values())
            for on in (self.on_gpu, False)
        )
        tokens = sum(self.workload.lengths[i] for i in planner.ids_of_step(0)) / self.world_size
        most: KeepWhole = "all" if train.keep_whole == "auto" else train.keep_whole
        traffic = planner.count_traffic(most, state["weights"], 1, int(tokens), rung)
        seconds = planner.compute_seconds(counts, recomputed, tokens)
        seconds += traffic.sent(self.world_size) / 1e9 / (self.link or ASSUMED_LINK)
        return kept - planner.usable_bytes, seconds + 2 * (everywhere - kept) / HOST_RATE


def layout_values(tried: list[Plan]) -> list[dict[str, Any]]:
    """Returns what plan.json has of layouts that were tried."""
    return [
        {
            "layout": made.layout,
            "reserved_bytes": made.memory.reserved,
            "host_bytes": made.host_bytes,
            "fits": made.fits,
            "step_seconds": made.step_seconds,
        }
        for made in tried
    ]


def choose_layout(question: Question, console: Console | None = None) -> tuple[Plan, list[Plan]]:
    """Returns the plan of the fastest layout that fits, and those of all that were tried.

    If none fits, it is the one that lacks the least memory, with a number of GPUs that is enough.
    Raises UserError if no layout is possible. `console` shows the progress.
    """
    tried: list[Plan] = []
    number = sum(map(len, question.tiers))
    with bar(console, "layouts", number) as advance:
        for tier in question.tiers:
            tried += _search(question, tier, advance)
            if any(made.fits for made in tried):
                break
    if not tried:  # not even the weights fit, so take what is the smallest: the last
        smallest = (question.try_plan(each) for each in reversed(_lightest(question)))
        tried = [next(filter(None, smallest), None) or question.plan(AS_STATED)]
    best = min(tried, key=lambda made: (not made.fits, made.missing_bytes, made.step_seconds))
    return best if best.fits else replace(best, enough=count_enough(question)), tried


def _search(question: Question, layouts: list[Layout], advance: Advance) -> list[Plan]:
    """Returns the plans of those layouts that had to be tried to find the fastest that fits."""
    bounds = {layout: bound for layout in layouts if (bound := question.bound(layout))}
    queue = sorted(bounds, key=lambda each: bounds[each][1])
    tried, too_large, fastest = list[Plan](), list[Layout](), math.inf
    shares = dict[str, float]()  # of the forward pass that kinds of checkpointing repeat
    while queue:
        layout = queue.pop(0)
        advance()
        kind = LADDER[layout.rung].checkpointing
        if any(map(layout.takes_more_than, too_large)) or bounds[layout][0] > 0:
            continue
        bound = question.bound(layout, shares.get(str(kind), 0.0))
        if bound is None or bound[1] >= fastest * (1 - GAIN):
            continue
        if (made := question.try_plan(layout)) is None:
            continue
        tried.append(made)
        share = made.memory.recomputed_share(kind)
        shares[str(kind)] = min(share, shares.get(str(kind), share))
        if made.fits:
            fastest = min(fastest, made.step_seconds)
        elif made.missing_bytes:
            too_large.append(layout)
            # If the lightest of its kind, or of its family, does not fit, none of them does.
            for is_like in (layout.resembles, layout.is_in_family_of):
                others = [*filter(is_like, queue)]
                if others and sum(map(is_like, too_large)) == 1:
                    queue.insert(0, queue.pop(queue.index(max(others, key=Layout.order))))
    return tried


def count_enough(question: Question) -> int | None:
    """Returns a number of GPUs of the same kind on which a layout fits; None if none is known.

    It is a multiple of the GPUs of a machine, or less than these.
    """
    if not question.on_gpu:
        return None
    few = many = question.world_size
    while not _fits_on(question, many := 2 * many):
        few = many
        if many >= MOST_GPUS:
            return None
    step = GPUS_PER_MACHINE if few >= GPUS_PER_MACHINE else 1
    while (middle := (few + many) // 2 // step * step) > few:
        few, many = (few, middle) if _fits_on(question, middle) else (middle, many)
    return many


def _fits_on(question: Question, number: int) -> bool:
    """Returns whether any layout fits on so many GPUs."""
    devices = question.machine.devices[:1] * number
    machine = replace(question.machine, devices=devices, is_here=False)
    larger = replace(question, machine=machine, world_size=number)
    for layout in _lightest(larger):
        bound = larger.bound(layout)
        if bound and bound[0] <= 0 and (made := larger.try_plan(layout)) and made.fits:
            return True
    return False


def _lightest(question: Question) -> list[Layout]:
    """Returns the layout of each family that takes the least memory."""
    families = dict[str, Layout]()
    for layout in chain.from_iterable(question.tiers):
        families[layout.family] = max(families.get(layout.family, layout), layout, key=Layout.order)
    return list(families.values())
