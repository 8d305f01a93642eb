"""What the run will take, told before weights are loaded; and what the `auto` values become.

The heaviest window of the whole run is looked for (it is known, because the order is), and its
memory predicted (`memory`). The token budget is the largest that fits with a margin, and no larger
than what saturates the device; activations are checkpointed where nothing else makes room.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.table import Table
from rich.text import Text

from sft import attention, batching, confirm, engine, hardware, memory, processes, storage
from sft.config import (
    AnyConfig,
    Config,
    ConfigError,
    Configured,
    Distill,
    Train,
    dump_config,
    with_values,
)
from sft.confirm import Past
from sft.distill.task import blank_histories, num_held_out, split
from sft.distill.transformer import num_positions
from sft.engine import Engine
from sft.hardware import Hardware
from sft.log import Log, duration, facts, size, write_json
from sft.memory import Memory
from sft.prepare import Prepared
from sft.rehearsal import Window, uniform
from sft.tasks import Row, Traits, Words, answering_bytes, traits
from sft.trace import MIB

# Of the memory stays free: other programs on a CPU, what fragmentation the replay does not see.
MARGIN = {"cpu": 0.15, "cuda": 0.06}
SATURATING_TOKENS = {"cpu": 2048, "cuda": 16384}  # a larger micro-batch is no faster
OF_SMALL = {"cpu": 8192, "cuda": 65536}  # likewise, of a model whose tokens take little
# Tokens whose time one more micro-batch takes: overhead of its operations. Measured on 2 cores
# (docs/LOG.md); on a GPU not measured, so there the fewest micro-batches are taken.
MICRO_BATCH_COST = {"cpu": 64, "cuda": None}
UTILISATION = 0.35  # of a GPU's peak that training reaches; an assumption
LAUNCHES = 0.05  # seconds of arithmetic below which a GPU waits for the launches of its kernels
SCANNED = 20_000  # examples among which the heaviest micro-batch is looked for


@dataclass(frozen=True)
class Work:
    """What is trained on, as far as memory and time depend on it."""

    lengths: Sequence[int]  # tokens of each example
    supervised: np.ndarray  # (examples,) those of them that the loss sees
    held_out: Work | None = None

    def rows(self, chosen: Sequence[int]) -> tuple[Row, ...]:
        lengths, supervised = self.lengths, self.supervised
        return tuple((lengths[i], min(int(supervised[i]), lengths[i])) for i in chosen)

    @staticmethod
    def of(prepared: Prepared) -> Work:
        train, held_out = (
            (part.lengths, part.arrays.index["supervised"][part.order])
            for part in (prepared.train, prepared.held_out)
        )
        return Work(*train, Work(*held_out))

    @staticmethod
    def uniform(config: Config) -> Work:
        """One global batch of the longest rows that are allowed, all of whose tokens are learnt.

        Raises ConfigError if the model has no positions for them.
        """
        length, number = config.data.max_seq_len, config.train.global_batch
        positions = getattr(traits(config).text, "max_position_embeddings", None)
        if positions and length > positions:
            raise ConfigError(
                f"{config.model.name} has positions for {positions:,} tokens, found {length:,}: "
                "give a smaller SEQ (data.max_seq_len)"
            )
        return Work([length] * number, np.full(number, length))

    @staticmethod
    def windows(settings: Distill) -> Work:
        """Of histories, which need not be there: how many there are follows from the settings."""
        train, held_out = split(blank_histories(settings), settings)

        def work(number: int, rest: Work | None = None) -> Work:
            learnt = np.full(number, settings.context)
            return Work([num_positions(settings)] * number, learnt, rest)

        return work(len(train), work(num_held_out(held_out)))


@dataclass(frozen=True)
class Plan:
    num_examples: int
    num_held_out: int
    tokens_per_epoch: int
    supervised_share: float
    steps: int
    tokens: int  # over all steps
    global_batch: int
    world_size: int
    budget: batching.Budget
    precision: str
    gradient_checkpointing: bool
    micro_batch: int  # examples, at most, in the first step
    micro_batches: int  # of each process in the first step
    num_parameters: int
    num_trained: int
    memory: Memory
    evaluation_bytes: int  # at the peak of the held-out loss; 0 without one
    generation_bytes: int  # while held-out prompts are answered; 0 without
    context_bytes: int  # taken by the device for itself
    available_bytes: int
    room: int  # bytes of them that a step may take: without the context and a margin
    device: str
    past: Past | None  # what earlier runs on it have shown
    seconds: float | None  # of all steps, where the device's speed is known
    disk: storage.Need
    words: Words
    reasons: dict[str, str]  # dotted configuration key -> why its `auto` became what it is
    warnings: list[str] = field(default_factory=list)

    @property
    def missing_bytes(self) -> int:
        """By which the step exceeds what is available with the margin; 0 if it fits."""
        return max(0, self.memory.reserved - self.room)


def make_plan(
    config: AnyConfig, prepared: Prepared | Work, machine: Hardware, world_size: int
) -> Plan:
    """Raises ConfigError for an effective batch that so many processes cannot make."""
    train = config.train
    work = prepared if isinstance(prepared, Work) else Work.of(prepared)
    precision, why_precision = processes.resolve_precision(train, machine.devices)
    layout, why_layout = resolve_layout(config, precision, bool(machine.devices))
    own = traits(config)
    at = Target(config, work, machine, world_size, precision, layout)
    choice, why_checkpointing = at.choose()
    counts = memory.counts(config)
    cuts, budget = choice.cuts, choice.budget
    reasons = {
        "train.precision": why_precision,
        "train.layout": why_layout,
        "train.gradient_checkpointing": why_checkpointing,
        "train.max_tokens": choice.why,
        "train.micro_batch": f"what {budget.max_tokens:,} tokens hold",
        "train.gradient_accumulation_steps": f"{len(at.first)} {own.words.examples} in "
        f"{world_size} process(es) of micro-batches of at most {budget.max_tokens:,} tokens",
    }
    evaluation = at.evaluation(budget)
    steps = engine.total_steps(train, len(work.lengths))
    per_epoch = sum(work.lengths)
    tokens = round(per_epoch * steps * len(at.first) / len(work.lengths))
    made = Plan(
        num_examples=len(work.lengths),
        num_held_out=len(work.held_out.lengths) if work.held_out else 0,
        tokens_per_epoch=per_epoch,
        supervised_share=int(work.supervised.sum()) / per_epoch,
        steps=steps,
        tokens=tokens,
        global_batch=len(at.first),
        world_size=world_size,
        budget=budget,
        precision=precision,
        gradient_checkpointing=choice.checkpointing,
        micro_batch=max(len(m) for rank in cuts for m in rank),
        micro_batches=len(cuts[0]),
        num_parameters=counts.parameters,
        num_trained=counts.trained,
        memory=choice.memory,
        evaluation_bytes=evaluation.allocated if evaluation else 0,
        generation_bytes=at.answering(evaluation) if evaluation else 0,
        context_bytes=at.context_bytes,
        available_bytes=at.available_bytes,
        room=int(at.room),
        device=at.name,
        past=confirm.past(own.cache, at.name),
        seconds=at.seconds(counts, choice.checkpointing, tokens),
        disk=disk(config, len(work.lengths)),
        words=own.words,
        reasons={k: why for k, why in reasons.items() if getattr(train, k.split(".")[1]) == "auto"},
    )
    return replace(made, warnings=_warnings(made))


def disk(config: AnyConfig, num_examples: int) -> storage.Need:
    """What a run on so many examples writes."""
    own = traits(config)
    steps = engine.total_steps(config.train, num_examples)
    counted = memory.counts(config)
    needed = storage.need(config.train, counted.trained, own.vocabulary, steps)
    if own.mode == "full":
        return needed
    base = counted.parameters - counted.trained
    return replace(needed, merged=2 * base + own.vocabulary * storage.TOKENIZER_BYTES)


def _warnings(plan: Plan) -> list[str]:
    result = []
    if plan.missing_bytes:
        result.append(
            f"one micro-batch takes {size(plan.memory.reserved + plan.context_bytes)} of the "
            f"{size(plan.available_bytes)} per process of {plan.device}, "
            f"{size(plan.missing_bytes)} more than fits with a margin: expect to run out of memory"
        )
    if plan.evaluation_bytes > plan.room:
        result.append(
            f"the held-out loss takes {size(plan.evaluation_bytes)}, which does not fit: a smaller "
            f"train.max_tokens or {plan.words.shorter} help"
        )
    if plan.generation_bytes > plan.room:
        result.append(
            f"{plan.words.answers} takes {size(plan.generation_bytes)}, which does not fit: "
            f"lower {plan.words.fewer}"
        )
    return result


def resolved_values(plan: Plan) -> dict[str, Any]:
    """Dotted configuration keys -> the values that `auto` became; those of the cut stay `auto`,
    since they follow from `max_tokens`."""
    cut = ("micro_batch", "gradient_accumulation_steps")
    values = {f"train.{key}": value for key, value in chosen(plan).items() if key not in cut}
    return {key: value for key, value in values.items() if key in plan.reasons}


# --- choosing ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Choice:
    checkpointing: bool
    budget: batching.Budget
    cuts: list[list[batching.MicroBatch]]  # of the first step
    tokens: int  # of the heaviest micro-batch of the run
    memory: Memory
    fits: bool
    why: str  # the budget


@dataclass(frozen=True)
class Target:
    """A configuration on its data and devices."""

    config: AnyConfig
    work: Work
    machine: Hardware
    world_size: int
    precision: str
    layout: batching.Layout
    scanned: dict[batching.Budget, tuple[list[batching.MicroBatch], bool]] = field(
        default_factory=dict
    )

    @cached_property
    def traits(self) -> Traits:
        return traits(self.config)

    @property
    def kind(self) -> str:
        return "cuda" if self.machine.devices else "cpu"

    @property
    def name(self) -> str:
        devices = self.machine.devices
        return f"{devices[0].name} x {self.world_size}" if devices else self.machine.cpu_name

    @property
    def context_bytes(self) -> int:
        return memory.CONTEXT_BYTES if self.machine.devices else 0

    @property
    def available_bytes(self) -> int:
        """Per process: the smallest GPU's free memory, or an equal share of the RAM."""
        if self.machine.devices:
            return min(device.free_bytes or device.total_bytes for device in self.machine.devices)
        return self.machine.ram_available_bytes // self.world_size

    @property
    def first(self) -> list[int]:
        """Ids of the first step's global batch."""
        return self._ids(0)

    def _ids(self, step: int) -> list[int]:
        train = self.config.train
        order = engine.order_seed(train)
        return batching.global_batch_ids(len(self.work.lengths), order, step, train.global_batch)

    def choose(self) -> tuple[_Choice, str]:
        """(the choice, why activations are checkpointed or not)."""
        asked = self.config.train.gradient_checkpointing
        if asked != "auto":
            return self._largest(asked), "configured"
        if self.traits.small:
            return self._largest(False), "the model is too small for it"
        kept = self._largest(False)
        batch = sum(self.work.lengths[i] for i in self.first) // self.world_size
        if kept.fits and kept.budget.max_tokens >= min(self.saturating // 4, batch):
            return kept, "not needed, and it would cost about a quarter of the speed"
        again = self._largest(True)
        if kept.fits and again.budget.max_tokens <= kept.budget.max_tokens:
            return kept, "it would not make larger micro-batches possible"
        without = "does not fit" if not kept.fits else f"holds {kept.budget.max_tokens:,} tokens"
        return again, f"a micro-batch without it {without}"

    def _largest(self, checkpointing: bool) -> _Choice:
        """The largest budget that fits, up to what is asked for or saturates the device."""
        train, lengths = self.config.train, self.work.lengths
        longest = max(lengths)
        if rows := rows_asked(train, self.world_size):
            limit = rows * longest if train.max_tokens == "auto" else train.max_tokens
            budget = batching.Budget(limit, self.layout, None, rows)
            choice = self._tried(checkpointing, budget, f"{rows} of the longest example")
            steps = train.gradient_accumulation_steps
            if steps != "auto" and len(choice.cuts[0]) > steps:
                raise ConfigError(
                    f"train.max_tokens: {limit:,} tokens do not hold {rows} examples, as "
                    f"train.gradient_accumulation_steps={steps} needs: raise it, or leave one of "
                    "the two at auto"
                )
            return choice
        if train.max_tokens != "auto":
            return self._tried(checkpointing, self._budget(train.max_tokens), "configured")
        saturates = max(longest, self.saturating)
        why = "the longest example" if longest == saturates else "more is no faster on this device"
        high = self._tried(checkpointing, self._budget(saturates), why)
        if high.fits or longest == saturates:
            return high
        low = self._tried(checkpointing, self._budget(longest), "the longest example")
        if not low.fits:
            return low
        for _ in range(4):  # memory is convex in tokens: what lies between two, takes no more
            less, more = low.memory.reserved, high.memory.reserved
            share = min(0.98, (self.room - less) / (more - less))
            tokens = int(low.tokens + share * (high.tokens - low.tokens))
            if tokens <= 1.02 * low.tokens:
                break
            tried = self._tried(checkpointing, self._budget(tokens), "what fits the memory")
            low, high = (tried, high) if tried.fits else (low, tried)
        return low

    def _budget(self, max_tokens: int) -> batching.Budget:
        cost = MICRO_BATCH_COST[self.kind]
        agents = self.traits.agents
        return batching.Budget(max_tokens, self.layout, cost and max(1, cost // agents))

    @property
    def saturating(self) -> int:
        """Tokens of the data that make a micro-batch as large as is of use."""
        tokens = OF_SMALL if self.traits.small else SATURATING_TOKENS
        return tokens[self.kind] // self.traits.agents

    @property
    def room(self) -> float:
        return self.available_bytes * (1 - MARGIN[self.kind]) - self.context_bytes

    def _tried(self, checkpointing: bool, budget: batching.Budget, why: str) -> _Choice:
        config = with_values(self.config, {"train.gradient_checkpointing": checkpointing})
        cuts = batching.cut(self.first, self.work.lengths, self.world_size, budget)
        window = self.window(budget, checkpointing)
        taken = self.predicted(window, config, len(cuts[0]))
        fits = taken.reserved <= self.room
        return _Choice(checkpointing, budget, cuts, window.tokens, taken, fits, why)

    def predicted(self, window: Window, config: AnyConfig, micro_batches: int) -> Memory:
        """`micro_batches`: of each process in a step."""
        on_gpu, group = self.kind == "cuda", self._group(micro_batches > 1)
        window = replace(window, waiting=(micro_batches - 1) * window.tokens)
        return memory.predict(config, self.precision, window, on_gpu=on_gpu, group=group)

    def _group(self, accumulates: bool) -> memory.Group:
        train = self.config.train
        zero = {}
        if train.engine == "deepspeed":
            zero = processes.deepspeed_settings(train)["zero_optimization"]
        return memory.Group(self.world_size, train.engine, accumulates, zero)

    def window(self, budget: batching.Budget, checkpointing: bool) -> Window:
        """The heaviest micro-batch; among several, it has gradients from the start."""
        chosen, accumulates = self.heaviest(budget, checkpointing)
        return Window((self.work.rows(chosen),), budget.layout, accumulates)

    def heaviest(
        self, budget: batching.Budget, checkpointing: bool
    ) -> tuple[batching.MicroBatch, bool]:
        """(the micro-batch of the run that takes the most memory, whether there are several in a
        step or several processes).

        Of long runs it is looked for in the first SCANNED examples, and among micro-batches of the
        longest ones.
        """
        if budget not in self.scanned:
            self.scanned[budget] = self._micro_batches(budget)
        micro_batches, several = self.scanned[budget]
        chosen = self._heaviest(self.work, micro_batches, not checkpointing)
        return chosen, several or self.world_size > 1

    def _micro_batches(self, budget: batching.Budget) -> tuple[list[batching.MicroBatch], bool]:
        """(those of the run that may be the heaviest, whether a step has several)."""
        lengths, world = self.work.lengths, self.world_size
        steps = engine.total_steps(self.config.train, len(lengths))
        looked_at = min(steps, max(1, SCANNED // self.config.train.global_batch))
        several, result = False, list[batching.MicroBatch]()
        for step in range(looked_at):
            cuts = batching.cut(self._ids(step), lengths, world, budget)
            several |= len(cuts[0]) > 1
            result += [m for rank in cuts for m in rank if m]
        if steps > looked_at:
            share = min(math.ceil(len(self.first) / world), len(lengths))
            order = np.argpartition(-np.asarray(lengths), share - 1)[:share]
            result += batching.cut(order.tolist(), lengths, 1, budget)[0]
        return result, several

    def _heaviest(
        self, work: Work, micro_batches: list[batching.MicroBatch], keeps_layers: bool
    ) -> batching.MicroBatch:
        arch = self.traits.text
        per_token = arch.hidden_size * memory.ACTIVATION_BYTES[self.precision]
        per_token *= arch.num_hidden_layers if keeps_layers else 1

        def weight(micro_batch: batching.MicroBatch) -> float:
            tokens = batching.num_tokens(work.lengths, micro_batch, self.layout)
            learnt = int(work.supervised[micro_batch].sum())
            return tokens * per_token + learnt * arch.vocab_size * 12

        return max(micro_batches, key=weight)

    def evaluation(self, budget: batching.Budget) -> Memory | None:
        """The peak of the held-out loss."""
        work = self.work.held_out
        if work is None:
            return None
        ranks = batching.cut(range(len(work.lengths)), work.lengths, self.world_size, budget)
        chosen = self._heaviest(work, [m for rank in ranks for m in rank if m], False)
        window = Window((work.rows(chosen),), budget.layout, gradients=True)
        config = with_values(self.config, {"train.gradient_checkpointing": False})
        kind: Any = {"on_gpu": self.kind == "cuda", "evaluation": True, "group": self._group(False)}
        return memory.predict(config, self.precision, window, **kind)

    def answering(self, evaluation: Memory) -> int:
        """Bytes while what was learnt is tried: held-out prompts are answered; 0 if none are."""
        work = self.work.held_out
        if work is None:
            return 0
        prompts = (np.asarray(work.lengths) - work.supervised).tolist()
        taken = answering_bytes(self.config, self.precision, prompts, self.world_size)
        passing = ("activations", "logits and loss", "dequantisation")
        kept = sum(v for k, v in evaluation.breakdown.items() if k not in passing)
        return kept + taken if taken else 0

    def seconds(self, counts: memory.Counts, checkpointing: bool, tokens: int) -> float | None:
        """For so many tokens: weights times tokens, at an assumed share of the GPU's peak."""
        gpu = hardware.gpu_of(self.machine.devices[0].name) if self.machine.devices else None
        if gpu is None or self.precision != "bf16" or self.traits.small:
            return None
        agents = self.traits.agents
        passes = (3 if self.traits.mode == "full" else 2) + checkpointing + self.traits.surveys
        speed = gpu.teraflops * 1e12 * UTILISATION * self.world_size
        multiplied = counts.multiplied
        if agents > 1:  # each agent's adapter sees its own rows
            multiplied = agents * (multiplied - counts.trained) + counts.trained
        return 2 * passes * multiplied * tokens / speed


def rows_asked(train: Train, world_size: int) -> int | None:
    """Examples of a micro-batch, where the configuration says so."""
    rows, steps = train.micro_batch, train.gradient_accumulation_steps
    if steps == "auto":
        return None if rows == "auto" else rows
    batch, makes = train.global_batch, world_size * steps
    expected = max(1, batch // makes) if rows == "auto" else rows
    if expected * makes != batch:
        raise ConfigError(
            f"train.global_batch: {world_size} process(es) with {steps} micro-batches of "
            f"{expected} make {expected * makes} examples, not {batch}: change one of "
            "train.global_batch, train.micro_batch, train.gradient_accumulation_steps, or "
            "leave the last two at auto"
        )
    return expected


def replanned(
    plan: Plan, config: AnyConfig, data: Prepared | Work, machine: Hardware, budget: batching.Budget
) -> Plan:
    """The plan with another budget."""
    changes = {"train.gradient_checkpointing": plan.gradient_checkpointing, **of_budget(budget)}
    made = make_plan(with_values(config, changes), data, machine, plan.world_size)
    return replace(made, budget=budget, reasons=plan.reasons)


def of_budget(budget: batching.Budget) -> dict[str, Any]:
    """Dotted configuration keys -> values that mean it."""
    values: dict[str, Any] = {
        "train.max_tokens": budget.max_tokens,
        "train.layout": budget.layout,
    }
    if budget.max_rows:
        values |= {"train.micro_batch": budget.max_rows}
        values |= {"train.gradient_accumulation_steps": "auto"}
    return values


def target(config: AnyConfig, data: Prepared | Work, machine: Hardware, plan: Plan) -> Target:
    """That which was planned."""
    work = data if isinstance(data, Work) else Work.of(data)
    return Target(config, work, machine, plan.world_size, plan.precision, plan.budget.layout)


def resolve_layout(config: AnyConfig, precision: str, on_gpu: bool) -> tuple[batching.Layout, str]:
    if config.train.layout != "auto":
        return config.train.layout, "configured"
    asked = traits(config).attention
    if attention.needs_no_mask(asked, precision, on_gpu):
        return "packed", "flash attention reads document borders without a mask"
    why = "rows of like lengths; packing would need a dense mask here"
    if asked == attention.NAME:
        why += f", where {asked} has no kernel: it has one on a GPU, in bf16"
    return "padded", why


# --- what else could be done -------------------------------------------------------------------


@dataclass(frozen=True)
class Advice:
    """A change of the configuration, and what it does to the step that was planned."""

    change: str  # as overrides
    price: str
    reserved_bytes: int
    saved_bytes: int
    fits: bool


def advice(config: AnyConfig, work: Work, machine: Hardware, plan: Plan) -> list[Advice]:
    """What would take less memory, with the same micro-batch, from the cheapest on."""
    planned = {"train.gradient_checkpointing": plan.gradient_checkpointing}
    config = with_values(config, planned)
    at = target(config, work, machine, plan)
    window = at.window(plan.budget, plan.gradient_checkpointing)
    result = []

    def consider(price: str, changes: dict[str, Any], window: Window = window) -> None:
        try:
            changed = with_values(config, changes)
        except ConfigError:  # what this configuration cannot be: random weights with adapters
            return
        taken = at.predicted(window, changed, plan.micro_batches)
        saved = plan.memory.reserved - taken.reserved
        if saved > 0:
            told = " ".join(f"{key}={str(value).lower()}" for key, value in changes.items())
            result.append(Advice(told, price, taken.reserved, saved, taken.reserved <= at.room))

    if not plan.gradient_checkpointing:
        price = "about 25 % slower, the same result"
        consider(price, {"train.gradient_checkpointing": True})
    if config.train.optimizer == "adamw":
        consider("moments in 8 bits", {"train.optimizer": "adamw_8bit"})
    if not isinstance(config, Config):
        return result
    if config.tuning.mode == "full":
        consider("adapters instead of all weights", {"tuning.mode": "lora"})
    if config.tuning.mode != "qlora":
        consider("frozen weights in 4 bits, slower", {"tuning.mode": "qlora"})
    half = max(8, max(work.lengths) // 2)
    shorter = tuple(
        tuple((min(n, half), min(s, half)) for n, s in rows) for rows in window.micro_batches
    )
    price = "longer rows are cut or left out (data.on_long)"
    consider(price, {"data.max_seq_len": half}, replace(window, micro_batches=shorter))
    return result


COMPARED = ("4090", "L40S", "A100-40GB", "A100-80GB", "H100-80GB", "H200")


def comparison(config: Config) -> list[dict[str, Any]]:
    """For each way of tuning, with and without checkpointing: the bytes that a micro-batch of one
    row of `data.max_seq_len` tokens takes, and how many rows each GPU of COMPARED holds."""
    work, result = Work.uniform(config), []
    length = work.lengths[0]

    def room_on(name: str) -> float:
        machine = replace(hardware.detect(), devices=hardware.named_gpus(name))
        return Target(config, work, machine, 1, "bf16", "padded").room

    for mode in ("full", "lora", "qlora"):
        for checkpointing in (False, True):
            changes = {"tuning.mode": mode, "train.gradient_checkpointing": checkpointing}
            changed = with_values(config, changes | {"model.init": "pretrained"})
            one, two = (
                memory.predict(changed, "bf16", _rows(number, length), on_gpu=True).reserved
                for number in (1, 2)
            )
            rows = {
                name: max(0, 1 + int((room_on(name) - one) // max(1, two - one)))
                for name in COMPARED
            }
            told = {"mode": mode, "gradient_checkpointing": checkpointing}
            result.append(told | {"reserved_bytes": one, "per_row_bytes": two - one, "rows": rows})
    return result


def _rows(number: int, length: int) -> Window:
    """A micro-batch of so many rows, with gradients from the start."""
    return replace(uniform(number, length, length), gradients=True)


# --- what people see ---------------------------------------------------------------------------


def table(plan: Plan) -> Table:
    words = plan.words
    cut = f"{plan.world_size} process{'es' if plan.world_size > 1 else ''} x {plan.micro_batches}"
    taken = plan.memory
    parts = ", ".join(
        f"{name} {size(part)}" for name, part in taken.breakdown.items() if part >= MIB
    )
    reserved = f" ({size(taken.reserved)} reserved)" if plan.context_bytes else ""
    past = f"; {plan.past.runs} earlier runs took {_span(plan.past)} of it" if plan.past else ""
    context = f", context {size(plan.context_bytes)} (assumed)" if plan.context_bytes else ""
    rows: list[tuple[str, str | Text]] = [
        (
            words.examples,
            f"{plan.num_examples:,}{words.each} to train on, {plan.num_held_out:,} held out",
        ),
        (
            "tokens",
            f"{plan.tokens_per_epoch:,} per epoch ({plan.supervised_share:.0%} {words.items}), "
            f"{plan.tokens:,} in all",
        ),
        ("steps", f"{plan.steps:,} of {plan.global_batch} {words.examples}"),
        (
            "batch",
            f"{cut} micro-batch(es) of at most {plan.budget.max_tokens:,} tokens, "
            f"{plan.budget.layout}",
        ),
        ("trained", f"{plan.num_trained:,} of {plan.num_parameters:,} parameters"),
        (
            "memory",
            f"{size(taken.allocated)}{reserved} of {size(plan.available_bytes)} per process: "
            f"{parts}{context} ({taken.method}{past})",
        ),
        ("disk", f"{plan.disk}"),
    ]
    if plan.evaluation_bytes:
        told = f"{size(plan.evaluation_bytes)} for the held-out loss"
        told += f", {size(plan.generation_bytes)} for {words.answers}"
        rows.append(("evaluation", told))
    if plan.seconds is not None:
        rows.append(("time", _time(plan)))
    values = chosen(plan)
    rows += [
        ("auto", f"{key}={values[key.removeprefix('train.')]}: {why}")
        for key, why in plan.reasons.items()
    ]
    rows += [("warning", Text(text, "red")) for text in plan.warnings]
    return facts("Plan", rows)


def _time(plan: Plan) -> str:
    assert plan.seconds is not None
    if plan.seconds < LAUNCHES * plan.steps * plan.micro_batches:
        return "that of launching kernels, so small are the micro-batches: tried before step 1"
    return f"about {duration(plan.seconds)}, if {UTILISATION:.0%} of the GPU's peak is reached"


def _span(past: Past) -> str:
    return f"{100 * (1 + past.least):.1f} to {100 * (1 + past.most):.1f} %"


def memory_table(plan: Plan) -> Table:
    """What the peak is made of, with a bar for each part."""
    title = f"Peak memory: {plan.device}"
    result = Table(title=title, title_justify="left", box=None, show_header=False)
    result.add_column(no_wrap=True, style="cyan")
    result.add_column(justify="right", no_wrap=True)
    result.add_column(no_wrap=True)
    taken = plan.memory
    lines = dict(taken.breakdown)
    if plan.context_bytes:
        lines["reserved, not allocated"] = taken.reserved - taken.allocated
        lines["context (assumed)"] = plan.context_bytes
    in_all = sum(lines.values())
    for name, part in lines.items():
        share = part / in_all
        result.add_row(name, size(part), f"{'█' * round(40 * share)} {share:.0%}")
    share = in_all / plan.available_bytes
    told = Text(f"{share:.0%} of {size(plan.available_bytes)}", "red" if share > 1 else "bold")
    result.add_row("in all", size(in_all), told)
    return result


def advice_table(found: list[Advice]) -> Table:
    result = Table(title="What would take less", title_justify="left", box=None)
    for column in ("change", "saves", "then", "at the price of"):
        result.add_column(column, justify="right" if column == "saves" else "left", overflow="fold")
    for each in found:
        fits = "fits" if each.fits else "does not fit"
        row = (each.change, size(each.saved_bytes), fits, each.price)
        result.add_row(*row, style="" if each.fits else "dim")
    return result


def comparison_table(found: list[dict[str, Any]], length: int) -> Table:
    title = f"Rows of {length:,} tokens, all learnt, that one micro-batch can have (-: none fits)"
    result = Table(title=title, title_justify="left", box=None)
    for column in ("tuning", "one row", "one more", *COMPARED):
        justify: Any = "left" if column == "tuning" else "right"
        result.add_column(column, justify=justify, no_wrap=True)
    for each in found:
        sizes = (size(each[key]) for key in ("reserved_bytes", "per_row_bytes"))
        cells = (Text(f"{n:,}", "green") if n else Text("-", "red") for n in each["rows"].values())
        mode = each["mode"] + (" + ckpt" if each["gradient_checkpointing"] else "")
        result.add_row(mode, *sizes, *cells)
    result.caption = "ckpt: train.gradient_checkpointing=true"
    return result


def chosen(plan: Plan) -> dict[str, Any]:
    """The values of `train` that `auto` becomes, `auto` or not."""
    return {
        "precision": plan.precision,
        "layout": plan.budget.layout,
        "gradient_checkpointing": plan.gradient_checkpointing,
        "max_tokens": plan.budget.max_tokens,
        "micro_batch": plan.micro_batch,
        "gradient_accumulation_steps": plan.micro_batches,
    }


def report(plan: Plan, found: Sequence[Advice] = ()) -> dict[str, Any]:
    """What plan.json holds before the run (docs/RUNS.md)."""
    taken = plan.memory
    return {
        "predicted": {
            "allocated_bytes": taken.allocated,
            "reserved_bytes": taken.reserved,
            "context_bytes": plan.context_bytes,
            "breakdown": taken.breakdown,
            "method": taken.method,
            "past": plan.past and asdict(plan.past),
            "missing_bytes": plan.missing_bytes,
            "evaluation_bytes": plan.evaluation_bytes,
            "generation_bytes": plan.generation_bytes,
            "checkpoint_bytes": plan.disk.checkpoint,
            "disk_bytes": plan.disk.total,
            "seconds": plan.seconds,
        },
        "chosen": chosen(plan),
        "reasons": {key.removeprefix("train."): why for key, why in plan.reasons.items()},
        "device": {"name": plan.device, "available_bytes": plan.available_bytes},
        "work": {
            "num_examples": plan.num_examples,
            "num_held_out": plan.num_held_out,
            "tokens_per_epoch": plan.tokens_per_epoch,
            "supervised_share": plan.supervised_share,
            "steps": plan.steps,
            "tokens": plan.tokens,
            "global_batch": plan.global_batch,
            "world_size": plan.world_size,
            "num_parameters": plan.num_parameters,
            "num_trained": plan.num_trained,
        },
        "advice": [asdict(each) for each in found],
        "warnings": plan.warnings,
    }


def write(plan: Plan, path: Path, measured: dict[str, Any] | None = None) -> None:
    """plan.json: the plan, and what was measured once the run is over."""
    write_json(path, report(plan) | {"measured": measured})


# --- in a run ----------------------------------------------------------------------------------


def make_together(
    config: AnyConfig, data: Prepared | Work, machine: Hardware, accelerator: Accelerator
) -> Plan:
    """One plan for all ranks, that of the one with the least memory: cut differently by each, the
    global batch would not be whole. Collective."""
    made = make_plan(config, data, machine, accelerator.num_processes)
    if accelerator.num_processes == 1:
        return made
    return min(gather_object([made]), key=lambda each: each.available_bytes)


def confirm_on(
    engine: Engine, planned: Plan, resolved: AnyConfig, data: Prepared | Work, machine: Hardware
) -> tuple[Plan, dict[str, Any]]:
    """The plan with a budget that the device holds, which the engine has from then on, and what of
    it was measured. Collective."""
    train = resolved.train
    if train.engine != "ddp" or (planned.world_size > 1 and not machine.devices):
        return planned, {}  # what other engines and the buckets of DDP hold is not seen
    at = target(resolved, data, machine, planned)

    def heaviest(budget: batching.Budget) -> list[batching.MicroBatch]:
        chosen, accumulates = at.heaviest(budget, planned.gradient_checkpointing)
        return [chosen] * (2 if accumulates else 1)

    state = planned.memory.breakdown["optimizer"]
    budget, peak = confirm.fitting(engine, planned.budget, heaviest, state)
    if budget != planned.budget:
        planned = replanned(planned, resolved, data, machine, budget)
        engine.budget = engine.task.budget = budget
        with_budget(resolved, planned, engine.log)
    predicted = planned.memory.allocated
    told = f"{size(peak)} measured, {size(predicted)} predicted"
    engine.log.say(f"memory of the heaviest micro-batch: {told}")
    if engine.accelerator.is_main_process:
        confirm.remember(at.traits.cache, planned.device, predicted, peak)
    return planned, {"heaviest_micro_batch_bytes": peak}


def with_budget(resolved: Configured, planned: Plan, log: Log) -> Configured:
    """The resolved configuration with the plan's budget; both are written again."""
    resolved = with_values(resolved, of_budget(planned.budget))
    if log.folder:
        keep(resolved, planned, log.folder)
    return resolved


def keep(resolved: AnyConfig, planned: Plan, folder: Path) -> None:
    """config.yaml and plan.json of a run folder."""
    (folder / "config.yaml").write_text(dump_config(resolved, planned.reasons), "utf-8")
    write(planned, folder / "plan.json")
