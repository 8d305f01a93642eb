"""The schema of every section of a configuration. Imports no torch.

A section is a pydantic model; the text below a field is its documentation, from which `make docs`
writes docs/CONFIG.md.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Field, model_validator

from sft.config.benchmark import Benchmark
from sft.config.lora import Lora, Regex, Tuning, names_layer
from sft.config.optimizers import LIKE_ADAM, ImportPath, OptimizerName
from sft.config.section import (
    Char,
    Count,
    CountOrZero,
    Folder,
    Fraction,
    Interval,
    NonNegative,
    OnlyWith,
    Positive,
    Section,
    Seed,
    Share,
    Text,
    Texts,
)

AnswerMetric = Literal[
    "exact_match",
    "normalised_match",
    "numeric_match",
    "json_valid",
    "json_fields",
    "rouge_l",
    "bleu",
    "chrf",
    "sari",
]
MetricName = Literal[AnswerMetric, "classification"]

HeldOutMetric = Literal[
    "loss",
    "perplexity",
    "token_accuracy",
    AnswerMetric,
    "accuracy",
    "macro_precision",
    "macro_recall",
    "macro_f1",
]
"""What an evaluation during training measures. The last four are those of `classification`."""
OF_LOSS = ("loss", "perplexity", "token_accuracy")  # need no answers


class Model(Section):
    """The base model."""

    name: Text
    """Folder of a model in Hugging Face format, or a hub id."""
    init: Literal["pretrained", "random"] = "pretrained"
    """`random` builds the architecture of `config.json` with new, seeded weights."""
    revision: Text | None = None
    """Branch, tag or commit of a hub id. null: its main branch."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. `false`: a model that needs it is refused."""
    attn_implementation: Literal["auto", "sdpa", "eager", "varlen", "flash_attention_2"] = "auto"
    """Attention kernel. `auto`: the one that transformers prefers for the architecture (SDPA where
    it is supported). `varlen`: PyTorch's flash kernel for packed documents on a GPU in bf16, SDPA
    elsewhere. `flash_attention_2`: the kernel of the package flash-attn. With a flash kernel,
    `train.layout: auto` packs."""
    stop_tokens: list[Text] | None = None
    """Further tokens at which generation stops, by their text: `["<end_of_turn>"]`. It always stops
    at the eos token, at those of the model's generation_config.json, and at the template's end of
    a turn."""

    adapter: Text | None = None
    """Folder of an adapter of this base to continue training, with its rank and modules:
    `final_checkpoint` of a run, or a folder that PEFT wrote. null: a new adapter."""
    new_tokens: Texts | None = None
    """Tokens to add to the tokenizer, by their text: `["<think>"]`. An embedding is initialised
    with the mean of those of the pieces into which the token was split before. With adapters, only
    these rows of the embeddings are trained."""


BASE_ANSWERS = "base"  # a value of data.replay.path


class Replay(Section):
    """Rows that keep what the base could do, mixed into each epoch (docs/VERDICT.md)."""

    path: Text | Texts | None = None
    """General rows, given like `data.train_path`, of a detected format. `base`: the base's own
    greedy answers to every second general prompt of each domain. null: none."""
    share: Literal["auto"] | Share = 0.05
    """Share of the rows of an epoch that are replayed. Rows are used again, or only some of them,
    drawn with `train.seed`, until they are so many. `auto`: training begins with short runs, which
    find the smallest of 0, 0.05, 0.1, 0.2 and 0.4 that keeps drift under `evaluation.max_drift`;
    without training (`make plan`, `make audit`) it counts as 0.4."""


class Data(Section):
    """Rows for training and held-out rows."""

    train_path: Text | Texts
    """Training rows: a file, folder, glob, hub id or address (s3://, https:// ...), or a list of
    them (docs/DATA.md)."""
    mix: list[Positive] | None = None
    """How often an epoch contains the rows of each `train_path`. 2: twice. 0.5: half of them, drawn
    with `train.seed`. null: once."""
    replay: Replay = Replay()
    """Further rows that keep what the base could do (section `data.replay`)."""
    eval_path: Text | Texts | None = None
    """Held-out rows, given like `train_path`. null: `eval_fraction` of the training rows."""
    eval_fraction: Fraction = 0.05
    """Share of the training rows that is held out if `eval_path` is null."""
    format: Literal[
        "auto",
        "messages",
        "sharegpt",
        "alpaca",
        "prompt_completion",
        "question_answer",
        "seed",
        "human_assistant",
        "tokenised",
        "text",
    ] = "auto"
    """Format of the rows (docs/DATA.md). `auto`: detected from each row's keys."""
    csv_delimiter: Literal["auto"] | Char = "auto"
    """Character between the cells of a CSV. `auto`: comma, semicolon, tab or bar, whichever fits
    the first records; a file that several fit is refused."""
    columns: dict[Text, Text] | None = None
    """Column that gives each key of a format: `{prompt: query, completion: label}`."""
    ignore_columns: Texts | None = None
    """Columns to leave out, and keys of messages, even if they change what a row means: `[label]`.
    Others of no use are listed by the audit."""
    system: Literal["keep", "replace", "prepend"] = "keep"
    """The rows' system prompts: `keep` leaves them, `replace` puts `system_prompt` in their place,
    `prepend` puts it before them."""
    system_prompt: Annotated[Text | None, OnlyWith("data.system", ("replace", "prepend"))] = None
    """Text for `system`. Rows without a system prompt get it too."""
    on_bad_row: Literal["error", "skip"] = "error"
    """`skip` leaves bad rows out and lists them in `rejected.jsonl` of the run folder."""
    duplicates: Literal["warn", "drop"] = "warn"
    """`drop` keeps the first of identical training rows. Near-duplicates are only reported."""
    max_rows: Count | None = None
    """Number of training rows to use, from the start of the files. null: all."""
    max_seq_len: Annotated[int, Field(ge=8)] = 2048
    """Maximum length of an example, in tokens."""
    on_long: Literal["error", "drop", "truncate_left_turns", "truncate"] = "error"
    """What happens to a longer row: `error` stops the run, `drop` leaves the row out,
    `truncate_left_turns` removes its oldest turns, `truncate` cuts its end. The run counts them."""
    chat_template: Text | None = None
    """Chat template in place of the tokenizer's own: a file, or its text. It is saved with the
    model."""
    template_kwargs: dict[Text, Any] | None = None
    """Variables of the chat template: `{enable_thinking: false}`. They become its defaults, and are
    saved with the model. A row may have its own `chat_template_kwargs`."""
    turns: Literal["auto", "together", "split"] = "auto"
    """`together`: a row is one example. `split`: one example per assistant turn, after the prompt
    that serving renders. `auto`: splits a row whose template rewrites earlier turns."""
    empty_thoughts: bool = True
    """Learn the empty block of thoughts that a template writes before an answer without thoughts.
    `false`: it is context, as if the prompt had it."""
    supervise: Literal["all", "last", "everything"] = "all"
    """Tokens to learn: those of `all` assistant turns (scaled by each turn's `weight`), of the
    `last` one, or of `everything`, prompts included."""
    audit: Literal["refuse", "warn"] = "refuse"
    """If the audit finds an error in a row: `refuse` stops the run, `warn` trains anyway."""
    cache_dir: Text = ".cache/data"
    """Folder of prepared rows, with one subfolder per set of inputs, and of copies of remote files.
    It can be deleted."""


IF_WATCHED = OnlyWith("train.early_stopping.metric", typing.get_args(HeldOutMetric))
KeepWhole = Literal["auto", "gradients", "all", False]  # see Train.keep_whole


class Group(Section):
    """Parameters that are trained otherwise: an item of `train.groups`. The first that matches a
    parameter decides."""

    match: Regex
    """Regular expression that is searched for in the names of the trained parameters."""
    learning_rate: Positive | None = None
    """Peak learning rate. null: that of the run."""
    weight_decay: NonNegative | None = None
    """Weight decay, also of norms and biases. null: as in the run."""
    freeze: bool = False
    """Keep these parameters as they are: no gradient, no optimizer state."""

    @model_validator(mode="after")
    def _refuse_idle(self) -> Group:
        given = self.learning_rate is not None or self.weight_decay is not None
        if given == self.freeze:
            wrong = "and a frozen parameter has none" if given else "found neither"
            raise ValueError(f"expected learning_rate or weight_decay, or freeze: true; {wrong}")
        return self


class EarlyStopping(Section):
    """When training ends before its last step. An evaluation improves on the best one if the 95 %
    interval of the difference, paired over the same held-out rows, lies above `min_delta`."""

    metric: HeldOutMetric | None = None
    """Held-out metric that must improve, as in `train.save_best`. null: all steps are made."""
    patience: Annotated[Count, IF_WATCHED] = 3
    """Evaluations in a row without an improvement after which training ends."""
    min_delta: Annotated[NonNegative, IF_WATCHED] = 0.0
    """Improvements that are not certainly larger do not count. In the unit of `metric`."""


class Train(Section):
    """The training run: its length, batches, processes, optimizer, checkpoints and logs."""

    output_dir: Folder
    """Run folder. The run writes all its files here."""
    seed: Seed = 0
    """The data order, the initial weights and dropout depend only on it and on the step."""
    shuffle: bool = True
    """`true`: a new order in each epoch. `false`: the order of the file, for a curriculum."""
    epochs: Positive = 1.0
    """Passes over the training rows; 0.5 is half a pass."""
    max_steps: Count | None = None
    """Optimizer steps; takes precedence over `epochs`. null: `epochs` decides."""
    global_batch: Count = 32
    """Examples per optimizer step, over all processes and accumulation steps together."""
    max_tokens: Literal["auto"] | Count = "auto"
    """Maximum tokens of one micro-batch. Changes speed and memory, never the result. `auto`: as
    many as fit in memory."""
    micro_batch: Literal["auto"] | Count = "auto"
    """Maximum examples of one micro-batch. `auto`: as many as `max_tokens` allows."""
    gradient_accumulation_steps: Literal["auto"] | Count = "auto"
    """Micro-batches per step and process. `auto`: as many as `global_batch` needs."""
    layout: Literal["auto", "padded", "packed"] = "auto"
    """`padded`: rows of similar length, padded to the longest. `packed`: one row of several
    documents that cannot attend to each other. `auto`: the plan chooses."""
    engine: Literal["ddp", "fsdp", "deepspeed"] = "ddp"
    """What a process holds: a whole copy (`ddp`), or a shard (`fsdp`: FSDP2; `deepspeed`: ZeRO)."""
    deepspeed_config: Annotated[Text | None, OnlyWith("train.engine", ("deepspeed",))] = None
    """DeepSpeed JSON file (configs/deepspeed_z2.json is ZeRO-2)."""
    offload: Annotated[bool, OnlyWith("train.engine", ("fsdp",))] = False
    """Keep shards in host memory between uses: less GPU memory, much slower. (DeepSpeed offloads if
    its own file says so.)"""
    context_parallel: Count = 1
    """Processes that share each sequence: each computes a part of its tokens, and a part of the
    heads of attention (DeepSpeed-Ulysses). It must divide the number of processes, and should
    divide that of heads. For rows that are too long for one GPU; with every engine."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """What processes add gradients in. `bf16` exchanges half the bytes and rounds each sum: the
    result then depends on the number of processes. `bf16_pure` has gradients in bf16 anyway.
    (DeepSpeed has `communication_data_type` in its own file.)"""
    keep_whole: Annotated[KeepWhole, OnlyWith("train.engine", ("fsdp",))] = "auto"
    """What FSDP2 keeps whole on each process until the last micro-batch of a step, so that it is
    exchanged once. `gradients`: 4 bytes per trained parameter. `all`: gathered weights as well,
    from the forward to the backward pass. Changes speed and memory, never the result. `auto`: what
    memory allows."""
    shard_within: Annotated[
        Literal["node"] | Annotated[int, Field(ge=2)] | None, OnlyWith("train.engine", ("fsdp",))
    ] = None
    """Processes over which FSDP2 splits weights, a divisor of all; groups of so many have copies of
    each other. `node`: those of a machine, so that only gradients go between machines. null: all
    processes."""
    num_processes: Count | None = None
    """Processes that the run must have, or it refuses to start. The launcher sets it."""
    precision: Literal["auto", "fp32", "bf16", "fp16", "bf16_pure"] = "auto"
    """Compute precision; trained weights stay in fp32. `fp16` uses a dynamic loss scale.
    `bf16_pure`: trained weights, gradients and moments in bf16 as well, with stochastic rounding.
    `auto`: bf16 if all GPUs have it, else fp16; fp32 on a CPU."""
    fp8: Annotated[bool, OnlyWith("train.precision", ("auto", "bf16", "bf16_pure"))] = False
    """Compute products of matrices in FP8 (torchao), with a scale for each token, on GPUs that have
    it. Gradients of weights are computed in bf16."""
    gradient_checkpointing: Literal["auto", "selective"] | bool = "auto"
    """Recompute activations in the backward pass: less memory, about 25 % slower. `selective`: all
    but matrix products and attention, which are kept. `auto`: no more than memory needs."""
    activation_offload: Literal["auto"] | bool = False
    """Keep activations in host memory between the forward and the backward pass; copies run beside
    the computation. On a CPU it saves nothing. `auto`: only if no checkpointing makes room."""
    compile: Literal["auto"] | bool = "auto"
    """Compile the repeated layers (torch.compile) before the first step: 4 to 17 % faster on a CPU,
    after about a minute; the result is the same within rounding. `auto`: on a CPU, if the run takes
    hours."""
    optimizer: OptimizerName | ImportPath = "adamw"
    """`adamw` is PyTorch's (fused where available). `adamw_8bit`, `paged_adamw` and
    `paged_adamw_8bit` are those of bitsandbytes: state in 8 bits, paged to host memory, or both.
    `torchao_adamw_8bit` and `torchao_adamw_4bit` also work with FSDP2.
    Others by name, or a class by its import path, as in `torch.optim.RAdam`: docs/OPTIMIZERS.md."""
    optimizer_args: dict[Text, Any] | None = None
    """Further arguments of the optimizer's class, for example `{momentum: 0.9}`."""
    loss: Literal["cross_entropy", "dft"] = "cross_entropy"
    """Loss of a supervised token. `dft` (Wu et al. 2025): its cross-entropy times its probability,
    taken as a constant, so that unlikely tokens weigh less. The held-out loss is always plain
    cross-entropy per token, so that runs compare."""
    label_smoothing: Annotated[Fraction, OnlyWith("train.loss", ("cross_entropy",))] = 0.0
    """Share of the target's probability that is spread evenly over the vocabulary."""
    z_loss: NonNegative = 0.0
    """Coefficient of log(sum of exp(logits)) squared, which keeps logits small (PaLM: 1e-4)."""
    mean_per: Literal["token", "example"] = "token"
    """What weighs the same in a step: each supervised `token`, or each `example`, whose tokens'
    weights then sum to 1."""
    neftune_alpha: NonNegative = 0.0
    """NEFTune (Jain et al. 2023; `neftune_noise_alpha` in transformers): uniform noise on input
    embeddings, scaled by alpha / sqrt(length * width). Usual: 5 to 15. 0: none."""
    learning_rate: Positive = 2e-4
    """Peak learning rate."""
    loraplus_lr_ratio: Annotated[Positive | None, OnlyWith("tuning.mode", ("lora", "qlora"))] = None
    """LoRA+: the learning rate of B, divided by that of A (the name is that of PEFT's optimizer).
    null: 1."""
    groups: Annotated[list[Group], Field(min_length=1)] | None = None
    """Parameters with other settings: `[{match: lora_B, learning_rate: 1e-3}, {match: embed,
    freeze: true}]` (section `train.groups`)."""
    schedule: Literal[
        "cosine", "linear", "constant", "wsd", "cosine_with_restarts", "inverse_sqrt"
    ] = "cosine"
    """Shape of the learning rate after the warm-up. `wsd`: constant, then down as
    1 - sqrt(progress) (Hägele et al. 2024). `inverse_sqrt`: peak times sqrt(warm-up steps / step);
    without a warm-up, as after 10,000 steps of one."""
    warmup_ratio: Fraction = 0.03
    """Share of the steps, the first ones, in which the learning rate rises linearly to the peak."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Number of warm-up steps; takes precedence over `warmup_ratio`. null: the ratio decides."""
    decay_ratio: Annotated[Fraction, OnlyWith("train.schedule", ("wsd",))] = 0.2
    """Share of the steps, the last ones, in which the learning rate falls."""
    num_cycles: Annotated[Count, OnlyWith("train.schedule", ("cosine_with_restarts",))] = 2
    """How many times the cosine falls from the peak."""
    min_lr_ratio: Fraction = 0.0
    """Learning rate at the last step, as a share of the peak. `constant` ignores it; `inverse_sqrt`
    falls towards it."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay, on matrices only (not on norms and biases)."""
    adam_beta1: Annotated[Fraction, OnlyWith("train.optimizer", LIKE_ADAM)] = 0.9
    """Decay rate of the first moment."""
    adam_beta2: Annotated[Fraction, OnlyWith("train.optimizer", LIKE_ADAM)] = 0.999
    """Decay rate of the second moment."""
    adam_epsilon: Annotated[Positive, OnlyWith("train.optimizer", LIKE_ADAM)] = 1e-8
    """Added to the denominator of the update."""
    optimizer_in_backward: bool = False
    """Update each parameter in the step's last backward pass, as soon as its gradient is complete,
    and free the gradient: the same weights in less memory. Needs `max_grad_norm: 0`."""
    max_grad_norm: NonNegative = 1.0
    """Gradients with a larger global norm are scaled down to this norm. 0: no clipping."""
    skip_nonfinite: CountOrZero = 0
    """How many steps with a NaN or infinite loss or gradient to skip before the run fails."""
    eval_steps: Interval | None = None
    """Steps between two measurements of the held-out loss, or epochs, as in `epoch`, `0.5 epoch` or
    `1/3 epoch`: at the first step that completes such a part. null: only before and after
    training."""
    save_steps: Interval | None = None
    """Steps between two checkpoints, or epochs, as in `eval_steps`. null: only the final one."""
    checkpoint_async: bool = False
    """Copy a checkpoint to host memory and write it during the next steps. Needs that memory."""
    save_total_limit: Annotated[int, Field(ge=2)] = 2
    """Number of checkpoints to keep; the oldest are deleted first."""
    max_shard_size: Text = "5GB"
    """Largest file of a saved model, as in `save_pretrained`: a number with KB, MB, GB or TB."""
    stall_timeout: Annotated[float, Field(ge=10, allow_inf_nan=False)] = 1800.0
    """Seconds without progress (a micro-batch or a save) on all processes before the run fails."""
    save_best: HeldOutMetric | None = None
    """Held-out metric: the checkpoint with its best value is saved and kept as well. Scores of
    answers need `evaluation.during`; `accuracy` and the `macro_` ones are those of the metric
    `classification`. null: none."""
    early_stopping: EarlyStopping = EarlyStopping()
    """When training ends before its last step (section `train.early_stopping`)."""
    max_failed_saves: Count = 3
    """The run fails after this number of failed saves in a row; before that, training continues."""
    resume_from_checkpoint: Text | None = None
    """Checkpoint folder, or `auto`: the newest valid one of the run folder, if there is one."""
    log_steps: Count = 10
    """Steps between two lines of the log. Metric files and TensorBoard get every step."""
    tensorboard: bool = True
    """Write curves, answers and the plan to `<output_dir>/tensorboard`."""
    trackers: list[Literal["wandb", "mlflow", "trackio", "comet", "swanlab"]] = []
    """Services that get the scalars and the configuration, too: `[wandb, mlflow]`. Each is an extra
    of the package, and takes its key and its server from its own environment variables or login."""
    deterministic: bool = False
    """Use only algorithms that give the same bits every time; an operation without one ends the
    run. Slower on GPUs; no change on CPUs."""
    profile_steps: Count | None = None
    """Steps to profile into `<output_dir>/profile.json`, after two steps that are not recorded."""

    @property
    def is_bf16_pure(self) -> bool:
        """Returns whether trained weights, their gradients and moments are stored in bf16."""
        return self.precision == "bf16_pure"

    @property
    def trained_bytes(self) -> int:
        """Returns the bytes of a trained weight, and of its gradient."""
        return 2 if self.is_bf16_pure else 4

    @property
    def differs_by_layer(self) -> bool:
        """Returns whether layers of the same kind may be trained otherwise."""
        return any(names_layer(group.match) for group in self.groups or ())


class Evaluation(Section):
    """Answers to held-out rows before and after training, and their scores."""

    num_examples: CountOrZero = 200
    """Held-out rows to answer and to score with `metrics`. 0: only the held-out loss."""
    during: CountOrZero = 0
    """Held-out rows, the first ones, to answer and to score also at `train.eval_steps`. 0: only the
    held-out loss is measured there."""
    max_new_tokens: Count = 128
    """Maximum length of an answer, in tokens."""
    batch_size: Count = 64
    """Prompts answered at once on each process."""
    num_shown: CountOrZero = 3
    """Number of prompts whose answers before and after training are shown side by side."""
    metrics: Annotated[list[MetricName], Field(min_length=1)] = ["exact_match"]
    """Scores of the answers, each with a 95 % interval (sft/evaluate/metrics.py defines them)."""
    labels: Annotated[Texts | None, OnlyWith("evaluation.metrics", ("classification",))] = None
    """Possible labels. An answer that is none of them counts as failed."""
    group: Text | None = None
    """Column, or a path such as `meta.kind`: scores are also reported for each of its values."""
    general_path: Text | Texts | None = None
    """General prompts and texts on which `make verdict` compares the tuned model with its base
    (docs/VERDICT.md). null: the bundled ones."""
    max_drift: Positive | None = None
    """Largest drift from the base, KL in nats per token, of any domain of the general prompts.
    Above it `make verdict` ends with exit code 8. null: no limit."""


class Generation(Section):
    """How answers are generated: by `make infer ARGS="generation.temperature=0.7"`, by `make
    infer-batch`, by the connector, and by each of `classify.strategies`."""

    max_new_tokens: Count = 256
    """Maximum length of an answer, in tokens."""
    temperature: NonNegative = 0.0
    """Logits are divided by it before sampling. 0: always the most likely token (greedy)."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the smallest set of most likely tokens whose probabilities add up to this. With
    `top_k`: of the probabilities among those tokens, as in transformers."""
    top_k: CountOrZero = 0
    """Sample from this number of most likely tokens, and from those that tie with the last of them.
    0: from all."""
    seed: Seed = 0
    """What is sampled for an example depends only on this seed and on the example's number."""


class Strategy(Section):
    """A way to ask for a label: a value of `classify.strategies`, under its name."""

    system: Text | None = None
    """System prompt. null: none."""
    user: Text
    """User message, with `{text}` in the place of the text."""
    answer: Text = "{label}"
    """Answer that fine-tuning teaches, with `{label}` in the place of the label."""
    generation: Generation = Generation()
    """How the answers are generated (section `generation`)."""


class Classify(Section):
    """Labels for texts by `make classify` (docs/CLASSIFY.md)."""

    path: Text | Texts | None = None
    """Rows with a text and its label in two columns: CSV, JSONL or Parquet (docs/CLASSIFY.md)."""
    output_dir: Folder = "outputs/classify"
    """Folder for the answers, scores and training rows that `make classify` writes."""
    text: Text = "text"
    """Column of the texts."""
    label: Text = "label"
    """Column of the labels."""
    group: Text | None = None
    """Column by whose values scores are also reported. null: only for all rows together."""
    labels: list[Text] = []
    """All possible labels."""
    strategies: dict[Text, Strategy] = {}
    """Ways to ask for a label, by name."""
    use: Texts | None = None
    """Names of the strategies to try. null: all."""
    tune: Text | None = None
    """Name of the strategy that `TUNE=1` fine-tunes, and that a fine-tuned model is asked with."""
    split_by: list[Text] = []
    """Columns of ids. Rows that share an id, or have equal texts, stay in the same part."""
    test_fraction: Share = 0.2
    """Share of the rows in the test part."""
    validation_fraction: Share = 0.1
    """Share of the rows in the validation part, which training holds out."""
    seed: Seed = 0
    """The split into parts depends only on this seed and on the rows."""
    part: Literal["test", "validation", "all"] = "test"
    """Part to classify: `validation` to choose a strategy; `all` includes rows trained on."""


DIVERSE = OnlyWith("crowd.lambda_sw", above=0)


class Crowd(Section):
    """Several LoRA agents that learn to differ and answer together (docs/research/CROWD.md)."""

    only_with: ClassVar[OnlyWith | None] = OnlyWith("crowd.num_agents", above=0)
    num_agents: CountOrZero = 0
    """Number of LoRA agents that share the frozen base. 0: one model, no crowd."""
    lambda_sw: NonNegative = 0.01
    """Weight of the diversity, which is subtracted from the loss to keep the agents apart."""
    num_projections: Annotated[Count, DIVERSE] = 64
    """Random directions that estimate the sliced Wasserstein distance, redrawn in each step."""
    representation: Annotated[Literal["hidden", "logits"], DIVERSE] = "hidden"
    """What is compared between agents: hidden states or logits."""
    layer: Annotated[int, Field(ge=-1), DIVERSE, OnlyWith("crowd.representation", ("hidden",))] = -1
    """Layer of the hidden states, counted from 0. -1: the input of the vocabulary head."""
    pooling: Annotated[Literal["last", "mean", "first"], DIVERSE] = "last"
    """What represents an example: its last or first supervised position, or the mean of all."""
    normalise: Annotated[bool, DIVERSE] = True
    """Scale representations to length sqrt(d), so that larger norms do not count as diversity."""
    dropconnect: Fraction = 0.0
    """Probability of dropping a weight of an adapter in a training pass."""
    aggregator: Literal["uniform", "sampled", "learned"] = "uniform"
    """Dirichlet weights of the agents in an answer: their expectation, a draw, or fitted."""
    concentration: Annotated[Positive, OnlyWith("crowd.aggregator", ("sampled",))] = 1.0
    """Concentration of the symmetric Dirichlet distribution, for each agent."""
    agent: CountOrZero | None = None
    """Number, from 0, of the only agent that evaluate and merge use. null: all agents."""
    fit_fraction: Annotated[Share, OnlyWith("crowd.aggregator", ("learned",))] = 0.05
    """Share of the training rows that fit the `learned` weights. Agents do not train on them."""


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
        """Returns the name of the task in the registry."""
        return self.task


class Config(RunConfig):
    """A configuration of `task: sft`, the default."""

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
        """Returns the name of the task in the registry: with agents it is a crowd."""
        return "crowd" if self.crowd.num_agents else self.task


Configured = TypeVar("Configured", bound=RunConfig)


def sections_of(schema: type[RunConfig]) -> dict[str, type[Section]]:
    """Returns the sections of a schema by name."""
    fields = schema.model_fields.items()
    return {name: typing.cast(type[Section], field.annotation) for name, field in fields}


NESTED: dict[str, type[Section]] = {
    "classify.strategies.<name>": Strategy,
    "generation": Generation,
    "benchmark": Benchmark,
    "tuning.lora": Lora,
    "train.early_stopping": EarlyStopping,
    "data.replay": Replay,
    "train.groups": Group,
}
