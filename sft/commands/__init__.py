"""The verbs of the command line, in one table: `sft VERB`, `python -m sft VERB`, `make VERB`.

The module of a verb has `main(args)`, and `add_arguments(parser)` if it has options of its own.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any, NamedTuple, NoReturn

from sft import __version__, cli
from sft.errors import UserError, suggest
from sft.tasks.registry import VERBS as VERBS_OF_TASKS


class Verb(NamedTuple):
    """One line of the help, and the module that does the work."""

    group: str
    help: str
    module: str  # in this package, or with its full name
    config: str | None = None  # default of --config, where the verb has this option
    preset: tuple[str, ...] = ()  # arguments that come before those of the user


NANO = "configs/nano.yaml"
ZERO2 = ("train.engine=deepspeed", "train.deepspeed_config=configs/deepspeed_z2.json")
FSDP = ("train.engine=fsdp", "train.deepspeed_config=null")
QUICK = ("--name=quick", "evaluation.num_examples=32")
TEST = ("--name=test", "evaluation.num_examples=1000000000")

VERBS = {
    "setup-accelerate": Verb(
        "Start", "Write Accelerate's launch file and prove it", "setup_accelerate"
    ),
    "gpu-info": Verb("Look", "Show devices, memory, bf16 and versions", "gpu_info"),
    "memory-check": Verb(
        "Look", "Show how much memory and disk is used, and by what", "memory_check"
    ),
    "plan": Verb("Look", "Predict memory, time and disk of a run", "plan", NANO),
    "check": Verb(
        "Look",
        "Try everything that CONFIG needs, one training step included; nothing is written",
        "check",
        NANO,
    ),
    "verify-resume": Verb(
        "Look",
        "Prove law 2 on CONFIG with a small model: killed and resumed, bit for bit",
        "verify",
        NANO,
        ("--law=resume",),
    ),
    "verify-invariance": Verb(
        "Look",
        "Prove law 1 on CONFIG: micro-batches, layouts, processes, engines",
        "verify",
        NANO,
        ("--law=invariance",),
    ),
    "process": Verb(
        "Data", "Write raw files as normalised chat JSONL, with a report", "process", NANO
    ),
    "audit": Verb(
        "Data",
        "Examine every row of CONFIG as training sees it: table, audit.json, audit.html",
        "audit",
        NANO,
    ),
    "show-data": Verb("Data", "Show one row's tokens in colour", "show_data", NANO),
    "train": Verb("Train", "Fine-tune CONFIG in one process", "train", NANO),
    "train-distributed": Verb(
        "Train",
        "Fine-tune on every GPU (two CPU processes without one), DDP",
        "train_distributed",
        NANO,
    ),
    "train-fsdp": Verb(
        "Train",
        "Fine-tune with weights, gradients and optimizer sharded, FSDP2",
        "train_distributed",
        NANO,
        FSDP,
    ),
    "train-deepspeed": Verb(
        "Train", "Fine-tune with DeepSpeed ZeRO-2", "train_distributed", NANO, ZERO2
    ),
    **{name: Verb("Train", *values) for name, values in VERBS_OF_TASKS.items()},
    "tensorboard": Verb(
        "Train", "Start TensorBoard on outputs/ and print its address", "tensorboard"
    ),
    "tb-stop": Verb(
        "Train",
        "Stop the TensorBoard that was started here, and no other",
        "tensorboard",
        preset=("--stop",),
    ),
    "evaluate": Verb("Use", "Measure held-out loss and score the answers of a run", "evaluate"),
    "eval-quick": Verb(
        "Use", "Measure held-out loss and score the first 32 answers", "evaluate", preset=QUICK
    ),
    "eval-test": Verb(
        "Use",
        "Measure held-out loss and score all answers, or those to another file",
        "evaluate",
        preset=TEST,
    ),
    "compare": Verb(
        "Use", "Say whether B is better or worse than A, or not distinguishable", "compare"
    ),
    "classify": Verb(
        "Use",
        "Ask MODEL or RUN for labels and score them; TUNE=1 also fine-tunes and compares",
        "classify",
        "configs/classify_hatecheck.yaml",
    ),
    "infer": Verb("Use", "Talk to a run or a model", "infer"),
    "infer-batch": Verb("Use", "Answer every row of INPUT into OUTPUT (JSONL)", "infer_batch"),
    "merge": Verb("Use", "Merge RUN into its base, and prove it", "merge"),
    "merge-test": Verb("Use", "Prove a merged folder again", "merge"),
}


def main(verb: str | None = None) -> NoReturn:
    """Runs the verb, or the one that the first argument names, and exits with its exit code."""
    words = sys.argv[1:]
    if verb is None:
        verb, words = (words or ["--help"])[0], words[1:]
    cli.run(lambda: run(verb, words))


def run(verb: str, words: list[str]) -> int | None:
    """Runs a verb with the words of its command line, and returns its exit code."""
    if verb in ("--help", "-h", "help", "--version"):
        print(f"sft {__version__}" if verb == "--version" else overview())
        return 0
    if verb not in VERBS:
        raise UserError(f"sft has no verb {verb!r}; {suggest(verb, list(VERBS))}")
    entry = VERBS[verb]
    name = entry.module if "." in entry.module else f"{__name__}.{entry.module}"
    module: Any = import_module(name)
    parser = cli.Parser(f"sft {verb}", entry.help, entry.config)
    if hasattr(module, "add_arguments"):
        module.add_arguments(parser)
    args = parser.parse([*entry.preset, *words])
    args.verb = verb
    return module.main(args)


def overview() -> str:
    """Returns the help: every verb with its line, by group."""
    lines = ["usage: sft VERB [options] [section.key=value ...]     sft VERB --help"]
    group = ""
    for name, verb in VERBS.items():
        if verb.group != group:
            group = verb.group
            lines += ["", group]
        lines.append(f"  {name:<21} {verb.help}")
    return "\n".join(lines)
