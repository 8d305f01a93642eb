"""The schema of every section of a configuration. Imports no torch.

A section is a pydantic model; the text below a field is its documentation, from which `make docs`
writes docs/CONFIG.md.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

Origins = dict[str, str]
"""Dotted path of a key -> where it was written, for messages."""


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True
    )


@dataclass(frozen=True)
class Refused:
    """A value that users may expect to work, and why it does not."""

    value: str
    reason: str


NO_FP16 = Refused("fp16", "small gradients vanish in fp16 without loss scaling; use bf16, or fp32")
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
    precision: Annotated[Literal["auto", "fp32", "bf16"], NO_FP16] = "auto"
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


@dataclass(frozen=True)
class Rule:
    """A combination that cannot work. `broken` receives the values at `paths`, in order."""

    paths: tuple[str, ...]
    broken: Callable[..., bool]
    message: str


class RunConfig(Section):
    """A configuration of any task: its sections, `train` among them."""

    task: ClassVar[str]
    """The value of the key `task` in a file."""
    rules: ClassVar[Sequence[Rule]] = ()
    """Combinations of the task's own sections that cannot work."""
    if TYPE_CHECKING:
        train: Train

    @property
    def kind(self) -> str:
        """The name of the task in the registry."""
        return self.task


class Config(RunConfig):
    """`task: sft`, the default."""

    task: ClassVar[str] = "sft"
    model: Model
    tuning: Tuning = Tuning()
    data: Data
    train: Train
    evaluation: Evaluation = Evaluation()
    classify: Classify = Classify()
    crowd: Crowd = Crowd()

    @property
    def kind(self) -> str:
        return "crowd" if self.crowd.num_agents else self.task


Configured = TypeVar("Configured", bound=RunConfig)


def sections_of(schema: type[RunConfig]) -> dict[str, type[Section]]:
    """Returns the sections of a schema by name."""
    fields = schema.model_fields.items()
    return {name: typing.cast(type[Section], field.annotation) for name, field in fields}


NESTED: dict[str, type[Section]] = {
    "classify.strategies.<name>": Strategy,
    "generation": Generation,
}
