"""Real (not padding) tokens per second and held-out loss of one epoch, against TRL's SFTTrainer.

    python -m venv peer && peer/bin/pip install trl==1.16.0 torch==2.13.0 transformers==5.23.0 \\
        accelerate==1.15.0 peft==0.21.2 datasets==5.2.0
    PYTHONPATH=. .venv/bin/python benchmarks/throughput.py --peer peer/bin/python \\
        [--shared ../shared] [--repeats 3] [--batch 32] [--precision fp32] [--size 4.5M]

Both train LoRA r8 on every linear layer of the same Llama of 4.5M parameters (random weights, fixed
seed, vocabulary of 6,400) with AdamW at the same constant learning rate, on one thread and with the
same number of examples an optimizer step: ours by scripts/train.py with what the plan chooses, TRL
in its default batches of 8, accumulated. TRL's gradient checkpointing, on by default, is off unless
the case says so, since ours is off too. The cases take turns, one process at a time; repetition i
has seed i. Where there is a GPU both use it; a larger --size and more --rows tell more there, and
the overhead, whose parts are timed on the host, is left out.

- documents: 768 of tinyshakespeare, lengths drawn lognormal with mean 59 tokens (57 in the sample);
  every token is supervised.
- GSM8K: the first 384 conversations of the training set; only the answers are supervised.

Time is that of all steps (of ours with its curves written, of TRL its train_runtime), without
start-up, loading and tokenisation; both have run a backward pass before. Speeds are medians. The
loss on 96 held-out rows is computed for all by one function here, without padding. Reported: mean
and deviation over the seeds. `overhead` is the share of our step time that is not forward, backward
or optimizer, measured in this process.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from sft import cli
from sft.config.load import load_config
from sft.data import cache, template
from sft.models import load
from sft.plan import plan
from sft.runtime import hardware
from sft.runtime.console import make_console
from sft.runtime.log import Log
from sft.runtime.processes import Context, start_processes
from sft.tasks.sft.task import FineTune
from sft.train.engine import Engine

NUM_HELD_OUT = 96
SIZES: dict[str, dict[str, int]] = {
    "4.5M": {
        "hidden_size": 256,
        "intermediate_size": 672,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "110M": {  # SmolLM2-135M with another vocabulary
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MEAN_LENGTH, SIGMA, LONGEST = 59, 0.8, 512  # tokens of a document, its end included
LEARNING_RATE, RANK, ALPHA, LONGEST_ROW = 2e-3, 8, 16, 1024
TEMPLATE = (  # ChatML with the blocks that TRL needs to supervise the answers only
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OURS = "ours"
CASES: dict[str, dict[str, Any]] = {  # overrides of ours, arguments of TRL's SFTConfig
    OURS: {},
    "ours varlen": {"model.attn_implementation": "varlen"},  # packed; its kernel needs a GPU
    "TRL default": {},
    "TRL group_by_length": {"train_sampling_strategy": "group_by_length"},
    "TRL packing": {"packing": True, "per_device_train_batch_size": 1},
    "TRL checkpointing": {"gradient_checkpointing": True},
}
ONCE = ("TRL packing", "TRL checkpointing")  # one run on the first data: not what ours is held to


# --- material ----------------------------------------------------------------------------------


def make_material(shared: Path, work: Path, size: str, rows: int) -> dict[str, Path]:
    """The model with its tokenizer, and a folder of train.jsonl and test.jsonl per data set."""
    tokenizer = AutoTokenizer.from_pretrained(shared / "data/tokenizers/minimind")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(work / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        **SIZES[size],
        max_position_embeddings=LONGEST_ROW,
        tie_word_embeddings=True,
        initializer_range=0.06,  # so that adapters alone can lower the loss
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(work / "model")

    rng = np.random.default_rng(0)
    drawn = rng.lognormal(np.log(MEAN_LENGTH) - SIGMA**2 / 2, SIGMA, rows + NUM_HELD_OUT)
    lengths = np.clip(drawn, 8, LONGEST).astype(int) - 1  # the end of text comes on top
    text = (shared / "data/text/tinyshakespeare.txt").read_text("utf-8")
    ids = tokenizer(text, verbose=False)["input_ids"]
    ends = np.cumsum(lengths)
    documents = [
        {"text": tokenizer.decode(ids[end - length : end])}
        for length, end in zip(lengths, ends, strict=True)
    ]
    order = rng.permutation(len(documents))
    _write_rows([documents[i] for i in order], work / "documents")
    instruct = shared / "data/instruct"
    train = _gsm8k(instruct / "gsm8k_train.jsonl", rows // 2)  # three times as long
    _write_rows(train + _gsm8k(instruct / "gsm8k_test.jsonl", NUM_HELD_OUT), work / "GSM8K")
    return {name: work / name for name in ("documents", "GSM8K")}


def _gsm8k(path: Path, num_rows: int) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()[:num_rows]]
    roles = (("user", "question"), ("assistant", "answer"))
    return [{"messages": [{"role": r, "content": row[k]} for r, k in roles]} for row in rows]


def _write_rows(rows: list[dict[str, Any]], folder: Path) -> None:
    folder.mkdir()
    for name, part in (("train", rows[:-NUM_HELD_OUT]), ("test", rows[-NUM_HELD_OUT:])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(text, "utf-8")


# --- one run -----------------------------------------------------------------------------------


def our_config(work: Path, data: Path, seed: int, args: argparse.Namespace) -> Path:
    """A configuration as a user writes one; what it leaves open the plan decides."""
    config = {
        "model": {"name": str(work / "model")},
        "tuning": {"mode": "lora", "r": RANK, "lora_alpha": ALPHA},
        "data": {
            "train_path": str(data / "train.jsonl"),
            "eval_path": str(data / "test.jsonl"),
            "max_seq_len": LONGEST_ROW,
        },
        "train": {
            "output_dir": str(work / "run"),
            "seed": seed,
            "global_batch": args.batch,
            "learning_rate": LEARNING_RATE,
            "schedule": "constant",
            "warmup_ratio": 0,
            "precision": args.precision,
            "tensorboard": False,  # as report_to="none" of the peer
        },
        "evaluation": {"num_examples": 0},
    }
    path = work / "ours.yaml"
    path.write_text(json.dumps(config), "utf-8")  # JSON is YAML
    return path


def run_ours(
    case: str, work: Path, data: Path, seed: int, args: argparse.Namespace
) -> dict[str, Any]:
    config = our_config(work, data, seed, args)
    overrides = [f"{key}={value}" for key, value in CASES[case].items()]
    shutil.rmtree(work / "run", ignore_errors=True)
    _command([sys.executable, "scripts/train.py", "--config", config, *overrides])
    planned = json.loads((work / "run/plan.json").read_text("utf-8"))
    lines = (work / "run/metrics.jsonl").read_text("utf-8").splitlines()
    steps = [step for step in map(json.loads, lines) if "train/tokens" in step]
    return {
        "seconds": planned["measured"]["training_seconds"],
        "step_seconds": sum(step["speed/step_seconds"] for step in steps),
        "steps": len(steps),
        "tokens": sum(step["train/tokens"] for step in steps),
        "supervised": round(sum(step["train/supervised_tokens"] for step in steps)),
        "chosen": planned["chosen"],
        "adapter": str(work / "run/final_checkpoint"),
    }


def run_peer(
    case: str, work: Path, data: Path, seed: int, args: argparse.Namespace
) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "output_dir": str(work / "peer"),
        "seed": seed,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 8,
        "gradient_checkpointing": False,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_length": LONGEST_ROW,
        "bf16": args.precision == "bf16",
        "assistant_only_loss": data.name == "GSM8K",
        "save_strategy": "no",
        **CASES[case],
    }
    each = float(arguments["per_device_train_batch_size"])
    if arguments.get("packing"):  # a row of 1,024 tokens holds about so many examples
        each = LONGEST_ROW / mean(len(example.ids) for example in examples_of(work, data, "train"))
    job = {
        "model": str(work / "model"),
        "train": str(data / "train.jsonl"),
        "adapter": str(work / "peer/adapter"),
        "lora": {"r": RANK, "lora_alpha": ALPHA},
        "arguments": arguments | {"gradient_accumulation_steps": max(1, round(args.batch / each))},
    }
    path = work / "job.json"
    path.write_text(json.dumps(job), "utf-8")
    reported = _command([args.peer, "benchmarks/trl_worker.py", path])
    return {**json.loads(reported.splitlines()[-1]), "adapter": job["adapter"]}


def _command(command: list[Any]) -> str:
    environment = os.environ | {"PYTHONPATH": "."}
    done = subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{command} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def examples_of(work: Path, data: Path, part: str) -> list[template.Example]:
    tokenizer = template.prepare_tokenizer(AutoTokenizer.from_pretrained(work / "model"))
    rows = [json.loads(line) for line in (data / f"{part}.jsonl").read_text("utf-8").splitlines()]
    texts = [row.get("messages") or [{"role": "text", "content": row["text"]}] for row in rows]
    return [template.render(tokenizer, messages) for messages in texts]


@torch.no_grad()
def held_out_loss(work: Path, adapter: str, examples: Iterable[template.Example]) -> float:
    """Mean over the supervised tokens, in fp32, an example at a time."""
    base = AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32).to(DEVICE)
    tuned = PeftModel.from_pretrained(base, adapter).eval()
    total, count = 0.0, 0
    for example in examples:
        ids, labels = (torch.tensor(each, device=DEVICE) for each in (example.ids, example.labels))
        logits, labels = tuned(input_ids=ids[None], use_cache=False).logits[0, :-1], labels[1:]
        total += F.cross_entropy(logits, labels, reduction="sum").item()
        count += example.num_supervised
    return total / count


# --- overhead ----------------------------------------------------------------------------------


def overhead(work: Path, data: Path, args: argparse.Namespace) -> dict[str, float]:
    """Shares of an epoch's time: within the steps, and of steps with their log, all files on."""
    config = load_config(our_config(work, data, 0, args), ["train.tensorboard=true"])
    prepared = cache.prepare(config)
    accelerator = start_processes(config.train)
    log = Log(work / "overhead", tensorboard=True)
    log.console = None
    planned = plan.make_plan(config, FineTune.workload(config, prepared), hardware.detect(work), 1)
    built = load.build(config, planned.precision, accelerator.device)
    task = FineTune(config, prepared, built, planned.budget, Context(accelerator, log))
    engine = Engine(task, config.train, Context(accelerator, log))
    engine.probe_seconds_per_step()
    spent: dict[str, float] = {}

    def timed(owner: Any, name: str, what: str) -> None:
        inner: Callable[..., Any] = getattr(owner, name)

        def outer(*values: Any, **named: Any) -> Any:
            started = time.perf_counter()
            result = inner(*values, **named)
            spent[what] = spent.get(what, 0.0) + time.perf_counter() - started
            return result

        setattr(owner, name, outer)

    timed(task, "loss", "forward")
    timed(engine.parallel, "backward", "backward")
    timed(engine.optimizer, "zero_grad", "optimizer")
    timed(engine.parallel, "clip", "optimizer")
    timed(engine.parallel, "update", "optimizer")
    timed(task, "collate", "collate")
    timed(engine, "window", "order and cut")
    timed(engine, "optimizer_step", "steps")
    timed(engine, "_report", "log")
    engine.run()
    log.close()
    work_seconds = sum(spent[what] for what in ("forward", "backward", "optimizer"))
    return {
        "share_of_steps": 1 - work_seconds / spent["steps"],
        "share_with_log": 1 - work_seconds / (spent["steps"] + spent["log"]),
        **{f"{what} seconds": seconds for what, seconds in spent.items()},
    }


# --- all of it ---------------------------------------------------------------------------------


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per data set and case: median, least and most tokens/s, ours over it; mean held-out loss."""

    def of(data: str, case: str, key: str) -> list[float]:
        return [run[key] for run in runs if (run["data"], run["case"]) == (data, case)]

    result = []
    for data, case in dict.fromkeys((run["data"], run["case"]) for run in runs):
        speeds = of(data, case, "tokens_per_second")
        ours = of(data, OURS, "tokens_per_second") or [0.0]
        row = {"data": data, "case": case, "tokens_per_second": median(speeds)}
        row |= {"least": min(speeds), "most": max(speeds)}
        row |= {"ours_over": median(ours) / median(speeds)}
        losses = of(data, case, "held_out_loss")
        row |= {"loss": mean(losses), "loss_deviation": stdev(losses) if losses[1:] else None}
        row |= {"runs": len(speeds)}
        result.append(row)
    return result


def table(found: list[dict[str, Any]]) -> Table:
    result = Table(box=None, pad_edge=False)
    for column in ("data", "case"):
        result.add_column(column, no_wrap=True)
    for column in ("tokens/s", "least", "most", "ours is", "held-out loss", "runs"):
        result.add_column(column, justify="right", no_wrap=True)
    for row in found:
        speeds = (f"{row[key]:,.0f}" for key in ("tokens_per_second", "least", "most"))
        ratio = "" if row["case"] == OURS else f"{row['ours_over']:.2f}x"
        loss = f"{row['loss']:.3f}"
        if row["loss_deviation"] is not None:
            loss += f" ±{row['loss_deviation']:.3f}"
        result.add_row(row["data"], row["case"], *speeds, ratio, loss, str(row["runs"]))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peer", type=Path, required=True, help="Python of TRL's environment")
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/throughput.json"))
    parser.add_argument("--work", type=Path, default=Path("outputs/throughput"), help="is emptied")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32, help="examples per optimizer step")
    parser.add_argument("--size", choices=SIZES, default="4.5M")
    parser.add_argument("--rows", type=int, default=768, help="documents; half as many of GSM8K")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--data", nargs="+", default=["documents", "GSM8K"])
    everywhere = [case for case in CASES if DEVICE == "cuda" or "varlen" not in case]
    parser.add_argument("--cases", nargs="+", choices=CASES, default=everywhere)
    args = parser.parse_args()
    cli.prepare_libraries()
    torch.set_num_threads(1)
    console = make_console()
    shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True)
    material = make_material(args.shared, args.work, args.size, args.rows)
    held_out = {name: examples_of(args.work, material[name], "test") for name in args.data}
    runs: list[dict[str, Any]] = []
    plans = itertools.product(range(args.repeats), args.data, args.cases)
    for seed, name, case in plans:
        if case in ONCE and (seed or name != args.data[0]):
            continue
        runner = run_ours if case.startswith(OURS) else run_peer
        run = runner(case, args.work, material[name], seed, args)
        run["held_out_loss"] = held_out_loss(args.work, run.pop("adapter"), held_out[name])
        run["tokens_per_second"] = run["tokens"] / run["seconds"]
        runs.append({"data": name, "case": case, "seed": seed, **run})
        reported = f"{run['tokens_per_second']:,.0f} tokens/s in {run['steps']} steps"
        console.print(f"{name}, {case}, seed {seed}: {reported}")
    for name in args.data:  # the same tokens for all (packed rows have fewer beginnings)
        rest = [run for run in runs if run["data"] == name and run["case"] != "TRL packing"]
        assert len({(run["tokens"], run["supervised"]) for run in rest}) == 1, rest
    found = summary(runs)
    timed = args.data if DEVICE == "cpu" else []
    shares = {name: overhead(args.work, material[name], args) for name in timed}
    console.print(table(found))
    for name, share in shares.items():
        console.print(
            f"{name}: {share['share_of_steps']:.2%} of our step time is not forward, backward or "
            f"optimizer; {share['share_with_log']:.2%} with log and TensorBoard"
        )
    settings = {key: value for key, value in vars(args).items() if not isinstance(value, Path)}
    given = [f"--{key} {value}" for key, value in settings.items() if isinstance(value, int | str)]
    result = {
        "command": " ".join(["benchmarks/throughput.py --peer peer/bin/python", *given]),
        "settings": settings,
        "machine": {
            "cpu": hardware.detect(args.work).cpu_name,
            "threads": 1,
            "gpu": torch.cuda.get_device_name() if DEVICE == "cuda" else None,
        },
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "summary": found,
        "overhead": shares,
        "runs": runs,
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
