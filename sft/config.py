"""The schema of every section, and the strict loader: file < `a.b=c` overrides. Imports no torch.

A section is a pydantic model; the text below a field is its documentation, and docs/CONFIG.md is
generated from it (`python -m sft.config`). Loading collects *all* problems (YAML syntax, unknown
keys, wrong types, missing keys, contradictions) and raises them as one `ConfigError`, each with its
dotted path and the place where it was written.
"""

from __future__ import annotations

import difflib
import io
import math
import os
import re
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode


class UserError(ValueError):
    """A mistake that the user can mend: told in one message, without a traceback."""

    exit_code = 2


class Preempted(UserError):
    """A signal asked the run to stop; what there was to save is saved, and it can be resumed."""

    exit_code = 75


class PeerError(UserError):
    """Another process of the run died, hung, is missing or disagreed."""

    exit_code = 7


class ConfigError(UserError):
    """The configuration cannot be run; the message lists every problem."""


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True
    )


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Text = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]*$")]
Texts = Annotated[list[Text], Field(min_length=1)]
MetricName = Literal[
    "exact_match",
    "normalised_match",
    "numeric_match",
    "json_valid",
    "json_fields",
    "rouge_l",
    "bleu",
    "chrf",
    "sari",
    "classification",
]


class Model(Section):
    name: Text
    """Folder of a model in Hugging Face format, or a hub id."""
    init: Literal["pretrained", "random"] = "pretrained"
    """`random` builds the architecture of `config.json` with fresh weights (seeded)."""
    revision: Text | None = None
    """Branch, tag or commit of a hub id."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off: such a model is refused."""
    attn_implementation: Literal["auto", "sdpa", "eager", "varlen", "flash_attention_2"] = "auto"
    """`auto`: what transformers prefers for the architecture (SDPA where it is supported).
    `varlen`: PyTorch's flash kernel for packed documents, on a GPU in bf16, and SDPA elsewhere;
    `flash_attention_2`: that of the package flash-attn. Where such a kernel computes,
    `train.layout: auto` packs."""


class Tuning(Section):
    mode: Literal["lora", "qlora", "full"] = "lora"
    """`full`: every weight. `lora`: adapters on a frozen base. `qlora`: the base also in NF4."""
    r: Count = 16
    """Rank of the adapters."""
    lora_alpha: Positive = 32.0
    """Scale of the adapters: their output is multiplied by lora_alpha / r."""
    lora_dropout: Fraction = 0.0
    """Probability of dropping an input of an adapter."""
    target_modules: Literal["auto"] | list[Text] = "auto"
    """Modules that get an adapter. `auto`: every linear layer except the vocabulary head."""


class Data(Section):
    train_path: Text | Texts
    """Training rows: a file, folder, glob or hub id, or a list of them (docs/DATA.md)."""
    mix: list[Positive] | None = None
    """How often an epoch has the rows of each `train_path`: 2 is twice, 0.5 a seeded half."""
    eval_path: Text | Texts | None = None
    """Held-out rows, given likewise. None: `eval_fraction` of the training rows is held out."""
    eval_fraction: Fraction = 0.05
    """Share of the training rows held out when there is no `eval_path`."""
    format: Literal[
        "auto",
        "messages",
        "sharegpt",
        "alpaca",
        "prompt_completion",
        "question_answer",
        "seed",
        "text",
    ] = "auto"
    """Format of the rows (docs/DATA.md). `auto`: told by the keys of each row."""
    columns: dict[Text, Text] | None = None
    """Keys of a format and the column that gives each: `{prompt: query, completion: label}`."""
    system: Literal["keep", "replace", "prepend"] = "keep"
    """What becomes of the rows' system prompts: `system_prompt` in place of, or before them."""
    system_prompt: Text | None = None
    """Text for `system: replace` and `prepend`; rows without a system prompt get it, too."""
    on_bad_row: Literal["error", "skip"] = "error"
    """`skip` leaves bad rows out and lists them in `rejected.jsonl` of the run folder."""
    duplicates: Literal["warn", "drop"] = "warn"
    """`drop` keeps the first of identical training rows; near-duplicates are only told."""
    max_rows: Count | None = None
    """Use only the first rows of all training files. None: all."""
    max_seq_len: Annotated[int, Field(ge=8)] = 2048
    """Longest example, tokens."""
    on_long: Literal["error", "drop", "truncate_left_turns", "truncate"] = "error"
    """A longer row stops the run, is dropped, loses its oldest turns, or its end; counted."""
    supervise: Literal["all", "last", "everything"] = "all"
    """What is learnt: all assistant turns (by their `weight`), the last, or prompts as well."""
    audit: Literal["refuse", "warn"] = "refuse"
    """`warn` trains on rows in which the audit has found an error."""
    cache_dir: Text = ".cache/data"
    """Where prepared rows are kept, a folder for each content and options; may be removed."""


class Train(Section):
    output_dir: Text
    """Run folder: everything that the run writes lies in it."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Order of the data, initialisation and dropout are functions of it and of the step."""
    shuffle: bool = True
    """A new order each epoch. `false`: the order of the file, for a curriculum."""
    epochs: Positive = 1.0
    """Passes over the training rows; 0.5 is half a pass."""
    max_steps: Count | None = None
    """Optimizer steps; wins over `epochs`. None: `epochs` decides."""
    global_batch: Count = 32
    """Examples per optimizer step, over all processes and accumulation steps together."""
    max_tokens: Literal["auto"] | Count = "auto"
    """Token budget of one micro-batch. Changes speed and memory, never the result."""
    micro_batch: Literal["auto"] | Count = "auto"
    """Examples of one micro-batch, at most. `auto`: as many as `max_tokens` holds."""
    gradient_accumulation_steps: Literal["auto"] | Count = "auto"
    """Micro-batches of one step and process. `auto`: as many as `global_batch` needs."""
    layout: Literal["auto", "padded", "packed"] = "auto"
    """Rows of like lengths, padded; or one row of documents that cannot see each other."""
    engine: Literal["ddp", "fsdp", "deepspeed"] = "ddp"
    """How processes share the work: a copy each (DDP), shards (FSDP2), or ZeRO of DeepSpeed."""
    deepspeed_config: Text | None = None
    """DeepSpeed JSON for `engine: deepspeed` (configs/deepspeed_z2.json is ZeRO-2)."""
    offload: bool = False
    """Keep shards in host memory between uses (`engine: fsdp`): less GPU memory, much slower."""
    num_processes: Count | None = None
    """Processes that the run must have, else it refuses to start (the Makefile sets it)."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Compute precision; trained weights stay fp32. `auto`: bf16 where the GPU has it."""
    gradient_checkpointing: Literal["auto"] | bool = "auto"
    """Recompute activations in the backward pass: less memory, about 25 % slower."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "adamw"
    """AdamW of PyTorch (fused where it exists) or of bitsandbytes."""
    learning_rate: Positive = 2e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    warmup_ratio: Fraction = 0.03
    """Share of the steps in which the learning rate rises linearly from 0."""
    min_lr_ratio: Fraction = 0.0
    """Learning rate at the last step as a share of the peak (cosine and linear)."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay, on matrices only (not on norms and biases)."""
    adam_beta1: Fraction = 0.9
    """Decay of the first moment."""
    adam_beta2: Fraction = 0.999
    """Decay of the second moment."""
    adam_epsilon: Positive = 1e-8
    """Added to the denominator of the update."""
    max_grad_norm: NonNegative = 1.0
    """Gradients with a larger global norm are scaled down to it. 0: never."""
    skip_nonfinite: CountOrZero = 0
    """Steps of the run whose loss or gradient is NaN or infinite that go without an update."""
    eval_steps: Count | None = None
    """Held-out loss every so many steps. None: only before and after."""
    save_steps: Count | None = None
    """Checkpoint every so many steps. None: only the final one."""
    save_total_limit: Annotated[int, Field(ge=2)] = 2
    """Checkpoints kept; the oldest go first."""
    stall_timeout: Annotated[float, Field(ge=10, allow_inf_nan=False)] = 1800.0
    """Seconds without progress in any process, one micro-batch or save, that end the run."""
    save_best: Literal["loss", "perplexity", "token_accuracy"] | None = None
    """The checkpoint that is best by this held-out metric is saved and kept as well."""
    max_failed_saves: Count = 3
    """A save that fails is told and training goes on; after so many in a row the run ends."""
    resume_from_checkpoint: Text | None = None
    """`auto`: the newest valid checkpoint of the run folder, if any; or a checkpoint folder."""
    log_steps: Count = 10
    """Steps between two lines in the log; files and TensorBoard get every step."""
    tensorboard: bool = True
    """Write scalars to `<output_dir>/tensorboard`."""
    wandb: bool = False
    """Also log to Weights & Biases (must be installed)."""
    deterministic: bool = False
    """Only algorithms that give the same bits every time; an operation that has none ends the run.
    Slower on GPUs; on CPUs nothing changes."""
    profile_steps: Count | None = None
    """Trace so many steps, after two for warming up, into `<output_dir>/profile.json`."""


class Evaluation(Section):
    num_examples: CountOrZero = 200
    """Held-out rows answered by generation and scored by `metrics`. 0: loss only."""
    max_new_tokens: Count = 128
    """Longest answer, tokens."""
    batch_size: Count = 64
    """Prompts generated at once on each process."""
    num_shown: CountOrZero = 3
    """Prompts whose answers before and after are shown side by side."""
    metrics: Annotated[list[MetricName], Field(min_length=1)] = ["exact_match"]
    """Scores of the answers, each with a 95 % interval (sft/metrics.py defines them)."""
    labels: Texts | None = None
    """Labels of the answers for `classification`; an answer that is none of them has failed."""
    group: Text | None = None
    """Column of the rows, or a path such as `meta.kind`: scores are told for each of its values."""


class Generation(Section):
    """How an answer is written: by `make infer`, the connector, and each `classify` strategy."""

    max_new_tokens: Count = 256
    """Longest answer, tokens."""
    temperature: NonNegative = 0.0
    """0: always the most likely token (greedy). Else logits are divided by it before drawing."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw among the fewest tokens that together are this likely."""
    top_k: CountOrZero = 0
    """Draw among so many most likely tokens. 0: among all."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """What is drawn for an example is a function of it and of the example's number."""


class Strategy(Section):
    """A way to ask for a label: a value of `classify.strategies`, under its name."""

    system: Text | None = None
    """System prompt."""
    user: Text
    """What the user says, with `{text}` where the text stands."""
    answer: Text = "{label}"
    """The answer that fine-tuning teaches, with `{label}` where the label stands."""
    generation: Generation = Generation()
    """How its answers are written."""


class Classify(Section):
    path: Text | Texts | None = None
    """Rows with a text and its label, a column each: CSV, JSONL, Parquet (docs/CLASSIFY.md)."""
    output_dir: Text = "outputs/classify"
    """Folder of the answers, scores and training rows that `make classify` writes."""
    text: Text = "text"
    """Column of the texts."""
    label: Text = "label"
    """Column of the labels."""
    group: Text | None = None
    """Column of the groups that are scored by themselves as well."""
    labels: list[Text] = []
    """What a label can be."""
    strategies: dict[Text, Strategy] = {}
    """Ways to ask, by name."""
    use: Texts | None = None
    """Names of the strategies that are tried. None: all."""
    tune: Text | None = None
    """Name of the strategy that `TUNE=1` teaches and a tuned model is asked with."""
    split_by: list[Text] = []
    """Columns of ids: rows that share an id in any of them stay in one part, as do equal texts."""
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the rows for the test part."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the rows for the validation part, which training holds out."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Which rows are in which part is a function of it and of the rows."""
    part: Literal["test", "validation", "all"] = "test"
    """What is classified: `validation` to choose by; `all` has what TUNE=1 trains on in it."""


class Crowd(Section):
    num_agents: CountOrZero = 0
    """LoRA agents that share the frozen base (docs/research/CROWD.md). 0: no crowd, one model."""
    lambda_sw: NonNegative = 0.01
    """Weight of the diversity, which is subtracted from the loss: it keeps the agents apart."""
    num_projections: Count = 64
    """Random directions that the sliced Wasserstein distance is estimated with, anew each step."""
    representation: Literal["hidden", "logits"] = "hidden"
    """What of the agents is kept apart: hidden states, or logits."""
    layer: Annotated[int, Field(ge=-1)] = -1
    """Layer of the hidden states, from 0. -1: what the vocabulary head reads."""
    pooling: Literal["last", "mean", "first"] = "last"
    """Which supervised position (whose next token is supervised) stands for an example."""
    normalise: bool = True
    """Representations of length sqrt(d), so that the diversity is not won by larger norms."""
    dropconnect: Fraction = 0.0
    """Probability of dropping a weight of an adapter in a training pass."""
    aggregator: Literal["uniform", "sampled", "learned"] = "uniform"
    """Dirichlet weights of the agents in an answer: their expectation, drawn, or fitted."""
    concentration: Positive = 1.0
    """Of the symmetric Dirichlet distribution, for each agent; `learned` replaces it."""
    agent: CountOrZero | None = None
    """Use this agent alone, by number from 0 (evaluate, merge). None: all of them."""
    fit_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the training rows kept from training for `learned` to be fitted on."""


class Distill(Section):
    data_dir: Text = ".cache/darkroom"
    """Where source histories are kept, a folder for each of the settings that make them."""
    source: Literal["ppo", "stable_baselines3"] = "ppo"
    """PPO on all goals at once, or that of Stable-Baselines3, goal by goal: the same, slower."""
    source_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of the source histories."""
    split_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Which 73 goals are trained on and which 8 are unseen (0: as published)."""
    num_streams: Count = 100
    """Copies of the room that a source learns in at once; each is one history."""
    num_steps: Count = 1000
    """Steps of each history; an episode has 20."""
    held_out_streams: Count = 5
    """Of them, the last: histories for the held-out loss, which are not trained on."""
    context: Count = 120
    """Transitions that the model sees, at most."""
    search_episodes: Count = 3
    """First episodes of the histories, of which a window is made while it has found nothing."""
    search_best_of: Count = 32
    """Each of them is, of so many streams, the one that visits most cells that are new to it."""
    jump_to: Count = 12
    """Episode of the histories, counted from 0, from which on the rest of a window comes."""
    width: Count = 64
    """Size of the model's embeddings."""
    num_layers: Count = 4
    """Blocks of the model."""
    num_heads: Count = 4
    """Heads of each attention."""
    dropout: Fraction = 0.0
    """Probability of dropping what a block adds."""
    compress: bool = False
    """Two regions of half the context each; the model says when the older one is dropped."""
    type_weight: NonNegative = 0.1
    """Weight of the token-type loss (`compress: true`)."""
    slide: Count | None = None
    """Oldest episodes that are dropped at once when the context is full. None: half of them."""
    eval_episodes: Count = 500
    """Episodes that each unseen goal is tried for, without an update."""
    eval_seeds: Count = 16
    """Times that each unseen goal is tried, with random numbers of their own."""
    eval_quick: Count = 50
    """Episodes at `train.eval_steps`."""


class Config(Section):
    """`task: sft`, the default."""

    task: ClassVar[str] = "sft"
    model: Model
    tuning: Tuning = Tuning()
    data: Data
    train: Train
    evaluation: Evaluation = Evaluation()
    classify: Classify = Classify()
    crowd: Crowd = Crowd()


class DistillConfig(Section):
    """`task: distill`."""

    task: ClassVar[str] = "distill"
    distill: Distill = Distill()
    train: Train


AnyConfig = Config | DistillConfig
Configured = TypeVar("Configured", bound=AnyConfig)
SCHEMAS: dict[str, type[Config] | type[DistillConfig]] = {
    schema.task: schema for schema in (Config, DistillConfig)
}
EPISODE = 20  # steps of the room that `distill` is about


@dataclass(frozen=True)
class Rule:
    """A combination that cannot work. `broken` sees the values at `paths`, in order."""

    paths: tuple[str, ...]
    broken: Callable[..., bool]
    message: str


OTHERS = tuple(key for key in Crowd.model_fields if key != "num_agents")  # of a crowd
DIVERSITY = ("num_projections", "representation", "layer", "pooling", "normalise")  # how measured


def _defaults(section: type[Section], keys: Sequence[str]) -> list[Any]:
    return [section.model_fields[key].default for key in keys]


RULES = [
    Rule(
        ("train.save_best", "train.eval_steps"),
        lambda metric, interval: metric is not None and interval is None,
        "nothing would be evaluated on the way: set train.eval_steps",
    ),
    Rule(
        ("train.engine", "train.deepspeed_config"),
        lambda engine, path: engine == "deepspeed" and path is None,
        "engine: deepspeed needs train.deepspeed_config (for example configs/deepspeed_z2.json)",
    ),
    Rule(
        ("train.deepspeed_config", "train.engine"),
        lambda path, engine: path is not None and engine != "deepspeed",
        "is only read with train.engine: deepspeed; set that, or remove this key",
    ),
    Rule(
        ("train.engine", "train.optimizer"),
        lambda engine, optimizer: engine != "ddp" and optimizer != "adamw",
        "fsdp and deepspeed keep slices of AdamW's state, which bitsandbytes packs: use adamw",
    ),
    Rule(
        ("train.offload", "train.engine"),
        lambda offload, engine: offload and engine != "fsdp",
        "is only read with train.engine: fsdp (DeepSpeed offloads as its own file says)",
    ),
    Rule(
        ("model.init", "tuning.mode"),
        lambda init, mode: init == "random" and mode != "full",
        "random weights have nothing to adapt: set tuning.mode: full",
    ),
    Rule(
        ("data.eval_path", "data.eval_fraction"),
        lambda path, fraction: path is None and fraction == 0,
        "nothing would be held out: give data.eval_path or an eval_fraction above 0",
    ),
    Rule(
        ("data.mix", "data.train_path"),
        lambda weights, path: (
            weights is not None and len(weights) != (len(path) if isinstance(path, list) else 1)
        ),
        "must have one weight for each path of data.train_path",
    ),
    Rule(
        ("data.system", "data.system_prompt"),
        lambda system, prompt: system != "keep" and prompt is None,
        "replace and prepend need a text: set data.system_prompt",
    ),
    Rule(
        ("data.system_prompt", "data.system"),
        lambda prompt, system: prompt is not None and system == "keep",
        "is only read with data.system: replace or prepend; set that, or remove this key",
    ),
    Rule(
        ("evaluation.metrics", "evaluation.labels"),
        lambda names, labels: "classification" in names and labels is None,
        "classification counts answers by label: set evaluation.labels",
    ),
    Rule(
        ("evaluation.labels", "evaluation.metrics"),
        lambda labels, names: labels is not None and "classification" not in names,
        "is only read with evaluation.metrics: [classification]; set that, or remove this key",
    ),
    Rule(
        ("crowd.num_agents", "tuning.mode"),
        lambda agents, mode: agents > 0 and mode == "full",
        "agents are LoRA adapters on a frozen base: set tuning.mode: lora or qlora",
    ),
    Rule(
        ("crowd.agent", "crowd.num_agents"),
        lambda agent, number: agent is not None and 0 < number <= agent,
        "is no agent of this crowd: give 0 to crowd.num_agents - 1",
    ),
    Rule(
        ("crowd.layer", "crowd.representation"),
        lambda layer, representation: layer != -1 and representation == "logits",
        "is only read with crowd.representation: hidden; set that, or remove this key",
    ),
    Rule(
        ("crowd.fit_fraction", "crowd.aggregator"),
        lambda share, kind: share != Crowd().fit_fraction and kind != "learned",
        "is only read with crowd.aggregator: learned; set that, or remove this key",
    ),
    Rule(
        ("crowd.concentration", "crowd.aggregator"),
        lambda value, kind: value != Crowd().concentration and kind != "sampled",
        "is only read with crowd.aggregator: sampled; set that, or remove this key",
    ),
    Rule(
        ("crowd.lambda_sw", *(f"crowd.{key}" for key in DIVERSITY)),
        lambda weight, *others: weight == 0 and [*others] != _defaults(Crowd, DIVERSITY),
        "0 measures no diversity, whose other keys could be read; raise it, or remove them",
    ),
    Rule(
        ("crowd.num_agents", *(f"crowd.{key}" for key in OTHERS)),
        lambda agents, *others: agents == 0 and [*others] != _defaults(Crowd, OTHERS),
        "there is no crowd whose other keys could be read; set it, or remove them",
    ),
    Rule(
        ("distill.context", "distill.compress"),
        lambda context, compress: context % (EPISODE * (1 + compress)) != 0,
        f"must be whole episodes of {EPISODE} steps, as must half of it with distill.compress",
    ),
    Rule(
        ("distill.num_steps", "distill.context"),
        lambda steps, context: steps % EPISODE != 0 or steps < context,
        f"must be whole episodes of {EPISODE} steps, and at least distill.context",
    ),
    Rule(
        ("distill.jump_to", "distill.search_episodes", "distill.num_steps"),
        lambda later, first, steps: not first <= later < steps // EPISODE,
        "must be at least distill.search_episodes, and less than the episodes in distill.num_steps",
    ),
    Rule(
        ("distill.held_out_streams", "distill.num_streams"),
        lambda held_out, streams: held_out >= streams,
        "leaves no history to train on: give less than distill.num_streams",
    ),
    Rule(
        ("distill.width", "distill.num_heads"),
        lambda width, heads: width % heads != 0,
        "must be a multiple of distill.num_heads",
    ),
    Rule(
        ("distill.slide", "distill.context"),
        lambda slide, context: slide is not None and slide * EPISODE > context,
        "there are not so many episodes in distill.context",
    ),
    Rule(
        ("distill.slide", "distill.compress"),
        lambda slide, compress: slide is not None and compress,
        "is not read with distill.compress, where the model says what is dropped: remove this key",
    ),
    Rule(
        ("distill.type_weight", "distill.compress"),
        lambda weight, compress: weight != Distill().type_weight and not compress,
        "is only read with distill.compress: true; set that, or remove this key",
    ),
    Rule(
        ("train.layout", "distill.context"),
        lambda layout, _: layout == "packed",
        "windows of histories are of one length, none is packed: leave it at auto",
    ),
    Rule(
        ("train.gradient_checkpointing", "distill.context"),
        lambda checkpointing, _: checkpointing is True,
        "the model of histories is too small for it: leave it at auto",
    ),
    Rule(
        ("train.save_best", "distill.context"),
        lambda metric, _: metric == "token_accuracy",
        "histories have no tokens of text: use loss",
    ),
    *(
        Rule(
            (key,),
            lambda path: not _is_safe_path(path),
            "must name a folder: printable characters, at most 200, without '..' and '~'",
        )
        for key in ("train.output_dir", "classify.output_dir", "distill.data_dir")
    ),
]


def _is_safe_path(path: str) -> bool:
    """Absolute ones are safe: whoever starts a run says where, and scratch disks are elsewhere."""
    parts = Path(path).parts
    is_name = path.isprintable() and len(path) <= 200 and Path(path).name.strip()
    return bool(is_name) and ".." not in parts and not path.startswith("~")


# --- secrets -----------------------------------------------------------------------------------

SECRET = re.compile(r"(TOKEN|SECRET|PASSWORD|API_KEY|ACCESS_KEY(_ID)?)$")  # HF_TOKEN, AWS_* ...


def redacted(text: str) -> str:
    """The text with `<HF_TOKEN>` in place of that variable's value, and of every other secret in
    the environment: for whatever is written to a file or told to a console that may be kept."""
    for name, value in os.environ.items():
        if SECRET.search(name) and len(value) >= 8:
            text = text.replace(value, f"<{name}>")
    return text


Origins = dict[str, str]


def load_config(file: str | Path | None, overrides: list[str] | None = None) -> Config:
    """Reads `file` (with its `include:`s; None: nothing), applies `a.b=c` overrides, validates.

    Raises ConfigError with every problem found, and for another task than fine-tuning.
    """
    config = load_run(file, overrides)
    if not isinstance(config, Config):
        raise ConfigError(
            f"{file}: expected a configuration of task: sft, found task: {config.task}, which this "
            "command does not know; `make plan`, `check`, `train`, `evaluate` and `verify-*` do"
        )
    return config


def load_run(file: str | Path | None, overrides: list[str] | None = None) -> AnyConfig:
    """The same of any task: its key `task` says which sections a file has."""
    problems: list[str] = []
    origins: Origins = {}
    tree = {} if file is None else _read(Path(file), origins, problems, seen=())
    for override in overrides or []:
        _merge(tree, _parse_override(override, origins, problems))
    task = tree.pop("task", Config.task)
    if task not in SCHEMAS:
        hint = did_you_mean(str(task), list(SCHEMAS))
        raise ConfigError(f"task{_where('task', origins)}: unknown: {excerpt(task)}; {hint}")
    _train_on_classified(tree)
    config, found = _validate(tree, origins, SCHEMAS[task])
    problems += found
    if problems or config is None:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise ConfigError(
            f"{file or 'overrides'}: {count} in the configuration\n  " + "\n  ".join(problems)
        )
    return config


def refuse_one_agent(config: Config) -> None:
    """ConfigError for `crowd.agent` where a crowd is trained, planned or tried out."""
    if config.crowd.agent is not None:
        raise ConfigError("crowd.agent: all agents of a crowd are trained; remove it")


def classified_rows(output_dir: str) -> dict[str, str]:
    """Where `make classify` writes the rows to train on, by the key of `data` that reads them."""
    return {
        "train_path": f"{output_dir}/train.jsonl",
        "eval_path": f"{output_dir}/validation.jsonl",
    }


def _train_on_classified(tree: dict) -> None:
    """A file that says what to classify need not say where the rows to train on will be."""
    classify = tree.get("classify")
    if isinstance(classify, dict) and classify.get("path") is not None:
        folder = classify.get("output_dir", Classify().output_dir)
        data = tree.setdefault("data", {})
        for key, path in classified_rows(folder).items():
            if isinstance(data, dict):
                data.setdefault(key, path)


def generation(values: dict[str, Any], where: str = "generation") -> Generation:
    """Settings of generation by name. Raises ConfigError with every problem found."""
    try:
        return Generation.model_validate(values)
    except ValidationError as error:
        found = [item | {"loc": ("generation", *item["loc"])} for item in error.errors()]
        problems = [_explain(f"{where}.{item['loc'][1]}", item, {}) for item in found]
        raise ConfigError("\n  ".join(["these settings cannot be used", *problems])) from None


def generation_of(overrides: list[str]) -> Generation:
    """Settings of generation from `generation.key=value` words. Raises ConfigError likewise."""
    problems: list[str] = []
    tree: dict[str, Any] = {}
    for override in overrides:
        _merge(tree, _parse_override(override, {}, problems))
    problems += [f"{name}: expected generation.key=value" for name in tree if name != "generation"]
    if problems:
        raise ConfigError("\n  ".join(["these settings cannot be used", *problems]))
    return generation(tree.get("generation", {}))


def dump_config(config: AnyConfig, reasons: dict[str, str] | None = None) -> str:
    """YAML of every value; `reasons` (dotted path -> why) become comments."""
    stream = io.StringIO()
    yaml = YAML()
    yaml.width = 10_000
    tree = yaml.map()
    if config.task != Config.task:
        tree["task"] = config.task
    for section, values in config.model_dump().items():
        tree[section] = yaml.map()
        for key, value in values.items():
            tree[section][key] = value
            if reason := (reasons or {}).get(f"{section}.{key}"):
                tree[section].yaml_add_eol_comment(f"auto: {' '.join(reason.split())}", key)
    yaml.representer.add_representer(type(None), lambda r, _: r.represent_scalar(_NULL, "null"))
    yaml.dump(tree, stream)
    return stream.getvalue()


def with_values(config: Configured, values: dict[str, Any]) -> Configured:
    """A copy with values at dotted paths replaced, validated again."""
    tree = config.model_dump()
    for path, value in values.items():
        section, key = path.split(".")
        tree[section][key] = value
    changed, problems = _validate(tree, {}, SCHEMAS[config.task])
    if changed is None:
        raise ConfigError("\n  ".join(["these values do not fit the configuration", *problems]))
    return typing.cast(Configured, changed)


# --- reading -----------------------------------------------------------------------------------

_NULL = "tag:yaml.org,2002:null"


def _compose(text: str, name: str) -> Node | None:
    """YAML 1.2 nodes: `3e-5` is a number, `no` a word; aliases are refused."""
    try:
        for event in YAML(typ="safe", pure=True).parse(io.StringIO(text)):
            if getattr(event, "anchor", None):
                place = f"{name}:{event.start_mark.line + 1}"
                raise ConfigError(f"{place}: YAML anchors and aliases are not read; use include:")
        return YAML(typ="safe", pure=True).compose(io.StringIO(text))
    except RecursionError:
        raise ConfigError(f"{name}: not valid YAML: nested too deeply") from None
    except ConfigError:
        raise
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ConfigError(f"{name}:{line}: not valid YAML: {error.problem}") from None
    except (YAMLError, ValueError) as error:
        raise ConfigError(f"{name}: not valid YAML: {str(error).splitlines()[0]}") from None


def _construct(node: Node | None) -> Any:
    if isinstance(node, MappingNode):
        return {_key(key): _construct(value) for key, value in node.value}
    if isinstance(node, SequenceNode):
        return [_construct(item) for item in node.value]
    return _scalar(node) if isinstance(node, ScalarNode) else {}


def _key(node: Node) -> str:
    return node.value if isinstance(node, ScalarNode) else "?"


def _scalar(node: ScalarNode) -> Any:
    """The value; what only claims to be a number stays text, and is refused as such."""
    kind, text = str(node.tag).rsplit(":", 1)[-1], node.value
    try:
        if kind == "int":
            prefixed = re.fullmatch(r"[-+]?0[xo][0-9a-fA-F]{1,16}", text)
            number = int(text, 0) if prefixed else int(text)
            return number if abs(number) < 2**63 else text  # no library takes a larger one
        if kind == "float":
            return float(re.sub(r"\.(inf|nan)$", r"\1", text.lower()))
    except ValueError:
        return text
    if kind == "bool" and text.lower() in ("true", "false"):
        return text.lower() == "true"
    return None if kind == "null" else text


def _lines(node: Node | None, name: str, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted path, file:line) of every key."""
    if isinstance(node, MappingNode):
        for key, value in node.value:
            path = f"{prefix}{_key(key)}"
            yield path, f"{name}:{key.start_mark.line + 1}"
            yield from _lines(value, name, f"{path}.")


def _read(file: Path, origins: Origins, problems: list[str], seen: tuple[Path, ...]) -> dict:
    """The mapping in `file` laid over the files that it includes (paths relative to it)."""
    if file.resolve() in seen:
        problems.append(f"{file}: includes itself ({' -> '.join(str(p.name) for p in seen)})")
        return {}
    try:
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        problems.append(f"cannot read the configuration {file}: {reason}")
        return {}
    try:
        node = _compose(text, str(file))
    except ConfigError as error:
        problems.append(str(error))
        return {}
    if not isinstance(node, MappingNode):
        problems.append(f"{file}: expected sections (model:, data:, train: ...), found none")
        return {}
    problems += _duplicates(node, str(file))
    tree = _construct(node)
    lines = dict(_lines(node, str(file)))
    includes = tree.pop("include", [])
    names = includes if isinstance(includes, list) else [includes]
    if not all(isinstance(name, str) and name.isprintable() for name in names):
        problems.append(f"include ({lines['include']}): expected a file or a list of files")
        names = []
    base: dict = {}
    for name in names:
        _merge(base, _read(file.parent / name, origins, problems, (*seen, file.resolve())))
    origins.update(lines)
    _merge(base, tree)
    return base


def _duplicates(node: MappingNode, name: str, prefix: str = "") -> Iterator[str]:
    seen = set()
    for key, value in node.value:
        if _key(key) in seen:
            yield f"{name}:{key.start_mark.line + 1}: {prefix}{_key(key)} is given twice"
        seen.add(_key(key))
        if isinstance(value, MappingNode):
            yield from _duplicates(value, name, f"{prefix}{_key(key)}.")


def _merge(base: dict, over: dict) -> None:
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = value


def _parse_override(text: str, origins: Origins, problems: list[str]) -> dict:
    match = re.fullmatch(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+)=(.*)", text, re.DOTALL)
    if not match:
        problems.append(f"override {text!r}: expected section.key=value, as in train.epochs=1")
        return {}
    path, value = match.groups()
    try:
        node = _compose(value, f"override {path}")
    except ConfigError as error:
        problems.append(str(error))
        return {}
    tree: Any = _construct(node) if node is not None else None
    for key in reversed(path.split(".")):
        tree = {key: tree}
    section, key, *_ = path.split(".")
    origins.setdefault(section, "override")
    origins[f"{section}.{key}"] = "override"
    return tree


# --- validating --------------------------------------------------------------------------------


def _validate(
    tree: Any, origins: Origins, schema: type[AnyConfig]
) -> tuple[AnyConfig | None, list[str]]:
    problems: dict[str, str] = {}
    config: AnyConfig | None = None
    try:
        config = schema.model_validate(tree)
    except ValidationError as error:
        for item in error.errors():
            path, *_ = _place(item["loc"])
            problems.setdefault(path, _explain(path, item, origins, schema))
    values = _flatten(config.model_dump() if config else _with_defaults(tree, schema))
    for rule in RULES:
        sound = all(path in values and path not in problems for path in rule.paths)
        if sound and rule.broken(*(values[path] for path in rule.paths)):
            path = rule.paths[0]
            problems.setdefault(path, f"{path}{_where(path, origins)}: {rule.message}")
            config = None
    for path, value in values.items():
        if redacted(str(value)) != str(value):
            problems[path] = (
                f"{path}{_where(path, origins)}: holds the secret {redacted(str(value))}, which "
                "would be written into the run folder; libraries read it from the environment"
            )
            config = None
    return config, list(problems.values())


def _place(location: tuple[int | str, ...]) -> tuple[str, type[Section] | None, str]:
    """(dotted path, its section, its key there); what pydantic appends to a key (member of a union,
    place in a list) is cut off."""
    parts = [*map(str, location)]
    section, at = KNOWN.get(parts[0]), 1
    if parts[0] == "classify" and parts[1:2] == ["strategies"] and len(parts) > 2:
        section, at = Strategy, 3
        if parts[3:4] == ["generation"] and len(parts) > 4:
            section, at = Generation, 4
    return ".".join(parts[: at + 1]), section, "".join(parts[at : at + 1])


def _where(path: str, origins: Origins) -> str:
    return f" ({origins[path]})" if path in origins else ""


def _explain(path: str, item: Any, origins: Origins, schema: type[AnyConfig] = Config) -> str:
    _, section, key = _place(item["loc"])  # each part may contain a dot itself
    fields = section.model_fields if section else {}
    at = f"{path}{_where(path, origins)}"
    if item["type"] == "extra_forbidden":
        word = key or str(item["loc"][0])
        sections = sections_of(schema)
        hint = did_you_mean(word, list(fields if key else sections))
        elsewhere = [s for s, model in sections.items() if word in model.model_fields]
        hint = f"did you mean {elsewhere[0]}.{word}?" if elsewhere else hint
        if not key and word in SECTIONS:
            hint = f"task: {schema.task} has no such section"
        if "." in word:
            hint = "in a file, write the section and below it the key"
        return f"{at}: unknown key; {hint}"
    if item["type"] == "missing":
        about = f": {fields[key].description}" if key else ""
        return f"{at}: required, and not given{about}"
    if not key:
        return f"{at}: expected a section with keys, found {item['input']!r}"
    told = f"{at}: expected {_type_name(fields[key])}, found {excerpt(item['input'])}"
    if item["type"] == "literal_error" and isinstance(item["input"], str):
        words = re.findall(r"'([^']+)'", item["ctx"]["expected"])
        if near := difflib.get_close_matches(item["input"], words, n=1, cutoff=0.5):
            told += f"; did you mean {near[0]}?"
    return told


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """The nearest of the known words, or all of them, as the end of a message."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"


def excerpt(value: Any) -> str:
    """At most 60 characters of what Python calls it, for a message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _with_defaults(tree: Any, schema: type[AnyConfig]) -> dict:
    """The values that the rules can still judge when the tree is not valid as a whole."""
    result = {}
    for name, section in sections_of(schema).items():
        given = tree.get(name, {}) if isinstance(tree, dict) else {}
        fields = section.model_fields.items()
        defaults = {key: field.default for key, field in fields if not field.is_required()}
        result[name] = {**defaults, **(given if isinstance(given, dict) else {})}
    return result


def _flatten(tree: dict) -> dict[str, Any]:
    return {f"{section}.{key}": v for section, keys in tree.items() for key, v in keys.items()}


def sections_of(schema: type[AnyConfig]) -> dict[str, type[Section]]:
    fields = schema.model_fields.items()
    return {name: typing.cast(type[Section], field.annotation) for name, field in fields}


SECTIONS = sections_of(Config) | sections_of(DistillConfig)
KNOWN: dict[str, type[Section]] = {
    **SECTIONS,
    "classify.strategies.<name>": Strategy,
    "generation": Generation,
}


# --- docs/CONFIG.md ----------------------------------------------------------------------------


def _type_name(field: Any) -> str:
    return _annotation_name(field.annotation) + _bounds(field.metadata)


def _bounds(metadata: list[Any]) -> str:
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    parts = [
        f"{sign} {getattr(item, name)}"
        for item in metadata
        for name, sign in signs.items()
        if getattr(item, name, None) is not None
    ]
    return f" {', '.join(parts)}" if parts else ""


def _annotation_name(annotation: Any) -> str:
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is Annotated:
        return _annotated_name(arguments)
    if typing.get_origin(annotation) is Literal:
        return " or ".join(str(value) for value in arguments)
    if typing.get_origin(annotation) is dict:
        return " to ".join(map(_annotation_name, arguments))
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation.__name__.lower()
    if typing.get_origin(annotation) is list:
        return f"list of {_annotation_name(arguments[0])}"
    if arguments:
        return " or ".join(_annotation_name(argument) for argument in arguments)
    names = {
        int: "integer",
        float: "number",
        str: "text",
        bool: "true or false",
        type(None): "null",
    }
    return names[annotation]


def _annotated_name(arguments: tuple[Any, ...]) -> str:
    return _annotation_name(arguments[0]) + _bounds(arguments[1].metadata)


def reference() -> str:
    """docs/CONFIG.md: every key with its type, default and meaning."""
    lines = [
        "# Configuration keys",
        "",
        "Generated from `sft/config.py` by `make docs`. A file holds these sections;",
        "`include: other.yaml` lays it over another file, and",
        '`ARGS="train.epochs=1"` (or `section.key=value` on a command line) overrides both.',
        " Unknown keys, wrong types and contradictions stop the run.",
        "",
        "`task: distill` at the top of a file makes it one of algorithm distillation",
        "(docs/research/DISTILL.md): it has the sections `distill` and `train`,",
        "others all but `distill`.",
    ]
    for name, section in KNOWN.items():
        lines += ["", f"## `{name}`", ""]
        if section is Generation:
            given = f"make infer ARGS={name}.temperature=0.7"
            lines += [
                f"Of each of `classify.strategies`, and of `{given}` and `make infer-batch`.",
                "",
            ]
        lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        for key, field in section.model_fields.items():
            default = "**required**" if field.is_required() else f"`{_yaml(field.default)}`"
            meaning = " ".join(str(field.description).split())
            lines.append(f"| `{key}` | {_type_name(field)} | {default} | {meaning} |")
    return "\n".join(lines) + "\n"


def _yaml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Section):
        return "{}"
    if isinstance(value, float):
        return f"{value:g}" if not math.isinf(value) else str(value)
    return "null" if value is None else str(value)


if __name__ == "__main__":
    print(reference(), end="")
