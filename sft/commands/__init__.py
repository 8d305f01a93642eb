"""The verbs of the command line, in one table: `sft VERB`, `python -m sft VERB`, `make VERB`.

A verb is a function of a module in this package. The options of the function `f` are added by
`f_options`, if there is such a function.
"""

from __future__ import annotations

import sys
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from sft import __version__, cli
from sft.errors import UserError, suggest
from sft.runtime.output import show
from sft.tasks.registry import VERBS as VERBS_OF_TASKS


class Verb(NamedTuple):
    """A verb: the group and line of its help, and the function that does the work."""

    group: str
    help: str
    function: str  # module.function, in this package or with the full name of the module
    config: str | None = None  # default of --config, where the verb has this option
    preset: tuple[str, ...] = ()  # arguments that come before those of the user


NANO = "configs/nano.yaml"
ZERO2 = ("train.engine=deepspeed", "train.deepspeed_config=configs/deepspeed_z2.json")
FSDP = ("train.engine=fsdp", "train.deepspeed_config=null")
QUICK = ("--name=quick", "evaluation.num_examples=32")
TEST = ("--name=test", "evaluation.num_examples=1000000000")

VERBS = {
    "setup-accelerate": Verb(
        "Start", "Write Accelerate's launch file and prove it", "setup_accelerate.setup_accelerate"
    ),
    "import": Verb(
        "Start",
        "Write an Axolotl, LLaMA-Factory or TRL configuration as one of ours",
        "translate.import_config",
    ),
    "gpu-info": Verb("Look", "Show devices, memory, bf16 and versions", "machine.gpu_info"),
    "memory-check": Verb(
        "Look", "Show how much memory and disk is used, and by what", "machine.memory_check"
    ),
    "plan": Verb("Look", "Predict memory, time and disk of a run", "preflight.plan", NANO),
    "check": Verb(
        "Look",
        "Try everything that CONFIG needs, one training step included; nothing is written",
        "preflight.check",
        NANO,
    ),
    "verify-resume": Verb(
        "Look",
        "Prove law 2 on CONFIG with a small model: killed and resumed, bit for bit",
        "preflight.verify",
        NANO,
        ("--law=resume",),
    ),
    "verify-invariance": Verb(
        "Look",
        "Prove law 1 on CONFIG: micro-batches, layouts, processes, engines",
        "preflight.verify",
        NANO,
        ("--law=invariance",),
    ),
    "process": Verb(
        "Data", "Write raw files as normalised chat JSONL, with a report", "data.process", NANO
    ),
    "audit": Verb(
        "Data",
        "Examine every row of CONFIG as training sees it: table, audit.json, audit.html",
        "data.audit",
        NANO,
    ),
    "show-data": Verb("Data", "Show one row's tokens in colour", "data.show_data", NANO),
    "train": Verb("Train", "Fine-tune CONFIG in one process", "train.train", NANO),
    "train-distributed": Verb(
        "Train",
        "Fine-tune on every GPU (two CPU processes without one), DDP",
        "train.train_distributed",
        NANO,
    ),
    "train-fsdp": Verb(
        "Train",
        "Fine-tune with weights, gradients and optimizer sharded, FSDP2",
        "train.train_distributed",
        NANO,
        FSDP,
    ),
    "train-deepspeed": Verb(
        "Train", "Fine-tune with DeepSpeed ZeRO-2", "train.train_distributed", NANO, ZERO2
    ),
    **{name: Verb("Train", *values) for name, values in VERBS_OF_TASKS.items()},
    "tensorboard": Verb(
        "Train", "Start TensorBoard on outputs/ and print its address", "tensorboard.tensorboard"
    ),
    "tb-stop": Verb(
        "Train",
        "Stop the TensorBoard that was started here, and no other",
        "tensorboard.tensorboard",
        preset=("--stop",),
    ),
    "evaluate": Verb("Use", "Measure held-out loss and score the answers of a run", "use.evaluate"),
    "eval-quick": Verb(
        "Use", "Measure held-out loss and score the first 32 answers", "use.evaluate", preset=QUICK
    ),
    "eval-test": Verb(
        "Use",
        "Measure held-out loss and score all answers, or those to another file",
        "use.evaluate",
        preset=TEST,
    ),
    "benchmark": Verb(
        "Use", "Score a run in standard tasks of lm-eval, or in your own", "use.benchmark"
    ),
    "compare": Verb(
        "Use", "Say whether B is better or worse than A, or not distinguishable", "use.compare"
    ),
    "verdict": Verb(
        "Use", "Say what a run learnt, what it lost of its base, and what it cost", "use.verdict"
    ),
    "classify": Verb(
        "Use",
        "Ask MODEL or RUN for labels and score them; TUNE=1 also fine-tunes and compares",
        "use.classify",
        "configs/classify_hatecheck.yaml",
    ),
    "infer": Verb("Use", "Talk to a run or a model", "use.infer"),
    "infer-batch": Verb("Use", "Answer every row of INPUT into OUTPUT (JSONL)", "use.infer_batch"),
    "merge": Verb("Use", "Merge RUN into its base, and prove it", "use.merge"),
    "merge-test": Verb("Use", "Prove a merged folder again", "use.merge"),
    "receipt": Verb(
        "Use", "Write one file from which a reviewer can repeat RUN's steps", "receipt.receipt"
    ),
    "verify-receipt": Verb(
        "Use",
        "Check a receipt; STEPS=20-30 also trains these steps again",
        "receipt.verify_receipt",
    ),
    "serve": Verb("Use", "Serve a run or a model with OpenAI's chat protocol", "serve.serve"),
    "serve-test": Verb("Use", "Prove that a server gives what was trained", "serve.serve_test"),
    "push": Verb("Use", "Upload a run or a merge to a hub, with its card", "serve.push"),
}


def main(verb: str | None = None) -> NoReturn:
    """Runs the verb, or the one that the first argument names, and exits with its exit code."""
    words = sys.argv[1:]
    if verb is None:
        verb, words = (words or ["--help"])[0], words[1:]
    else:  # Python searches the folder of a script first, where evaluate.py hides that package
        folder = str(Path(sys.argv[0]).resolve().parent)
        sys.path[:] = [each for each in sys.path if each != folder]
    cli.run(lambda: run(verb, words))


def run(verb: str, words: list[str]) -> int | None:
    """Runs a verb with the words of its command line, and returns its exit code."""
    if verb in ("--help", "-h", "help", "--version"):
        show(f"sft {__version__}" if verb == "--version" else overview())
        return 0
    if verb not in VERBS:
        raise UserError(f"sft has no verb {verb!r}; {suggest(verb, list(VERBS))}")
    entry = VERBS[verb]
    place, _, function = entry.function.rpartition(".")
    module: Any = import_module(place if "." in place else f"{__name__}.{place}")
    parser = cli.Parser(f"sft {verb}", entry.help, entry.config)
    if add_options := getattr(module, f"{function}_options", None):
        add_options(parser)
    args = parser.parse([*entry.preset, *words])
    args.verb = verb
    return getattr(module, function)(args)


def overview() -> str:
    """Returns the help: every verb with its line, by group."""
    lines = ["usage: sft VERB [options] [section.key=value ...]     sft VERB --help"]
    for group, verbs in groupby(VERBS.items(), lambda item: item[1].group):
        lines += ["", group, *(f"  {name:<21} {verb.help}" for name, verb in verbs)]
    return "\n".join(lines)
