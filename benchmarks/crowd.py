"""A crowd of four agents: its speed, the speed of its answers, and what it is worth.

    PYTHONPATH=. python benchmarks/crowd.py [--parts speed generation evidence fits] [--threads 2]
        [--shared ../shared] [--work outputs/crowd_benchmark]

speed       Seconds of an optimizer step of the same global batch: of the crowd; of K passes of a
            PEFT model that switches between K adapters, with this repository's head (logits of
            supervised positions only) and plain, as trainers call it (the same weights and loss;
            gradients are compared); of one adapter with K times the batch. In turns; medians.
            `cut`: crowd over one adapter in micro-batches as a plan cuts on a CPU, which costs the
            crowd a survey; all else is one micro-batch.
generation  Seconds for N tokens of the mixture, with the cache and, as the published system does
            it, without one, where all that is written is read again for each token.
evidence    Arms trained on the embedded task and on GSM8K with stories260K (../shared), three seeds
            each, and what they say of held-out rows. An arm that has been trained is a line of
            evidence.jsonl in --work, so a run that was killed goes on. The rows that `learned` is
            fitted on are kept from training in every arm, so all see the same.
fits        Weights of `learned`, fitted repeatedly to few answers of four agents whose worth is
            known: how often an equally good one gets under 2 %, and what the fit costs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel
from rich.table import Table
from torch import Tensor, nn

from sft.cli import prepare_libraries
from sft.config.load import load_config, with_values
from sft.config.schema import Config, Crowd, Generation
from sft.data import batches, cache
from sft.data.cache import Prepared
from sft.data.examples import Batch, Examples
from sft.data.template import IGNORED
from sft.evaluate import generate
from sft.models import load
from sft.plan.choose import SATURATING_TOKENS
from sft.runtime import hardware
from sft.runtime.console import make_console, table, write_json
from sft.runtime.processes import Context, start_processes
from sft.tasks.crowd import agents
from sft.tasks.crowd.aggregator import (
    Aggregator,
    Mixture,
    _fit_mean,
    _scaled_likelihoods,
    _shrink,
    mix,
)
from sft.tasks.crowd.diversity import RepresentationReader, directions, disagreement, diversity
from sft.tasks.crowd.task import CrowdTune
from sft.tasks.registry import task_of
from sft.tasks.sft.task import FineTune
from sft.train.engine import Engine
from sft.train.optimizer import build_optimizer

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/crowd.json"
PARTS = ("speed", "generation", "evidence", "fits")
AGENTS = 4
WHOLE = batches.Budget(2**20, "padded")  # a global batch in one micro-batch


def configuration(work: Path, *overrides: str) -> Config:
    """The crowd that `make train-crowd` trains, with what a benchmark changes."""
    common = ["train.precision=fp32", f"train.output_dir={work / 'run'}", f"data.cache_dir={work}"]
    return load_config(ROOT / "configs/crowd_nano.yaml", [*common, *overrides])


def engine_of(config: Config, prepared: Prepared, budget: batches.Budget) -> Engine:
    context = Context(start_processes(config.train))
    task = task_of(config).build(config, prepared, "fp32", budget, context)
    return Engine(task, config.train, context)


def first(examples: Examples, number: int) -> Examples:
    return examples.select(np.arange(len(examples)) < number)


def seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


# --- speed ---------------------------------------------------------------------------------------

BATCHES = (2, 8, 32)  # examples of a global batch
REPEATS = 3
ALONE = {f"crowd.{key}": value for key, value in Crowd().model_dump().items()}


def speed(work: Path) -> dict[str, Any]:
    rows = []
    for mode in ("lora", "qlora"):
        for batch in BATCHES:
            for strength in (0.1, 0.0):
                rows.append(steps_of(work, mode, batch, strength))
    return {"agents": AGENTS, "rows": rows}


def steps_of(work: Path, mode: str, batch: int, strength: float) -> dict[str, Any]:
    """Seconds of a step, each way, in turns; the engine's also cut as plans cut on a CPU."""
    config = configuration(
        work,
        f"tuning.mode={mode}",
        f"crowd.lambda_sw={strength}",
        "crowd.aggregator=uniform",
        f"train.global_batch={batch}",
    )
    alone = with_values(config, ALONE | {"train.global_batch": AGENTS * batch})
    prepared = cache.prepare(config)
    crowd = engine_of(config, same_batch(prepared, batch, 1), WHOLE)
    one = engine_of(alone, same_batch(prepared, batch, AGENTS), WHOLE)
    for name, weight in crowd.task.model.named_parameters():
        if "lora_B" in name:  # agents that differ: it is 0 at first
            nn.init.normal_(weight, std=0.02)
    passes = Passes(crowd, config, alone, work)
    differences = passes.difference(False), passes.difference(True)
    most = SATURATING_TOKENS["cpu"]
    ways: dict[str, Callable[[], Any]] = {
        "crowd": lambda: step(crowd, WHOLE),
        "passes": passes.step,
        "plain": partial(passes.step, plain=True),
        "one": lambda: step(one, WHOLE),
        "crowd_cut": lambda: step(crowd, batches.Budget(most // AGENTS, "padded")),
        "one_cut": lambda: step(one, batches.Budget(most, "padded")),
    }
    turns = [{name: seconds(way) for name, way in ways.items()} for _ in range(REPEATS + 1)][1:]

    def ratio(above: str, below: str) -> float:
        return statistics.median(turn[above] / turn[below] for turn in turns)

    return {
        "mode": mode,
        "batch": batch,
        "lambda_sw": strength,
        "relative_difference": dict(zip(("passes", "plain"), differences, strict=True)),
        "seconds": turns,
        "passes_over_crowd": ratio("passes", "crowd"),
        "plain_over_crowd": ratio("plain", "crowd"),
        "crowd_over_one": ratio("crowd", "one"),
        "cut_over_one_cut": ratio("crowd_cut", "one_cut"),
    }


def step(engine: Engine, budget: batches.Budget) -> None:
    engine.task.budget = budget
    engine.optimizer_step()


def same_batch(prepared: Prepared, rows: int, times: int) -> Prepared:
    """Data that are one global batch: the same examples, each so many times."""
    few = first(prepared.train, rows)
    lengths = np.tile(np.asarray(few.lengths), times)
    return replace(prepared, train=Examples(few.arrays, np.tile(few.order, times), lengths))


class Passes:
    """A PEFT model with K adapters, those of a crowd, which takes a step in K passes."""

    def __init__(self, crowd: Engine, config: Config, alone: Config, work: Path):
        self.crowd, self.train, self.strength = crowd, config.train, config.crowd.lambda_sw
        base: Any = load.load_base(config.model, config.tuning.mode, "fp32", torch.device("cpu"))
        base.requires_grad_(False)
        with tempfile.TemporaryDirectory(dir=work) as folder:
            crowd.task.model.save_pretrained(folder, dict(crowd.task.model.named_parameters()))
            names = [f"agent{agent}" for agent in range(AGENTS)]
            self.model = PeftModel.from_pretrained(base, f"{folder}/agent0", "agent0", True)
            for name in names[1:]:
                self.model.load_adapter(f"{folder}/{name}", name, is_trainable=True)
        self.weights = [p for name, p in self.model.named_parameters() if "lora_" in name]
        self._require_all()
        self.optimizer = build_optimizer(config.train, self.model)
        context = Context(crowd.accelerator)
        self.task = FineTune(alone, crowd.task.prepared, self.model, WHOLE, context)
        self.reader = RepresentationReader(self.model, self.task.head, Crowd(num_agents=1))

    def _require_all(self) -> None:
        """set_adapter takes it from the others, and a backward pass then leaves them out."""
        for weight in self.weights:
            weight.requires_grad_(True)

    def backward(self, plain: bool) -> float:
        """The crowd's loss; its gradients are left. `plain`: the model computes its loss from
        labels and a mask, as trainers call it, and so the logits of prompts, too."""
        batch = self.task.collate(self.crowd.window(0)[0])
        total, points = torch.zeros(()), []
        for agent in range(AGENTS):
            self.model.set_adapter(f"agent{agent}")
            loss, logits = self._plain(batch) if plain else self._supervised(batch)
            if self.strength:
                points.append(self.reader.read_points(logits, batch)[:, 0])
                total = total + loss / AGENTS
            else:
                (loss / AGENTS).backward()
                total += loss.detach() / AGENTS
        if self.strength:
            self._require_all()
            onto = directions(64, points[0].shape[-1], self.crowd.task.seed)
            total = total - self.strength * diversity(torch.stack(points), onto)
            total.backward()
        return total.item()

    def _supervised(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss, and logits (1, supervised, vocabulary)."""
        logits = self.task.logits(self.model, batch, batch.positions)
        return F.cross_entropy(logits, batch.targets), logits[None]

    def _plain(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The same, by the model itself."""
        labels = torch.full_like(batch.input_ids, IGNORED)
        labels.view(-1)[batch.positions + 1] = batch.targets
        lengths = torch.tensor([self.task.lengths[i] for i in batch.examples])
        mask = torch.arange(labels.shape[1]) < lengths[:, None]
        head, states = self.model.get_output_embeddings(), list[Tensor]()
        handle = head.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
        output = self.model(input_ids=batch.input_ids, attention_mask=mask, labels=labels)
        handle.remove()
        self.reader.states = states[0].flatten(0, 1)[batch.positions]
        return output.loss, output.logits.flatten(0, 1)[batch.positions][None]

    def step(self, plain: bool = False) -> None:
        self.optimizer.zero_grad()
        self.backward(plain)
        torch.nn.utils.clip_grad_norm_(self.weights, self.train.max_grad_norm)
        self.optimizer.step()

    def difference(self, plain: bool) -> dict[str, float]:
        """From the crowd's own loss and gradients, relative."""
        task, built = self.crowd.task, self.crowd.task.model
        batch = task.collate(self.crowd.window(0)[0])
        task.set_global_batch([], None, 0.0)
        loss = task.loss(built, batch)[0] / task.num_supervised(batch)
        built.zero_grad()
        loss.backward()
        found = {n: p.grad for n, p in built.named_parameters() if p.grad is not None}
        self.optimizer.zero_grad()
        passes = self.backward(plain)
        own = {name: p.grad for name, p in self.model.named_parameters()}
        apart = whole = 0.0
        for name, gradient in found.items():
            for agent, theirs in enumerate(gradient):
                place = agents.peft_name(name).removesuffix("weight") + f"agent{agent}.weight"
                apart += float((own[place] - theirs).double().pow(2).sum())
                whole += float(theirs.double().pow(2).sum())
        return {
            "loss": abs(passes - loss.item()) / abs(loss.item()),
            "gradient": (apart / whole) ** 0.5,
        }


def show_speed(found: dict[str, Any]) -> None:
    table = Table(title="Milliseconds of an optimizer step", title_justify="left", box=None)
    table.add_column("mode", no_wrap=True)
    columns = ("batch", "lambda", "crowd", "K passes", "x", "plain", "x", "one", "x", "cut: x")
    for column in (*columns, "differ"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in found["rows"]:
        cells = [row["mode"], str(row["batch"]), str(row["lambda_sw"]), _middle(row, "crowd")]
        for way in ("passes", "plain"):
            cells += [_middle(row, way), f"{row[f'{way}_over_crowd']:.2f}"]
        cells += [_middle(row, "one"), f"{row['crowd_over_one']:.2f}"]
        apart = max(each["gradient"] for each in row["relative_difference"].values())
        table.add_row(*cells, f"{row['cut_over_one_cut']:.2f}", f"{apart:.0e}")
    make_console().print(table)


def _middle(row: dict[str, Any], way: str) -> str:
    return f"{1000 * statistics.median(turn[way] for turn in row['seconds']):.0f}"


# --- generation ----------------------------------------------------------------------------------

LENGTHS = (32, 64, 128, 256)  # new tokens
PROMPTS = 4


def generation(work: Path) -> dict[str, Any]:
    """Cumulative seconds after so many tokens, of one answer of `LENGTHS[-1]` to each prompt."""
    config = configuration(work, "crowd.aggregator=uniform")
    prepared = cache.prepare(config)
    built = CrowdTune.build_model(config, "fp32", torch.device("cpu"))
    torch.manual_seed(0)
    for name, weight in built.named_parameters():
        if "lora_B" in name:  # agents that differ: it is 0 at first
            nn.init.normal_(weight, std=0.02)
    mixture = Mixture(built, Aggregator("uniform", (1.0,) * AGENTS)).eval()
    prompts = [first(prepared.train, PROMPTS)[i].ids[:40] for i in range(PROMPTS)]
    ways = {"cached": cached, "read_again": read_again}
    turns = [{name: way(mixture, prompts) for name, way in ways.items()} for _ in range(3)][1:]
    rows = []
    for length in LENGTHS:
        row: dict[str, Any] = {"tokens": length}
        for name in ways:
            took = statistics.median(turn[name][0][length - 1] for turn in turns)
            row |= {name: took, f"{name}_per_token": took / length}
        rows.append(row)
    answers = [turn[name][1] for turn in turns for name in ways]
    unlike = sum(a != b for a, b in zip(answers[0], answers[1], strict=True))
    return {"agents": AGENTS, "prompts": PROMPTS, "unlike_answers": unlike, "rows": rows}


Timed = tuple[list[float], list[list[int]]]  # seconds until each token, the answers


def cached(mixture: Mixture, prompts: list[list[int]]) -> Timed:
    started, times = time.perf_counter(), list[float]()
    decoder = generate.Decoder(mixture, [], Generation(max_new_tokens=LENGTHS[-1]))
    found = decoder.decode(
        prompts,
        seeds=range(len(prompts)),
        on_tokens=lambda _: times.append(time.perf_counter() - started),
    )
    return times, [answer.ids for answer in found]


@torch.no_grad()
def read_again(mixture: Mixture, prompts: list[list[int]]) -> Timed:
    """The prompts are of one length, so nothing is padded."""
    started, times = time.perf_counter(), list[float]()
    ids = torch.tensor(prompts)
    for _ in range(LENGTHS[-1]):
        logits = mixture(ids, use_cache=False, logits_to_keep=1).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        times.append(time.perf_counter() - started)
    return times, ids[:, len(prompts[0]) :].tolist()


def show_generation(found: dict[str, Any]) -> None:
    title = f"{found['prompts']} answers of a mixture of {found['agents']} agents"
    table = Table(title=title, title_justify="left", box=None)
    for column in ("tokens", "seconds", "ms a token", "without a cache", "ms a token", "x"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in found["rows"]:
        cells = [str(row["tokens"])]
        for way in ("cached", "read_again"):
            cells += [f"{row[way]:.2f}", f"{1000 * row[f'{way}_per_token']:.1f}"]
        table.add_row(*cells, f"{row['read_again'] / row['cached']:.1f}")
    console = make_console()
    console.print(table)
    console.print(f"answers that differ: {found['unlike_answers']} of {found['prompts']}")


# --- evidence ------------------------------------------------------------------------------------

SEEDS = (0, 1, 2)
ARMS: dict[str, tuple[str, ...]] = {  # overrides; alpha is twice the rank in all
    "one adapter": ("crowd.num_agents=1",),
    "one adapter, 4 x rank": ("crowd.num_agents=1", "tuning.r=32", "tuning.lora_alpha=64"),
    "4 agents": ("crowd.lambda_sw=0",),
    "diversity 0.01": ("crowd.lambda_sw=0.01",),
    "diversity 0.1": ("crowd.lambda_sw=0.1",),
    "diversity 1": ("crowd.lambda_sw=1",),
    "diversity 0.1, raw": ("crowd.lambda_sw=0.1", "crowd.normalise=false"),
}
STEPS = {"embedded": 80, "GSM8K": 40}
SCORED = 128  # held-out rows
BINS = 15  # of confidence, as in Guo et al. 2017


def tasks(shared: Path) -> dict[str, tuple[str, ...]]:
    """Overrides of each. Of GSM8K only rows of few tokens, and no answers: a model of 260K
    parameters calculates nothing, so all exact matches would be 0."""
    instruct = shared / "data/instruct"
    both = ("tuning.mode=lora", "crowd.aggregator=learned")
    embedded = ("data.max_rows=2500", "train.global_batch=16")
    asked = ("evaluation.num_examples=100", "evaluation.batch_size=16")
    gsm8k = (
        f"model.name={shared / 'models/stories260K'}",
        f"data.train_path={instruct / 'gsm8k_train.jsonl'}",
        f"data.eval_path={instruct / 'gsm8k_test.jsonl'}",
        "data.max_rows=2000",
        "data.on_long=drop",
        "train.global_batch=8",
        "evaluation.num_examples=0",
    )
    return {"embedded": (*both, *embedded, *asked), "GSM8K": (*both, *gsm8k)}


def evidence(shared: Path, work: Path) -> dict[str, Any]:
    """Trains what is not in evidence.jsonl yet."""
    path = work / "evidence.jsonl"
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    runs = [json.loads(line) for line in lines]
    done = {(run["task"], run["arm"], run["seed"]) for run in runs}
    for job in jobs():
        if job in done:
            continue
        task, arm, seed = job
        of_run = (f"train.seed={seed}", f"train.max_steps={STEPS[task]}")
        config = configuration(work, *tasks(shared)[task], *ARMS[arm], *of_run)
        # The gradients of K agents are 1 / K of an adapter's each, so 1 / sqrt(K) of its norm.
        clip = config.train.max_grad_norm / config.crowd.num_agents**0.5
        found = trained(with_values(config, {"train.max_grad_norm": clip}), work)
        runs.append({"task": task, "arm": arm, "seed": seed, **found})
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(runs[-1]) + "\n")
    return {"settings": tasks(Path("../shared")), "summary": summary(runs), "runs": runs}


def jobs() -> list[tuple[str, str, int]]:
    """(task, arm, seed), a seed at a time."""
    return [(task, arm, seed) for seed in SEEDS for task in STEPS for arm in ARMS]


def trained(config: Config, work: Path) -> dict[str, Any]:
    """One arm: trained, then scored with each aggregator."""
    crowd = config.crowd
    quickest = batches.Budget(SATURATING_TOKENS["cpu"] // crowd.num_agents, "padded")
    budget = WHOLE if crowd.lambda_sw and crowd.num_agents > 1 else quickest
    engine = engine_of(config, cache.prepare(config), budget)
    task = engine.task
    assert isinstance(task, CrowdTune)
    started = time.process_time()
    for number in range(engine.total_steps):
        engine.step = number
        values = engine.optimizer_step()
    spent = time.process_time() - started
    task.finish(engine.model)
    log_probs, targets, points = held_out(task, engine.model)
    own = -log_probs.gather(-1, targets.expand(len(log_probs), -1)[..., None])
    onto = directions(task.settings.num_projections, points.shape[-1], 0)
    kinds = ("uniform", "learned") if len(log_probs) > 1 else ("uniform",)
    return {
        "cpu_seconds": spent,  # of one thread, whatever else runs on the machine
        "steps": engine.total_steps,
        "train_loss": values["train/cross_entropy"],
        "agent_loss": own.mean().item(),
        "agent_losses": own.mean((1, 2)).tolist(),
        "disagreement": disagreement(log_probs).mean().item(),
        "diversity": diversity(points, onto).item(),
        "aggregators": {
            kind: scored(task, engine.model, kind, log_probs, targets, work) for kind in kinds
        },
    }


def held_out(task: CrowdTune, built: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Of `SCORED` rows: log probabilities (agents, tokens, vocabulary), targets (tokens,), and
    representations (agents, rows, d)."""
    rows, found = first(task.prepared.held_out, SCORED), []
    reader = RepresentationReader(
        task.model, task.head, task.settings
    )  # an arm without diversity has none
    with generate.eval_mode(built):
        budget = batches.Budget(1024, "padded")
        for ids in batches.cut(range(len(rows)), rows.lengths, 1, budget)[0]:
            batch = task._collate(rows, ids)
            logits = task._forward(built, batch)
            points = reader.read_points(logits, batch).movedim(0, 1)
            found.append((logits.log_softmax(-1), batch.targets, points))
    log_probs, targets, points = zip(*found, strict=True)
    return torch.cat(log_probs, 1), torch.cat(targets), torch.cat(points, 1)


def scored(
    task: CrowdTune, built: nn.Module, kind: Any, log_probs: Tensor, targets: Tensor, work: Path
) -> dict[str, Any]:
    """Of the mixture that an aggregator makes of the agents."""
    task.model.aggregator = kind
    weights = task.aggregator.expected()
    mixed = mix(log_probs, weights.to(log_probs))
    confidence, chosen = mixed.exp().max(-1)
    result = {
        "weights": weights.tolist(),
        "loss": F.nll_loss(mixed, targets).item(),
        "token_accuracy": (chosen == targets).double().mean().item(),
        "ece": calibration_error(confidence, chosen == targets),
    }
    if task.config.evaluation.num_examples:
        with tempfile.TemporaryDirectory(dir=work) as folder:
            found = task.answer_held_out(built, Path(folder, "answers.jsonl"), kind)
        result["exact_match"] = found.tally.values()["exact_match"]
    return result


def calibration_error(confidence: Tensor, correct: Tensor) -> float:
    """Returns the expected calibration error of predictions [N] (Guo et al. 2017): the difference
    of accuracy and confidence in each of `BINS` bins (low, high], averaged over predictions."""
    edges = torch.linspace(0, 1, BINS + 1, dtype=torch.float64)[1:-1]
    gaps = torch.zeros(BINS, dtype=torch.float64)
    gaps.index_add_(
        0, torch.bucketize(confidence.double(), edges), confidence.double() - correct.double()
    )
    return float(gaps.abs().sum() / max(1, len(confidence)))


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds, per task, arm and aggregator."""
    result = []
    for task, arm in dict.fromkeys((run["task"], run["arm"]) for run in runs):
        own = [run for run in runs if (run["task"], run["arm"]) == (task, arm)]
        for kind in own[0]["aggregators"]:
            flat = [{**run, **run["aggregators"][kind]} for run in own]
            row: dict[str, Any] = {"task": task, "arm": arm, "aggregator": kind, "runs": len(own)}
            for key in NUMBERS:
                values = [run[key] for run in flat if key in run]
                row[key] = statistics.mean(values) if values else None
                row[f"{key}_deviation"] = statistics.stdev(values) if values[1:] else None
            result.append(row)
    return result


NUMBERS = (
    "loss",
    "agent_loss",
    "exact_match",
    "ece",
    "disagreement",
    "diversity",
    "cpu_seconds",
)


def show_evidence(found: dict[str, Any]) -> None:
    console = make_console()
    for task in dict.fromkeys(row["task"] for row in found["summary"]):
        table = Table(title=f"{task}: mean ± deviation", title_justify="left", box=None)
        table.add_column("arm", no_wrap=True)
        names = ("loss", "one agent", "exact match", "ECE", "disagree", "diversity", "s")
        for column in names:
            table.add_column(column, justify="right", no_wrap=True)
        for row in found["summary"]:
            if row["task"] == task:
                table.add_row(_label(row), *_cells(row))
        console.print(table)


def _label(row: dict[str, Any]) -> str:
    return row["arm"] + (", learned" if row["aggregator"] == "learned" else "")


def _cells(row: dict[str, Any]) -> list[str]:
    digits = {"exact_match": 2, "diversity": 2, "cpu_seconds": 0}
    cells = []
    for key in NUMBERS:
        value, deviation, places = row[key], row[f"{key}_deviation"], digits.get(key, 3)
        plain = "" if value is None else f"{value:.{places}f}"
        with_deviation = key not in ("disagreement", "diversity", "cpu_seconds")
        shown = deviation is not None and with_deviation
        cells.append(f"{plain}±{deviation:.{places}f}".replace("±0.", "±.") if shown else plain)
    return cells


# --- fits ----------------------------------------------------------------------------------------

FITS, TOKENS = 12, 12  # repetitions, and tokens of an answer
ROWS = (8, 30, 120)
KINDS = {  # what the agents differ by, in nats per token
    "equal": "each token's likelihood, by 0.25",
    "by answer": "each token's and each answer's likelihood, by 0.25",
    "one better": "as equal, and the first is better by 0.15",
}


def heard_by_agents(kind: str, rows: int, random: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Log likelihoods (agents, tokens) and the answer of each token."""
    common = random.normal(-1, 0.8, rows * TOKENS)
    heard = common + random.normal(0, 0.25, (AGENTS, rows * TOKENS))
    if kind == "by answer":
        heard += random.normal(0, 0.25, (AGENTS, rows)).repeat(TOKENS, 1)
    if kind == "one better":
        heard[0] += 0.15
    return torch.tensor(np.minimum(heard, -1e-3)), torch.arange(rows).repeat_interleave(TOKENS)


def fits() -> dict[str, Any]:
    found = []
    for kind in KINDS:
        many, _ = _scaled_likelihoods(*heard_by_agents(kind, 1500, np.random.default_rng(99)))

        def worth(weights: Tensor, many: Tensor = many) -> float:
            return float((many @ weights).log().mean())

        best = worth(_fit_mean(many))
        even = best - worth(torch.full((AGENTS,), 1 / AGENTS, dtype=torch.float64))
        for rows in ROWS:
            random, lowest, lost = np.random.default_rng(0), [], []
            for _ in range(FITS):
                scaled, numbers = _scaled_likelihoods(*heard_by_agents(kind, rows, random))
                likeliest = _fit_mean(scaled)
                pair = likeliest, _shrink(scaled, numbers, likeliest)
                lowest.append([float(weights.min()) < 0.02 for weights in pair])
                lost.append([best - worth(weights) for weights in pair])
            arms = zip(("likeliest", "shrunk"), np.sum(lowest, 0), np.mean(lost, 0), strict=True)
            own = {name: {"under_2_percent": int(n), "lost_nats": x} for name, n, x in arms}
            found.append({"kind": kind, "rows": rows, "even_lost_nats": even, **own})
    return {"kinds": KINDS, "fits": FITS, "tokens_per_answer": TOKENS, "rows": found}


def show_fits(found: dict[str, Any]) -> None:
    columns = ("agents", "rows", "even", "likeliest", "shrunk", "under 2 %: likeliest", "shrunk")
    lines = [
        (
            *(row["kind"], str(row["rows"]), f"{row['even_lost_nats']:.4f}"),
            *(f"{row[arm]['lost_nats']:.4f}" for arm in ("likeliest", "shrunk")),
            *(str(row[arm]["under_2_percent"]) for arm in ("likeliest", "shrunk")),
        )
        for row in found["rows"]
    ]
    title = f"Nats per token below the best weights, means of {found['fits']} fits"
    make_console().print(table(title, columns, lines, left=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs/crowd_benchmark")
    args = parser.parse_args()
    prepare_libraries()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    found = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    ways = {
        "speed": (lambda: speed(args.work), show_speed),
        "generation": (lambda: generation(args.work), show_generation),
        "evidence": (lambda: evidence(args.shared, args.work), show_evidence),
        "fits": (fits, show_fits),
    }
    for part in args.parts:
        measure, show = ways[part]
        machine = {"cpu": hardware.detect(args.work).cpu_name, "threads": args.threads}
        found[part] = {"machine": machine, **measure()}
        write_json(RESULTS, found)
        show(found[part])


if __name__ == "__main__":
    main()
