"""Turns a configuration of Axolotl, LLaMA-Factory or TRL into one of this project.

Every key of theirs becomes one `Line`: what stands for it here, or why nothing does. Where another
program's default means another training than ours, its default is a line, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sft.config.aliases import ALIASES, UNSET
from sft.config.foreign import find_program
from sft.errors import ConfigError, shorten


@dataclass(frozen=True)
class Line:
    """A key of theirs. `ours` has dotted keys; `note` says what differs or what to do."""

    key: str
    theirs: str
    ours: dict[str, Any] = field(default_factory=dict)
    note: str = ""


Found = tuple[dict[str, Any], str]  # keys of ours, note
Rule = Callable[[Any, Mapping[str, Any]], Found]


def translate(tree: Mapping[str, Any], processes: int) -> tuple[str, list[Line]]:
    """Returns the name of the program and a line for each key.

    `processes`: those of their run, by which the size of their batch is multiplied. Raises
    ConfigError for a configuration of another program.
    """
    program = find_program([*tree], has_own=False)
    if program not in RULES:
        raise ConfigError(
            f"expected a configuration of {', '.join(RULES)}, found "
            f"{f'one of {program}' if program else f'the keys {shorten([*tree])}'}; "
            "docs/CONFIG.md has the keys to write by hand"
        )
    rules = COMMON | RULES[program]
    lines = []
    for key, value in tree.items():
        if value is None or key in BATCH:
            continue
        ours, note = rules[key](value, tree) if key in rules else ({}, NOTHING)
        lines.append(Line(key, shorten(value), ours, note))
    replaced = {"warmup_ratio": "warmup_steps", "assistant_only_loss": "completion_only_loss"}
    without_adapter = program == "TRL" and not tree.get("use_peft")
    for key, value in DEFAULTS[program].items():
        if without_adapter and key.startswith("lora"):
            continue
        if tree.get(key) is not None or tree.get(replaced.get(key, key)) is not None:
            continue
        ours, note = rules[key](value, tree)
        lines.append(Line(key, f"{shorten(value)}, its default", ours, note))
    return program, [*lines, _batch(program, tree, processes)]


NOTHING = "no equivalent: left out"
BATCH = ("micro_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps")


def _batch(program: str, tree: Mapping[str, Any], processes: int) -> Line:
    """Returns the line of the global batch, which is a product of theirs."""
    size = tree.get(BATCH[0]) or tree.get(BATCH[1]) or (1 if program == "Axolotl" else 8)
    steps = tree.get(BATCH[2]) or 1
    product = f"{size} per process x {steps} accumulated x {processes} process(es)"
    note = "give NUM_PROCESSES of their run; the cut is chosen here"
    return Line("batch size", product, {"train.global_batch": size * steps * processes}, note)


# -- rules: how a value of theirs is written here


def to(key: str, note: str = "") -> Rule:
    """Makes a rule by which the value stays as it is."""
    return lambda value, _: ({key: value}, note)


def choice(key: str, values: Mapping[Any, Any], note: str = "") -> Rule:
    """Makes a rule that looks the value up; another one has no equivalent."""

    def rule(value: Any, _: Any) -> Found:
        known = isinstance(value, str | bool | int) and value in values
        if not known:
            return {}, f"no equivalent of this value: {key} stays at its default"
        return ({} if values[value] is UNSET else {key: values[value]}), note

    return rule


def skip(why: str) -> Rule:
    """Makes a rule by which nothing is written."""
    return lambda *_: ({}, why)


def switch(ours: Mapping[str, Any], note: str = "", off: str = "") -> Rule:
    """Makes a rule that writes these keys for true, and nothing for false."""
    return lambda value, _: (dict(ours), note) if value else ({}, off)


def _alias(name: str) -> Rule:
    """Makes a rule that translates the value as ALIASES do."""
    key, values = ALIASES[name].key, ALIASES[name].values

    def rule(value: Any, _: Any) -> Found:
        found = values.get(value, value)
        return ({} if found is UNSET else {key: found}), ""

    return rule


def _steps(key: str) -> Rule:
    """Makes a rule by which a number of steps stays; a share of the training has no equivalent."""

    def rule(value: Any, _: Any) -> Found:
        is_number = isinstance(value, int | float) and value >= 1
        return ({key: int(value)}, "") if is_number else ({}, "no equivalent: give steps here")

    return rule


def _warmup(value: Any, _: Any) -> Found:
    """Writes a share of the training below 1, as in transformers 5, and else a number of steps."""
    if not value:
        return {}, ""
    return {"train.warmup_ratio" if value < 1 else "train.warmup_steps": value}, ""


def _length(value: Any, tree: Mapping[str, Any]) -> Found:
    """Writes Axolotl's limit, with what it does to longer rows."""
    strategy = tree.get("excess_length_strategy") or "drop"
    found = {"drop": "drop", "truncate": "truncate", "raise": "error"}.get(strategy, "error")
    return {"data.max_seq_len": value, "data.on_long": found}, LONG.format(PAST[found])


def _factory_packing(value: Any, tree: Mapping[str, Any]) -> Found:
    leaks = value and not tree.get("neat_packing")
    note = "documents of a row see each other there, and not here" if leaks else ""
    return {"train.layout": "packed" if value else "padded"}, note


def _datasets(value: Any, _: Any) -> Found:
    paths, notes = [], []
    for entry in value if isinstance(value, list) else [value]:
        paths.append(_hub_name(entry.get("path"), entry.get("name"), entry.get("split")))
        others = sorted(entry.keys() - {"path", "name", "split", "type"})
        if kind := entry.get("type"):
            notes.append(f"type {shorten(kind)}: the format is detected from each row's keys")
        notes += [f"no equivalent: {', '.join(others)}"] if others else []
    path = paths[0] if len(paths) == 1 else paths
    return {"data.train_path": path}, "; ".join(dict.fromkeys(notes))


def _test_datasets(value: Any, tree: Any) -> Found:
    ours, note = _datasets(value, tree)
    return {"data.eval_path": ours["data.train_path"]}, note


def _hub_name(path: Any, name: Any, split: Any) -> str:
    """Returns a dataset as it is written here: `owner/name:config@split`."""
    split = None if split == "train" else split
    return f"{path}{f':{name}' if name else ''}{f'@{split}' if split else ''}"


def _axolotl_adapter(value: Any, tree: Mapping[str, Any]) -> Found:
    if value == "none":
        return {"tuning.mode": "full"}, ""
    if value not in ("lora", "qlora"):
        return {}, f"no equivalent of {shorten(value)}: choose tuning.mode"
    in_4_bits = value == "qlora" or tree.get("load_in_4bit")
    return {"tuning.mode": "qlora" if in_4_bits else "lora"}, ""


def _factory_mode(value: Any, tree: Mapping[str, Any]) -> Found:
    if value not in ("lora", "full"):
        return {}, f"no equivalent of {shorten(value)}: choose tuning.mode"
    in_4_bits = value == "lora" and tree.get("quantization_bit") == 4
    return {"tuning.mode": "qlora" if in_4_bits else value}, ""


def _factory_data(value: Any, _: Any) -> Found:
    names = [each.strip() for each in value.split(",")] if isinstance(value, str) else value
    path = names[0] if len(names) == 1 else names
    return {"data.train_path": path}, "names of dataset_info.json: write the files they stand for"


def _factory_rank(value: Any, tree: Mapping[str, Any]) -> Found:
    if tree.get("finetuning_type") == "full":
        return {}, ""
    return {"tuning.r": value, "tuning.lora_alpha": tree.get("lora_alpha") or 2 * value}, ""


def _trl_mode(value: Any, tree: Mapping[str, Any]) -> Found:
    adapter = "qlora" if tree.get("load_in_4bit") else "lora"
    return {"tuning.mode": adapter if value else "full"}, ""


def _trl_targets(value: Any, tree: Mapping[str, Any]) -> Found:
    if tree.get("lora_target_modules") is None:
        why = (
            "no equivalent: often q_proj and v_proj, here all layers (tuning.target_modules: auto)"
        )
        return {}, why
    return {"tuning.target_modules": "auto" if value == "all-linear" else value}, ""


def _trl_data(value: Any, tree: Mapping[str, Any]) -> Found:
    name, config = value, tree.get("dataset_config")
    ours = {"data.train_path": _hub_name(name, config, tree.get("dataset_train_split"))}
    if split := tree.get("dataset_test_split"):
        return ours | {"data.eval_path": _hub_name(name, config, split)}, ""
    return ours, ""


def _trl_supervision(value: Any, tree: Mapping[str, Any]) -> Found:
    """Says what TRL trains on: every token of a conversation, unless it is asked otherwise."""
    if value:
        return {"data.supervise": "all"}, "answers only"
    note = "as it trains on conversations; rows of prompt and completion: set all"
    return {"data.supervise": "everything"}, note


def _held_out(value: Any, _: Any) -> Found:
    if isinstance(value, float) and 0 < value < 1:
        return {"data.eval_fraction": value}, ""
    return {}, "no equivalent: a share is always held out, data.eval_fraction"


def _precision(name: str) -> Rule:
    return choice("train.precision", {True: name, "auto": "auto", "true": name, False: UNSET})


def _max_steps(value: Any, _: Any) -> Found:
    return ({"train.max_steps": value}, "") if value > 0 else ({}, "epochs count")


def _deepspeed(value: Any, _: Any) -> Found:
    return {"train.engine": "deepspeed", "train.deepspeed_config": value}, ""


def _tracker(value: Any, _: Any) -> Found:
    names = [value] if isinstance(value, str) else value or []
    others = sorted(set(names) - {*TRACKERS, "tensorboard", "none"})
    found = [TRACKERS[name] for name in names if name in TRACKERS]
    ours: dict[str, Any] = {"train.trackers": found} if found else {}
    return ours, f"no equivalent: {', '.join(others)}" if others else ""


def _strategy(key: str) -> Rule:
    """Returns a rule for a key that says whether steps or epochs are counted."""
    return lambda value, _: ({key: "epoch"}, "") if value == "epoch" else ({}, f"{key} decides")


def _per_epoch(key: str) -> Rule:
    return lambda value, _: ({key: f"1/{value} epoch"} if value else {}, "")


def _attention(value: Any, _: Any) -> Found:
    kinds = ("sdpa", "eager", "auto")
    found = value if value in kinds else "flash_attention_2" if value in FLASH else None
    return ({"model.attn_implementation": found}, "") if found else ({}, "auto chooses here")


def _code(value: Any, _: Any) -> Found:
    remedy = "not taken: read the model's code, and set model.trust_remote_code if you trust it"
    return {}, remedy if value else ""


def _only_sft(value: Any, _: Any) -> Found:
    if value != "sft":
        raise ConfigError(f"expected supervised fine-tuning, found {shorten(value)}")
    return {}, ""


def _eos(value: Any, _: Any) -> Found:
    return {"model.stop_tokens": [value]}, "its own ends of a turn are known from the template"


TRACKERS = {name: name for name in ("wandb", "mlflow", "trackio", "swanlab")}
TRACKERS |= {"comet_ml": "comet"}
FLASH = (True, "fa2", "flash_attention_2")
SCHEDULES = {name: name for name in ("cosine", "linear", "constant", "cosine_with_restarts")}
SCHEDULES |= {"constant_with_warmup": "constant", "inverse_sqrt": "inverse_sqrt"}
SCHEDULES |= {"warmup_stable_decay": "wsd"}
LONG = "longer rows are {} there; `error` is the default here"
PAST = {"drop": "dropped", "truncate": "cut", "error": "refused"}
ADAPTERS = {
    "lora_alpha": to("tuning.lora_alpha"),
    "lora_dropout": to("tuning.lora_dropout"),
    "loraplus_lr_ratio": to("train.loraplus_lr_ratio"),
    "use_dora": to("tuning.lora.use_dora"),
    "use_rslora": to("tuning.lora.use_rslora"),
}
COMMON: dict[str, Rule] = {
    **{
        key: to(f"train.{key}")
        for key in (
            *("learning_rate", "weight_decay", "max_grad_norm", "output_dir", "seed"),
            *("adam_beta1", "adam_beta2", "adam_epsilon", "gradient_checkpointing"),
            *("warmup_ratio", "save_total_limit"),
        )
    },
    "warmup_steps": _warmup,
    "max_steps": _max_steps,
    "save_steps": _steps("train.save_steps"),
    "eval_steps": _steps("train.eval_steps"),
    "logging_steps": _steps("train.log_steps"),
    "bf16": _precision("bf16"),
    "fp16": _precision("fp16"),
    "tf32": skip("not needed: allowed where it is safe"),
    "deepspeed": _deepspeed,
    "neftune_noise_alpha": to("train.neftune_alpha"),
    "resume_from_checkpoint": skip("their checkpoints cannot be continued here"),
    "trust_remote_code": _code,
    "gradient_checkpointing_kwargs": skip("not needed"),
}
TRAINER: dict[str, Rule] = {  # TrainingArguments, which LLaMA-Factory and TRL take
    "model_name_or_path": to("model.name"),
    "train_file": to("data.train_path"),
    "validation_file": to("data.eval_path"),
    "num_train_epochs": to("train.epochs"),
    "lr_scheduler_type": choice("train.schedule", SCHEDULES),
    "optim": _alias("optim"),
    "report_to": _tracker,
    "do_train": skip("not needed"),
    "do_eval": skip("not needed"),
    "eval_strategy": _strategy("train.eval_steps"),
    "evaluation_strategy": _strategy("train.eval_steps"),
    "save_strategy": _strategy("train.save_steps"),
    "load_best_model_at_end": skip("no equivalent: train.save_best keeps the best besides"),
    "metric_for_best_model": choice("train.save_best", {"loss": "loss", "eval_loss": "loss"}),
    "per_device_eval_batch_size": to("evaluation.batch_size"),
    "overwrite_output_dir": skip("not needed: an earlier run is moved aside"),
    "remove_unused_columns": skip("not needed"),
    "dataloader_num_workers": skip("not needed"),
}
RULES: dict[str, dict[str, Rule]] = {
    "Axolotl": {
        **{key: rule for key, rule in ADAPTERS.items() if key.startswith("lora")},
        "base_model": to("model.name"),
        "datasets": _datasets,
        "test_datasets": _test_datasets,
        "val_set_size": _held_out,
        "dataset_prepared_path": skip("not needed: data.cache_dir"),
        "sequence_len": _length,
        "excess_length_strategy": skip("with sequence_len"),
        "bfloat16": switch({"train.precision": "bf16_pure"}),
        "sample_packing": choice("train.layout", {True: "packed", False: "padded"}),
        "eval_sample_packing": skip("not needed: the evaluation does as training does"),
        "pad_to_sequence_len": skip("not needed"),
        "adapter": _axolotl_adapter,
        "load_in_4bit": skip("part of tuning.mode: qlora"),
        "load_in_8bit": switch({}, "no equivalent: 8 bits; tuning.mode: qlora has 4"),
        "lora_r": to("tuning.r"),
        "lora_target_linear": switch({"tuning.target_modules": "auto"}),
        "lora_target_modules": to("tuning.target_modules"),
        "lora_modules_to_save": to("tuning.lora.modules_to_save"),
        "peft_use_dora": to("tuning.lora.use_dora"),
        "peft_use_rslora": to("tuning.lora.use_rslora"),
        "num_epochs": to("train.epochs"),
        "optimizer": _alias("optim"),
        "lr_scheduler": choice("train.schedule", SCHEDULES),
        "train_on_inputs": choice("data.supervise", {True: "everything", False: "all"}),
        "flash_attention": _attention,
        "chat_template": skip("the tokenizer's own is taken; another: data.chat_template, a file"),
        "wandb_project": switch({"train.trackers": ["wandb"]}),
        "rl": _only_sft,
        "special_tokens": skip("no equivalent: ends of a turn are known from the template"),
        "evals_per_epoch": _per_epoch("train.eval_steps"),
        "saves_per_epoch": _per_epoch("train.save_steps"),
        "base_model_config": skip("not needed"),
    },
    "LLaMA-Factory": {
        **TRAINER,
        **ADAPTERS,
        "stage": _only_sft,
        "finetuning_type": _factory_mode,
        "lora_rank": _factory_rank,
        "lora_alpha": skip("with lora_rank"),
        "lora_target": choice("tuning.target_modules", {"all": "auto"}),
        "additional_target": to("tuning.lora.modules_to_save"),
        "quantization_bit": choice("tuning.mode", {4: "qlora"}),
        "pissa_init": switch({"tuning.lora.init_lora_weights": "pissa"}),
        "dataset": _factory_data,
        "eval_dataset": lambda value, tree: (
            {"data.eval_path": _factory_data(value, tree)[0]["data.train_path"]},
            _factory_data(value, tree)[1],
        ),
        "dataset_dir": skip("write whole paths as data.train_path"),
        "val_size": _held_out,
        "template": skip("the tokenizer's own is taken; another: data.chat_template, a file"),
        "cutoff_len": lambda value, _: (
            {"data.max_seq_len": value, "data.on_long": "truncate"},
            LONG.format("cut"),
        ),
        "max_samples": to("data.max_rows"),
        "packing": _factory_packing,
        "neat_packing": switch({"train.layout": "packed"}),
        "pure_bf16": switch({"train.precision": "bf16_pure"}),
        "train_on_prompt": choice("data.supervise", {True: "everything", False: "all"}),
        "mask_history": switch({"data.supervise": "last"}),
        "flash_attn": _attention,
        "use_dft_loss": switch({"train.loss": "dft"}),
        "plot_loss": skip("not needed: TensorBoard"),
        "overwrite_cache": skip("not needed"),
        "preprocessing_num_workers": skip("not needed: all cores"),
    },
    "TRL": {
        **TRAINER,
        **ADAPTERS,
        "datasets": _datasets,
        "dataset_name": _trl_data,
        "dataset_config": skip("with dataset_name"),
        "dataset_train_split": skip("with dataset_name"),
        "dataset_test_split": skip("with dataset_name"),
        "use_peft": _trl_mode,
        "load_in_4bit": skip("part of tuning.mode: qlora"),
        "load_in_8bit": switch({}, "no equivalent: 8 bits; tuning.mode: qlora has 4"),
        "lora_r": to("tuning.r"),
        "lora_target_modules": _trl_targets,
        "lora_modules_to_save": to("tuning.lora.modules_to_save"),
        "max_length": lambda value, _: (
            {"data.max_seq_len": value, "data.on_long": "truncate"},
            LONG.format("cut"),
        ),
        "packing": choice("train.layout", {True: "packed", False: "padded"}),
        "padding_free": switch({"train.layout": "packed"}),
        "assistant_only_loss": _trl_supervision,
        "loss_type": choice("train.loss", {"dft": "dft", "nll": UNSET, "chunked_nll": UNSET}),
        "activation_offloading": switch({"train.activation_offload": True}),
        "eos_token": _eos,
        "dataset_text_field": lambda value, _: (
            ({}, "") if value == "text" else ({"data.columns": {"text": value}}, "")
        ),
        "max_seq_length": to("data.max_seq_len"),
        "completion_only_loss": choice("data.supervise", {True: "all", False: "everything"}),
        "chat_template_path": to("data.chat_template"),
        "attn_implementation": _attention,
        "dtype": skip("train.precision decides"),
        "torch_dtype": skip("train.precision decides"),
    },
}
DEFAULTS: dict[str, dict[str, Any]] = {  # that mean another training than ours
    "Axolotl": {
        **{"adapter": "none", "train_on_inputs": False, "num_epochs": 1.0, "sequence_len": 512},
    },
    "LLaMA-Factory": {
        **{"finetuning_type": "lora", "lora_rank": 8, "learning_rate": 5e-5, "cutoff_len": 2048},
        **{"num_train_epochs": 3.0, "lr_scheduler_type": "linear", "warmup_ratio": 0.0},
    },
    "TRL": {
        **{"use_peft": False, "learning_rate": 2e-5, "max_length": 1024, "num_train_epochs": 3.0},
        **{"lr_scheduler_type": "linear", "warmup_ratio": 0.0, "assistant_only_loss": False},
        **{"lora_dropout": 0.05, "lora_target_modules": "PEFT's choice"},
    },
}


def merged(lines: list[Line]) -> dict[str, Any]:
    """Returns all keys of ours, as the sections of a configuration."""
    tree: dict[str, Any] = {}
    for key, value in _pairs(lines):
        *sections, last = key.split(".")
        at = tree
        for section in sections:
            at = at.setdefault(section, {})
        at[last] = value
    return tree


def _pairs(lines: list[Line]) -> Iterator[tuple[str, Any]]:
    """Yields (key, value) in the order of lines."""
    for line in lines:
        yield from line.ours.items()
