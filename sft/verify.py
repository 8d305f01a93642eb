"""Laws 1 and 2 tried on the user's own configuration, with its model made small.

The runs are whole ones: `scripts/train.py` in fresh processes, under torchrun where there are
several, judged by what they leave in their folders (docs/RUNS.md) and by nothing else. So every
engine is tried by the same code, and a fault of any part shows. To kill a run at a chosen point,
the same script is started with a hook on what the interpreter does to files (`die_at`).
"""

from __future__ import annotations

import copy
import json
import math
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from sft import attention, batching, checkpoint, hardware, model, plan, prepare, processes
from sft.config import (
    EPISODE,
    AnyConfig,
    Config,
    ConfigError,
    DistillConfig,
    UserError,
    dump_config,
    with_values,
)
from sft.distill import histories
from sft.log import Advance, bar, facts
from sft.model import shallow
from sft.tasks import traits

ROOT = Path(__file__).parent.parent
TRAIN = ROOT / "scripts/train.py"
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
LOSS, WEIGHTS = 1e-5, 1e-4  # relative deviation that another cut may cause
PATIENCE = 900  # seconds for one run


class VerificationError(UserError):
    """A law does not hold on this configuration, or could not be tried."""

    exit_code = 1


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
        return batching.steps_per_epoch(len(self.lengths), self.config.train.global_batch)

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
        given["train"]["precision"], _ = processes.resolve_precision(config.train)
        found = {path: given[path.split(".")[0]][path.split(".")[1]] for path in wanted}
        told += [(p, f"{wanted[p]} instead of {found[p]}") for p in wanted if found[p] != wanted[p]]
        values |= wanted
        if traits(config).attention == attention.NAME:
            had_by = f"of SDPA with a mask: {attention.NAME} has no kernel in fp32"
            told.append(("packed rows", had_by))
    shrunk, batch = with_values(config, values), made.batch
    lengths = sorted(made.lengths(shrunk), reverse=True)
    while batch > 1 and batching.steps_per_epoch(len(lengths), batch) < 3:
        batch -= 1
    per_epoch = batching.steps_per_epoch(len(lengths), batch)
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
    model.load_tokenizer(config.model).save_pretrained(place)
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
        values, told, smooth, batch, lambda small: prepare.prepare(small).train.lengths, among
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
    lengths = plan.Work.windows(settings).lengths
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
    whole = model.architecture(config.model)
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


# --- whole runs --------------------------------------------------------------------------------

Launch = Callable[[int, list[str]], str]  # (processes, script and arguments) -> what it printed


def fresh(world: int, command: list[str]) -> str:
    """Runs a script (or `-m module`) in `world` fresh processes, and returns when all are gone."""
    python = [sys.executable]
    if world > 1:
        python += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    environment.setdefault("OMP_NUM_THREADS", "1")  # runs share the cores, and the model is small
    with subprocess.Popen(
        [*python, *command],
        env=environment,
        stdout=subprocess.PIPE,  # which ends when the last process that may write to it has ended
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        try:
            return process.communicate(timeout=PATIENCE)[0]
        except subprocess.TimeoutExpired:
            for each in [*psutil.Process(process.pid).children(recursive=True), process]:
                each.kill()
            return process.communicate()[0] + f"\nerror: not ended after {PATIENCE} seconds"


@dataclass(frozen=True)
class Run:
    """A run folder, and how the run ended: `state` as in status.json."""

    folder: Path
    state: str
    reason: str

    @property
    def finished(self) -> bool:
        return self.state == "finished"


@dataclass(frozen=True)
class Trials:
    """Runs of a small configuration, each in a folder of its own."""

    small: Small
    launch: Launch = fresh
    advance: Advance = lambda *_: None  # is told of every run that has ended

    def run(self, name: str, world: int, *overrides: str, kill: str | None = None) -> Run:
        """One run by `world` processes; `kill`: see `die_at`."""
        folder, file = (self.small.folder / f"{name}{suffix}" for suffix in ("", ".yaml"))
        values = {"train.output_dir": str(folder), "train.num_processes": world}
        file.write_text(dump_config(with_values(self.small.config, values)), "utf-8")
        command = [str(TRAIN), "--config", str(file), *overrides]
        printed = self.launch(world, ["-m", "sft.verify", kill, *command] if kill else command)
        file.with_suffix(".log").write_text(printed, "utf-8")
        self.advance(1, name.replace("_", " "))
        return judged(folder, printed)


def judged(folder: Path, printed: str) -> Run:
    """How a run ended. Exit codes are not judged: those of launchers say little."""
    try:
        status = json.loads((folder / "status.json").read_text("utf-8"))
    except (OSError, ValueError):
        status = {}
    lines = [line for line in printed.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    reason = status.get("reason") or (errors or lines[-1:] or ["it printed nothing"])[0]
    refused = errors and status.get("exit_code", ConfigError.exit_code) == ConfigError.exit_code
    return Run(folder, "refused" if refused else status.get("state", "failed"), reason)


def die_at(point: str) -> None:
    """SIGKILLs this run, launcher and all ranks, in the save of a step: at `saving:3` when all is
    written and nothing committed yet, at `saved:3` right after the commit."""
    when, step = point.split(":")
    committed, dying = list[str](), list[bool]()

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if dying:
            return
        if event == "os.rename" and Path(arguments[1]).name == f"checkpoint_step_{step}":
            committed.append(os.fspath(arguments[1]))  # as soon as this hook returns
            dying.extend([True] * (when == "saving"))
        elif committed:
            dying.extend([True] * os.path.isdir(committed[0]))
        if dying:
            _kill_everything()

    sys.addaudithook(watch)


def _kill_everything() -> None:
    here = psutil.Process()
    launcher = here.parent()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and launcher:
        for each in [launcher, *launcher.children()]:
            if each.pid != here.pid:
                each.kill()
    os.kill(here.pid, signal.SIGKILL)


# --- what a run left ---------------------------------------------------------------------------

EXAMPLES_KEY = "examples_crc32"
TENSORS = {".safetensors", ".pt", ".bin", ".distcp"}


def curves(folder: Path, key: str = "/loss", after: int = 0) -> dict[tuple[int, str], float]:
    """(step, name) -> value, of all values whose name ends so, later than step `after`."""
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    return {
        (row["step"], name): row[name]
        for row in map(json.loads, lines)
        for name in row
        if name.endswith(key) and row["step"] > after
    }


def state_files(folder: Path) -> dict[str, str]:
    """Files of a checkpoint that hold tensors or the optimizer, and their sha256."""
    return {
        str(path.relative_to(folder)): checkpoint.sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.suffix in TENSORS
    }


def deviation(found: dict[Any, float], expected: dict[Any, float]) -> float:
    """The largest relative one; infinite where one of the two has what the other lacks."""
    if found.keys() != expected.keys():
        return math.inf
    pairs = [(found[key], expected[key]) for key in expected]
    return max((abs(a - b) / (abs(b) or 1.0) for a, b in pairs), default=math.inf)


def weight_deviation(found: Path, expected: Path) -> float:
    """The largest relative one of a tensor, in norm, between the models in two folders."""
    ours, theirs = _tensors(found), _tensors(expected)
    if ours.keys() != theirs.keys():
        return math.inf
    pairs = [(ours[name], theirs[name]) for name in theirs]
    return max((float((a - b).norm() / (b.norm() or 1.0)) for a, b in pairs), default=math.inf)


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    """By file and name: the agents of a crowd have the same names in folders of their own."""
    files = {path.relative_to(folder): load_file(path) for path in folder.rglob("*.safetensors")}
    return {
        f"{place} {name}": value.double()
        for place, tensors in files.items()
        for name, value in tensors.items()
    }


@dataclass(frozen=True)
class Row:
    """A line of a verdict: its title, what was found (text, holds), and why a run failed."""

    title: tuple[str, ...]
    cells: list[tuple[str, bool]]
    problem: str = ""
    refused: bool = False

    @property
    def holds(self) -> bool:
        return not self.problem and all(holds for _, holds in self.cells)


# --- law 2: resumed equals uninterrupted -------------------------------------------------------


@dataclass(frozen=True)
class Kill:
    """Where a run is killed (see `die_at`), the step of the newest checkpoint then, and how many
    processes go on from there."""

    told: str
    point: str
    newest: int
    resumed_by: tuple[int, ...]


def kills(small: Small, world: int) -> list[Kill]:
    last, same = small.steps_per_epoch, (world,)
    return [
        Kill(f"after step {last - 1}, within an epoch", f"saved:{last - 1}", last - 1, same),
        Kill(f"after step {last}, last of an epoch", f"saved:{last}", last, same),
        Kill(f"after step {last + 1}, first of the next", f"saved:{last + 1}", last + 1, same),
        Kill(f"in the save of step {last}", f"saving:{last}", last - 1, same),
    ]


def resume_rows(trials: Trials, world: int, chosen: list[Kill]) -> list[Row]:
    """Runs of `world` processes, killed and resumed, held against the uninterrupted one."""
    with ThreadPoolExecutor(_at_once(world)) as pool:
        whole = pool.submit(trials.run, "whole", world)
        groups = [pool.submit(_killed, trials, world, kill, whole) for kill in chosen]
        return [row for group in groups for row in group.result()]


def _killed(trials: Trials, world: int, kill: Kill, whole: Future[Run]) -> list[Row]:
    name = kill.point.replace(":", "_")
    killed = trials.run(name, world, kill=kill.point)
    if killed.state != "running":
        problem = f"the run was not killed, it {killed.state}: {killed.reason}"
        return [Row((kill.told,), [], problem)]
    folders = {now: killed.folder.with_name(f"{name}_by_{now}") for now in kill.resumed_by}
    for folder in folders.values():
        shutil.copytree(killed.folder, folder)
    whole_run = _finished(whole.result())
    return [
        resumed_row(trials, kill, folder, now, world, whole_run) for now, folder in folders.items()
    ]


def resumed_row(
    trials: Trials, kill: Kill, folder: Path, world: int, killed_world: int, whole: Run
) -> Row:
    by = "" if world == killed_world else f"; by {world} process{'es' * (world > 1)}"
    title = (kill.told + by,)
    rejected: list[str] = []
    try:
        newest = checkpoint.find(folder, "auto", rejected.append)
    except checkpoint.CheckpointError as error:
        return Row(title, [], str(error))
    if newest is None or rejected:
        return Row(title, [], "; ".join(rejected) or "no checkpoint was committed")
    exact = world == killed_world
    step = int(newest.name.rsplit("_", 1)[1])
    before = _history(folder, step)
    resumed = trials.run(folder.name, world, "train.resume_from_checkpoint=auto")
    if not resumed.finished:
        return Row(title, [], resumed.reason, refused=resumed.state == "refused" and not exact)
    # Had it started anew, its times would be others.
    goes_on = step == kill.newest and _history(folder, step) == before
    return Row(title, [(str(step), goes_on), *_compared(resumed.folder, whole.folder, step, exact)])


def _history(folder: Path, step: int) -> list[str]:
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    return [line for line in lines if json.loads(line)["step"] <= step]


def _compared(
    found: Path, whole: Path, step: int = 0, exact: bool = True
) -> list[tuple[str, bool]]:
    """Examples, losses, weights and optimizer of two finished runs, from `step` on."""
    ours, theirs = (curves(folder, EXAMPLES_KEY, step) for folder in (found, whole))
    cells = [_same(ours == theirs and bool(theirs))]
    ours, theirs = (curves(folder, "/loss", step) for folder in (found, whole))
    models = [folder / "final_checkpoint" for folder in (found, whole)]
    if not exact:
        return [*cells, *_within(ours, theirs, models), ("-", True)]
    num_same = sum(ours.get(key) == value for key, value in theirs.items())
    all_same = ours == theirs and num_same > 0
    cells.append((f"{num_same} of {len(theirs)} same", all_same))
    newest = [checkpoint.newest_first(folder)[0] for folder in (found, whole)]
    for folders in (models, newest):
        files = [state_files(folder) for folder in folders]
        cells.append(_same(files[0] == files[1] and bool(files[1])))
    return cells


def _within(
    found: dict[tuple[int, str], float], expected: dict[tuple[int, str], float], models: list[Path]
) -> list[tuple[str, bool]]:
    """Losses and weights, which may deviate by rounding."""
    of_losses, of_weights = deviation(found, expected), weight_deviation(*models)
    return [(f"{of_losses:.0e}", of_losses <= LOSS), (f"{of_weights:.0e}", of_weights <= WEIGHTS)]


def _same(holds: bool) -> tuple[str, bool]:
    return ("same" if holds else "OTHER"), holds


def verify_resume(config: AnyConfig, world: int, console: Console) -> None:
    """Prints the verdict on law 2. Raises VerificationError where it does not hold."""
    others = (world - 1 if world > 2 else 1,) if world > 1 else ()
    with _folder() as folder:
        small = make_small(config, folder / "as_configured")
        introduced = [*small.told]
        chosen = kills(small, world)
        groups = [(small, chosen)]
        if others:  # the cut is another, so what depends on it must be off
            exact = make_small(config, folder / "exact", exact=True)
            if off := [what for what in exact.told if what not in small.told]:
                introduced += [(name, f"{what}, where others resume") for name, what in off]
                groups.append((exact, [replace(chosen[0], resumed_by=others)]))
            else:
                chosen[0] = replace(chosen[0], resumed_by=(world, *others))
        _introduce(console, world, introduced)
        total = sum(1 + sum(1 + len(kill.resumed_by) for kill in kills) for _, kills in groups)
        rows = []
        with bar(console, "runs", total) as advance:
            for each, its_kills in groups:
                rows += resume_rows(Trials(each, fresh, advance), world, its_kills)
        titles = ("killed", "resumed after", "examples", "losses", "weights", "optimizer")
        _conclude(console, "Resumed equals uninterrupted", titles, rows)


# --- law 1: layout changes speed and memory, never the result ----------------------------------


@dataclass(frozen=True)
class Cut:
    """A way to cut the same global batches."""

    world: int
    engine: str
    layout: str
    max_tokens: int
    overrides: tuple[str, ...] = ()

    @property
    def title(self) -> tuple[str, ...]:
        return str(self.world), self.engine, self.layout, f"{self.max_tokens:,}"

    @property
    def name(self) -> str:
        return "_".join(self.title).replace(" ", "_").replace(",", "").lower()

    def settings(self) -> list[str]:
        return [
            f"train.layout={self.layout}",
            f"train.max_tokens={self.max_tokens}",
            *self.overrides,
        ]


def cuts(small: Small, world: int, deepspeed: list[Path]) -> list[Cut]:
    """The first is what the others are held against."""
    alone = "one process"
    found = [
        Cut(1, alone, "padded", small.whole),
        Cut(1, alone, "padded", small.quarter),
        Cut(1, alone, "padded", 1),
    ]
    if isinstance(small.config, Config):  # windows of histories are not packed
        found.append(Cut(1, alone, "packed", small.quarter))
    if world > 1:
        found.append(Cut(world, "DDP", "padded", small.quarter))
        found.append(Cut(world, "FSDP2", "padded", small.quarter, ("train.engine=fsdp",)))
    for file in deepspeed if world > 1 else []:
        engine = ("train.engine=deepspeed", f"train.deepspeed_config={file}")
        found.append(Cut(world, file.stem.replace("_", " "), "padded", small.quarter, engine))
    return found


def invariance_rows(trials: Trials, chosen: list[Cut]) -> list[Row]:
    """Every cut held against the first."""
    runs: dict[Cut, Run] = {}
    for world in sorted({cut.world for cut in chosen}):
        mine = [cut for cut in chosen if cut.world == world]
        with ThreadPoolExecutor(_at_once(world)) as pool:
            made = pool.map(lambda cut: trials.run(cut.name, cut.world, *cut.settings()), mine)
            runs |= dict(zip(mine, made, strict=True))
    first = _finished(runs[chosen[0]])
    return [cut_row(cut, runs[cut], first) for cut in chosen]


def cut_row(cut: Cut, made: Run, first: Run) -> Row:
    if not made.finished:
        return Row(cut.title, [], made.reason, refused=made.state == "refused")
    return Row(cut.title, _compared(made.folder, first.folder, exact=False)[:-1])


def verify_invariance(config: AnyConfig, world: int, console: Console) -> None:
    """Prints the verdict on law 1. Raises VerificationError where it does not hold."""
    deepspeed = sorted(ROOT.glob("configs/deepspeed_z*.json"))
    own = Path(config.train.deepspeed_config or deepspeed[0])
    deepspeed += [own] * all(own.resolve() != file for file in deepspeed)
    any_engine = {"train.engine": "ddp", "train.deepspeed_config": None}
    with _folder() as folder:
        small = make_small(with_values(config, any_engine), folder, exact=True)
        _introduce(console, world, small.told)
        chosen = cuts(small, world, deepspeed)
        with bar(console, "runs", len(chosen)) as advance:
            rows = invariance_rows(Trials(small, fresh, advance), chosen)
        titles = ("processes", "engine", "layout", "tokens", "examples", "losses", "weights")
        _conclude(console, "The cut changes nothing", titles, rows)
        console.print(
            "tokens: budget of a micro-batch; losses, weights: the largest relative deviation from "
            f"the first row, at most {LOSS:g} and {WEIGHTS:g}"
        )


# --- what both share ---------------------------------------------------------------------------


def _at_once(world: int) -> int:
    """Runs side by side: as many as have cores of their own."""
    machine = hardware.detect()
    return 1 if machine.devices else max(1, min(4, machine.cores // world))


def _finished(made: Run) -> Run:
    if not made.finished:
        raise VerificationError(f"the run to compare with {made.state}: {made.reason}")
    return made


@contextmanager
def _folder() -> Iterator[Path]:
    """A temporary folder, which stays if a law does not hold."""
    folder = Path(tempfile.mkdtemp(prefix="sft-verify-"))
    try:
        yield folder
    except VerificationError as error:
        raise VerificationError(f"{error}\nThe runs are kept in {folder}.") from None
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def _introduce(console: Console, world: int, told: list[tuple[str, str]]) -> None:
    rest = ("processes", f"{world}; all else as configured")
    console.print(facts("The configuration, made small", [*told, rest]))


def _conclude(console: Console, law: str, titles: tuple[str, ...], rows: list[Row]) -> None:
    """The table; VerificationError if a row does not hold."""
    table = Table(title=law, title_justify="left", box=None, pad_edge=False)
    for title in (*titles, "verdict"):
        table.add_column(title, overflow="fold")
    for row in rows:
        cells = [Text(text, style="" if holds else "bold red") for text, holds in row.cells]
        blank = [Text("")] * (len(titles) - len(row.title) - len(cells))
        verdict = Text("holds", "green") if row.holds else Text("BROKEN", "bold red")
        verdict = Text("refused", "dim") if row.refused else verdict
        table.add_row(*row.title, *cells, *blank, verdict)
    console.print(table)
    for row in rows:
        if row.problem:
            console.print(f"{' '.join(row.title)}: {row.problem}")
    if broken := [" ".join(row.title) for row in rows if not row.holds and not row.refused]:
        raise VerificationError(f"the law does not hold here: {'; '.join(broken)}")
    console.print(Text("The law holds.", style="green"))


if __name__ == "__main__":  # a run that is to be killed: die_at's argument, a script, its arguments
    die_at(sys.argv[1])
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")
