"""Chooses the token budget, and how far to climb the ladder of what saves memory."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from sft.config.load import with_values
from sft.config.schema import KeepWhole, RunConfig, Train
from sft.data import batches
from sft.errors import ConfigError, ModelError
from sft.models import attention, checkpointing
from sft.models.dtypes import DTYPES
from sft.models.sequences import filled_heads
from sft.plan import network, sharding, speed
from sft.plan.counts import Counts
from sft.plan.dry_run import Window
from sft.plan.memory import (
    ACTIVATION_BYTES,
    CONTEXT_BYTES,
    COPIES,
    RUNG_KEYS,
    STATE,
    Memory,
    predict,
    rows_of_logits,
)
from sft.plan.trace import WEIGHT_COPIES
from sft.runtime import hardware, processes
from sft.runtime.console import duration
from sft.runtime.hardware import Hardware
from sft.tasks.base import TaskInfo, Workload
from sft.tasks.registry import task_of
from sft.train import schedule

# Share of the memory that stays free: for other programs on a CPU, for fragmentation on a GPU.
MARGIN = {"cpu": 0.15, "cuda": 0.06}
SATURATING_TOKENS = {"cpu": 2048, "cuda": 16384}  # a larger micro-batch is no faster
SATURATING_SMALL = {"cpu": 8192, "cuda": 65536}  # the same for a small model
USEFUL = 4  # a micro-batch with this part of them is large enough
# Overhead of one micro-batch, in tokens: measured on 2 cores (docs/LOG.md), but not on a GPU, where
# the fewest micro-batches are taken.
MICRO_BATCH_COST = {"cpu": 64, "cuda": None}
NOMINAL_FLOPS = 1e14  # operations a second of a GPU of unknown speed: only to compare settings
CORE_FLOPS = 6e10  # operations a second of a CPU core in training, measured (docs/LOG.md)
COMPILED_SECONDS = 3600.0  # a run on a CPU that takes as long gains minutes by compiling
GPUS_PER_MACHINE = 8  # of a plan for GPUs that are elsewhere
SCANNED = 20_000  # examples among which the heaviest micro-batch is searched


@dataclass(frozen=True)
class Rung:
    """What is done about activations: it takes less memory, more time, and changes no result."""

    checkpointing: checkpointing.Kind
    offload: bool = False

    @property
    def values(self) -> dict[str, Any]:
        """Returns its configuration, by dotted key."""
        chosen = (self.checkpointing, self.offload)
        return {f"train.{key}": each for key, each in zip(RUNG_KEYS, chosen, strict=True)}


# From the cheapest on.
LADDER = (Rung(False), Rung("selective"), Rung(True), Rung(True, offload=True))


@dataclass(frozen=True)
class _Choice:
    """A token budget on a rung, and its memory."""

    rung: Rung
    budget: batches.Budget
    cuts: list[list[batches.MicroBatch]]  # of the first step
    tokens: int  # of the heaviest micro-batch of the run
    memory: Memory
    fits: bool
    why: str  # the reason for this budget


@dataclass(frozen=True)
class Planner:
    """Predicts a run from its configuration, data and devices, and chooses its `auto` values."""

    config: RunConfig
    workload: Workload
    machine: Hardware
    world_size: int
    precision: str
    layout: batches.Layout
    _candidates: dict[batches.Budget, tuple[list[batches.MicroBatch], bool]] = field(
        default_factory=dict, init=False
    )

    @cached_property
    def info(self) -> TaskInfo:
        return task_of(self.config).info(self.config)

    @property
    def device_type(self) -> str:
        return "cuda" if self.machine.devices else "cpu"

    @property
    def device_name(self) -> str:
        devices = self.machine.devices
        return f"{devices[0].name} x {self.world_size}" if devices else self.machine.cpu_name

    @property
    def context_bytes(self) -> int:
        return CONTEXT_BYTES if self.machine.devices else 0

    @property
    def available_bytes(self) -> int:
        """Returns the smallest GPU's free memory, or the share of the RAM of one process."""
        if self.machine.devices:
            return min(device.free_bytes or device.total_bytes for device in self.machine.devices)
        return self.machine.ram_available_bytes // self.world_size

    def ids_of_step(self, step: int) -> list[int]:
        """Returns the ids of the step's global batch."""
        train = self.config.train
        order = schedule.order_seed(train)
        return batches.global_batch_ids(len(self.workload.lengths), order, step, train.global_batch)

    def choose(self) -> tuple[_Choice, str]:
        """Returns the choice, and why its rung was chosen: the first with large micro-batches."""
        rungs = self._rungs()
        if len(rungs) == 1:
            return self._choose_largest(rungs[0]), "configured"
        if self.info.small:
            return self._choose_largest(rungs[0]), "the model is too small for it"
        batch = sum(self.workload.lengths[i] for i in self.ids_of_step(0)) // self.world_size
        enough, tried = min(self.saturating_tokens // USEFUL, batch), list[_Choice]()
        for rung in rungs:
            try:
                tried.append(self._choose_largest(rung))
            except ModelError:  # its layers cannot be checkpointed in this way
                if not tried:
                    raise
                continue
            if tried[-1].fits and tried[-1].budget.max_tokens >= enough:
                break
        fitting = [each for each in tried if each.fits]
        tokens = [each.budget.max_tokens for each in fitting]
        chosen = fitting[tokens.index(max(tokens))] if fitting else tried[-1]
        first = tried[0]
        if chosen is first:
            if len(tried) == 1 and first.fits:
                return first, "not needed, and it would cost time"
            return first, "it would not make larger micro-batches possible"
        without = "does not fit" if not first.fits else f"holds {first.budget.max_tokens:,} tokens"
        return chosen, f"a micro-batch without it {without}"

    def _rungs(self) -> list[Rung]:
        """Returns the rungs that the configuration leaves open, from the cheapest on."""
        train = self.config.train
        kind, offload = train.gradient_checkpointing, train.activation_offload
        kinds: list[checkpointing.Kind] = [False, "selective", True] if kind == "auto" else [kind]
        if offload != "auto":
            return [Rung(each, offload) for each in kinds]
        result = [Rung(each) for each in kinds]
        return [*result, Rung(kinds[-1], True)] if self.device_type == "cuda" else result

    def _choose_largest(self, rung: Rung) -> _Choice:
        """Returns the largest budget that fits, up to the configured or the saturating one."""
        train = self.config.train
        longest = math.ceil(max(self.workload.lengths) / train.context_parallel)
        if rows := configured_rows(train, self.world_size):
            limit = rows * longest if train.max_tokens == "auto" else train.max_tokens
            budget = replace(self._budget(limit), micro_batch_cost=None, max_rows=rows)
            choice = self._try(rung, budget, f"{rows} of the longest example")
            steps = train.gradient_accumulation_steps
            if steps != "auto" and len(choice.cuts[0]) > steps:
                raise ConfigError(
                    f"train.max_tokens: {limit:,} tokens do not hold {rows} examples, as "
                    f"train.gradient_accumulation_steps={steps} needs: raise it, or leave one of "
                    "the two at auto"
                )
            return choice
        if train.max_tokens != "auto":
            return self._try(rung, self._budget(train.max_tokens), "configured")
        most = max(longest, self.saturating_tokens)
        why = "the longest example" if longest == most else "more is no faster on this device"
        high = self._try(rung, self._budget(most), why)
        if high.fits or longest == most:
            return high
        low = self._try(rung, self._budget(longest), "the longest example")
        if not low.fits:
            return low
        for _ in range(4):  # memory is convex in tokens, so interpolated values are never too low
            less, more = low.memory.reserved, high.memory.reserved
            share = min(0.98, (self.usable_bytes - less) / (more - less))
            tokens = int(low.tokens + share * (high.tokens - low.tokens))
            if tokens <= 1.02 * low.tokens:
                break
            middle = self._try(rung, self._budget(tokens), "what fits the memory")
            low, high = (middle, high) if middle.fits else (low, middle)
        return low

    def _budget(self, max_tokens: int) -> batches.Budget:
        cost = MICRO_BATCH_COST[self.device_type]
        cost = cost and max(1, cost // self.info.copies)
        return batches.Budget(
            max_tokens, self.layout, cost, shared_by=self.config.train.context_parallel
        )

    @property
    def saturating_tokens(self) -> int:
        """Returns the number of tokens beyond which a larger micro-batch is no faster."""
        most = SATURATING_SMALL if self.info.small else SATURATING_TOKENS
        return most[self.device_type] // self.info.copies

    @property
    def usable_bytes(self) -> float:
        """Returns the available bytes without the context, copies of a checkpoint and a margin."""
        copies = 0 if self.machine.devices else self.copy_bytes
        margin = self.available_bytes * MARGIN[self.device_type]
        return self.available_bytes - margin - self.context_bytes - copies

    def _try(self, rung: Rung, budget: batches.Budget, why: str) -> _Choice:
        config = with_values(self.config, rung.values)
        cuts = batches.cut(self.ids_of_step(0), self.workload.lengths, self.world_size, budget)
        window = self.heaviest_window(budget, rung.checkpointing)
        memory = self.predict(window, config, len(cuts[0]))
        return _Choice(rung, budget, cuts, window.tokens, memory, self.fits(memory), why)

    def fits(self, memory: Memory) -> bool:
        """Returns whether the device has room for it, and the host for what is there."""
        on_host = sum(self.host_parts(memory).values())
        return memory.reserved <= self.usable_bytes and on_host <= self.host_usable_bytes

    def host_parts(self, memory: Memory) -> dict[str, int]:
        """Returns the bytes that a process keeps in host memory beside its device, by use."""
        parts = memory.hosted | {COPIES: self.copy_bytes}
        return {use: each for use, each in parts.items() if each}

    @cached_property
    def copy_bytes(self) -> int:
        """Returns a process's share of the RAM that copies of a checkpoint take on its machine."""
        here = self.per_machine if self.machine.devices else self.world_size
        return sharding.copy_bytes(self.config, self.group(self.config, False), here)

    @property
    def host_usable_bytes(self) -> float:
        """Returns a process's share of the RAM without a margin; infinite if there is no GPU, or
        if it is unknown."""
        if not self.machine.is_here or not self.machine.devices:
            return math.inf
        here = min(self.per_machine, len(self.machine.devices))
        return self.machine.ram_available_bytes * (1 - MARGIN["cpu"]) / here

    def predict(self, window: Window, config: RunConfig, micro_batches: int) -> Memory:
        """Returns the memory of a step with `micro_batches` micro-batches on each process."""
        window = replace(window, waiting=(micro_batches - 1) * window.tokens)
        return self._predict(window, config, micro_batches > 1)

    def _predict(
        self, window: Window, config: RunConfig, accumulates: bool, evaluation: bool = False
    ) -> Memory:
        return predict(
            config,
            self.precision,
            window,
            on_gpu=self.device_type == "cuda",
            evaluation=evaluation,
            group=self.group(config, accumulates),
        )

    def group(self, config: RunConfig, accumulates: bool) -> sharding.Group:
        train, zero = config.train, {}
        if train.engine == "deepspeed":
            zero = processes.deepspeed_settings(train)["zero_optimization"]
        within = processes.shards_within(train, self.world_size, self.per_machine)
        return sharding.Group(self.world_size, train.engine, accumulates, zero, within)

    @property
    def per_machine(self) -> int:
        """Returns the processes on a machine; of GPUs that are elsewhere, 8 at most."""
        if self.machine.is_here:
            return processes.processes_here(self.world_size)
        return min(GPUS_PER_MACHINE, self.world_size)

    def start_bytes(self, memory: Memory) -> int:
        """Returns the bytes of the model that a process has while weights are read, at most."""
        info, group = self.info, self.group(self.config, False)
        return sharding.start_bytes(memory.model_bytes, self.config, info.starts_split, group)

    def choose_kept(self, choice: _Choice) -> tuple[_Choice, KeepWhole, str]:
        """Returns the choice, with what FSDP2 keeps whole: as much as fits; and why."""
        asked = self.config.train.keep_whole
        if asked != "auto" or self.config.train.engine != "fsdp":
            return choice, asked, "configured"
        if self.world_size == 1:
            return choice, False, "one process exchanges nothing"
        kinds: tuple[KeepWhole, ...] = ("all", "gradients") if choice.fits else ()
        for kind in kinds:
            config = with_values(self.config, choice.rung.values | {"train.keep_whole": kind})
            window = self.heaviest_window(choice.budget, choice.rung.checkpointing)
            memory = self.predict(window, config, len(choice.cuts[0]))
            if self.fits(memory):
                return replace(choice, memory=memory), kind, "it fits, and less is exchanged"
        return choice, False, "more does not fit"

    def traffic(self, choice: _Choice, kept: KeepWhole) -> network.Traffic:
        """Returns what the first step exchanges, with this `train.keep_whole`."""
        own, lengths = choice.cuts[0], self.workload.lengths
        tokens = sum(batches.num_tokens(lengths, m, self.layout) for m in own)
        tokens //= choice.budget.shared_by
        model_bytes = choice.memory.model_bytes
        return self.count_traffic(kept, model_bytes, len(own), tokens, choice.rung)

    def count_traffic(
        self, kept: KeepWhole, model_bytes: int, micro_batches: int, tokens: int, rung: Rung
    ) -> network.Traffic:
        """Returns what a process with so many micro-batches and tokens exchanges in a step."""
        config, shared_by = self.config, self.config.train.context_parallel
        if config.train.engine == "fsdp":
            config = with_values(config, {"train.keep_whole": kept})
        group = self.group(config, micro_batches > 1)
        found = network.predict_traffic(config, self.precision, group, model_bytes, micro_batches)
        passes = 3 if rung.checkpointing else 2
        itemsize = DTYPES[self.precision].itemsize
        exchanged = network.exchanged_bytes(self.info.sizes, shared_by, itemsize, tokens, passes)
        return replace(found, exchanged=exchanged)

    def heaviest_window(self, budget: batches.Budget, kind: checkpointing.Kind) -> Window:
        """Returns the heaviest micro-batch, with gradients from the start if a step has several."""
        chosen, accumulates = self.heaviest_micro_batch(budget, kind)
        return Window(
            (self.workload.sizes(chosen),),
            budget.layout,
            accumulates,
            shared_by=budget.shared_by,
        )

    def heaviest_micro_batch(
        self, budget: batches.Budget, kind: checkpointing.Kind
    ) -> tuple[batches.MicroBatch, bool]:
        """Returns the run's micro-batch that takes the most memory, and whether gradients exist
        before it, from earlier micro-batches or in DDP's buckets.

        Considers only the first SCANNED examples of a long run, and its longest ones.
        """
        if budget not in self._candidates:
            self._candidates[budget] = self._heavy_micro_batches(budget)
        micro_batches, several = self._candidates[budget]
        chosen = self._heaviest(self.workload, micro_batches, kind is not True)
        return chosen, several or self.world_size > 1

    def _heavy_micro_batches(self, budget: batches.Budget) -> tuple[list[batches.MicroBatch], bool]:
        """Returns the micro-batches that may be the heaviest, and whether a step has several."""
        lengths, world = self.workload.lengths, self.world_size
        steps = schedule.total_steps(self.config.train, len(lengths))
        scanned = min(steps, max(1, SCANNED // self.config.train.global_batch))
        several, result = False, list[batches.MicroBatch]()
        for step in range(scanned):
            cuts = batches.cut(self.ids_of_step(step), lengths, world, budget)
            several |= len(cuts[0]) > 1
            result += [m for rank in cuts for m in rank if m]
        if steps > scanned:
            groups = world // budget.shared_by
            share = min(math.ceil(len(self.ids_of_step(0)) / groups), len(lengths))
            order = np.argpartition(-np.asarray(lengths), share - 1)[:share]
            result += batches.cut(order.tolist(), lengths, budget.shared_by, budget)[0]
        return result, several

    def _heaviest(
        self, work: Workload, micro_batches: list[batches.MicroBatch], keeps_layers: bool
    ) -> batches.MicroBatch:
        arch = self.info.sizes
        per_token = arch.hidden_size * ACTIVATION_BYTES[self.precision]
        per_token *= arch.num_hidden_layers if keeps_layers else 1
        at_once = rows_of_logits(self.info)

        def weight(micro_batch: batches.MicroBatch) -> float:
            tokens = batches.num_tokens(work.lengths, micro_batch, self.layout)
            rows = min(int(work.supervised[micro_batch].sum()), at_once)
            return tokens * per_token + rows * arch.vocab_size * 12

        return max(micro_batches, key=weight)

    def predict_evaluation(self, budget: batches.Budget, kept: KeepWhole) -> Memory | None:
        """Returns the peak of the held-out loss; None if nothing is held out."""
        work = self.workload.held_out
        if work is None:
            return None
        ranks = batches.cut(range(len(work.lengths)), work.lengths, self.world_size, budget)
        chosen = self._heaviest(work, [m for rank in ranks for m in rank if m], False)
        shared_by = budget.shared_by
        window = Window((work.sizes(chosen),), budget.layout, gradients=True, shared_by=shared_by)
        values = LADDER[0].values
        if self.config.train.engine == "fsdp":
            values |= {"train.keep_whole": kept}
        config = with_values(self.config, values)
        return self._predict(window, config, False, evaluation=True)

    def answering_bytes(self, evaluation: Memory) -> int:
        """Returns the peak bytes while held-out prompts are answered; 0 if there are none."""
        work = self.workload.held_out
        if work is None:
            return 0
        prompts = (np.asarray(work.lengths) - work.supervised).tolist()
        task = task_of(self.config)
        taken = task.answering_bytes(self.config, self.precision, prompts, self.world_size)
        transient = ("activations", "logits and loss", "dequantisation", WEIGHT_COPIES)
        kept = sum(v for k, v in evaluation.breakdown.items() if k not in transient)
        return kept + taken if taken else 0

    def time(self, counts: Counts, recomputed: float, tokens: int) -> speed.Time | None:
        """Returns the time of a run of `tokens`; None if the speed of the device is unknown."""
        # Nobody knows what share of a GPU's peak so small a model reaches before it was measured.
        gpu = self.machine.devices[0].name if self.machine.devices else None
        return speed.predict_time(
            self.flops(counts, recomputed, tokens),
            self.info.cache,
            self.device_name,
            None if self.info.small else gpu,
            self.world_size,
            self.speed_kind(counts),
        )

    def compute_seconds(self, counts: Counts, recomputed: float, tokens: float) -> float:
        """Returns how long a step computes whose busiest process has so many tokens."""
        everywhere = round(tokens * self.world_size)
        if found := self.time(counts, recomputed, everywhere):
            return found.seconds
        rate = NOMINAL_FLOPS if self.machine.devices else self._cpu_flops / self.world_size
        return self.flops(counts, recomputed, everywhere) / (rate * self.world_size)

    def busiest_tokens(self, choice: _Choice) -> float:
        """Returns the tokens of the first step's busiest process; a small micro-batch counts as one
        that is large enough to use the device."""
        lengths, shared_by = self.workload.lengths, choice.budget.shared_by
        ideal = sum(lengths[i] for i in self.ids_of_step(0)) / self.world_size
        least = min(self.saturating_tokens / USEFUL, ideal)
        most = (
            max(batches.num_tokens(lengths, m, self.layout) for m in at) / shared_by
            for at in zip(*choice.cuts, strict=True)
        )
        return sum(max(each, least) for each in most)

    def moved_bytes(self, choice: _Choice, traffic: network.Traffic) -> int:
        """Returns what a process moves between its GPU and host memory in a step, or updates there.

        Activations go there and come back. State is read and written by the update; FSDP2 also
        sends shards of weights for each gathering, and takes shards of gradients back.
        """
        moved = 2 * choice.memory.copied_bytes * len(choice.cuts[0])
        if self.config.train.offload and self.machine.devices:
            moved += (traffic.gathered + traffic.scattered) // (traffic.within or self.world_size)
        return moved + 2 * choice.memory.hosted.get(STATE, 0)

    @property
    def _cpu_flops(self) -> float:
        return CORE_FLOPS * max(self.machine.cores, self.world_size)

    def speed_kind(self, counts: Counts) -> speed.Kind:
        return speed.Kind(self.info.mode, self.precision, counts.multiplied)

    def flops(self, counts: Counts, recomputed: float, tokens: float) -> float:
        """Returns the operations that training on `tokens` takes, on all processes together.

        `recomputed`: the share of the forward pass that the backward pass repeats.
        """
        passes: float = 3 if self.info.mode == "full" else 2
        passes += recomputed + self.info.needs_global_batch
        multiplied, copies = counts.multiplied, self.info.copies
        if copies > 1:  # each copy has an adapter, which sees its own rows
            multiplied = copies * (multiplied - counts.trained) + counts.trained
        # Gradients of queries, keys and values take two more passes, whatever is trained.
        attention = (3 + recomputed) * copies * self._attention_flops
        return (2 * passes * multiplied + attention) * tokens

    @cached_property
    def _attention_flops(self) -> float:
        found = speed.attention_flops(self.info.sizes, self.workload.lengths)
        heads = getattr(self.info.sizes, "num_attention_heads", None) or 1
        return found * filled_heads(self.config.train.context_parallel, heads, heads)[0] / heads

    def choose_compile(self, counts: Counts, tokens: int) -> tuple[bool, str]:
        """Returns whether layers are compiled for a run of `tokens`, and why.

        It does not depend on memory or on time that was measured: a resumed run chooses the same.
        """
        asked = self.config.train.compile
        if asked != "auto":
            return asked, "configured"
        if self.config.train.context_parallel > 1:
            return False, "processes exchange tokens around attention"
        if self.machine.devices:
            return False, "on GPUs no gain has been measured yet"
        about = self.flops(counts, 0, tokens) / self._cpu_flops
        if about < COMPILED_SECONDS:
            return False, f"a run of about {duration(about)} does not earn the time to compile"
        if self.machine.is_here and (missing := hardware.missing_compiler([])):
            return False, missing
        return True, f"a run of about {duration(about)} earns the time to compile"


def configured_rows(train: Train, world_size: int) -> int | None:
    """Returns the configured examples of a micro-batch; raises ConfigError if impossible."""
    rows, steps = train.micro_batch, train.gradient_accumulation_steps
    if steps == "auto":
        return None if rows == "auto" else rows
    processes = world_size // train.context_parallel  # that have examples of their own
    batch, number = train.global_batch, processes * steps
    expected = max(1, batch // number) if rows == "auto" else rows
    if expected * number != batch:
        raise ConfigError(
            f"train.global_batch: {world_size} process(es) with {steps} micro-batches of "
            f"{expected} make {expected * number} examples, not {batch}: change one of "
            "train.global_batch, train.micro_batch, train.gradient_accumulation_steps, or "
            "leave the last two at auto"
        )
    return expected


def budget_values(budget: batches.Budget) -> dict[str, Any]:
    """Returns the configuration of a budget, by dotted key."""
    values = {"train.max_tokens": budget.max_tokens, "train.layout": budget.layout}
    if budget.max_rows:
        rows = {"train.micro_batch": budget.max_rows, "train.gradient_accumulation_steps": "auto"}
        return values | rows
    return values


def resolve_layout(config: RunConfig, precision: str, on_gpu: bool) -> tuple[batches.Layout, str]:
    """Returns the layout of micro-batches, and the reason."""
    if config.train.layout != "auto":
        return config.train.layout, "configured"
    kernel = task_of(config).info(config).attention
    if attention.needs_no_mask(kernel, precision, on_gpu):
        return "packed", "flash attention reads document borders without a mask"
    why = "rows sorted by length; packing would need a dense mask here"
    if kernel == attention.NAME:
        why += f", since {kernel} has a kernel only on a GPU, in bf16"
    return "padded", why
