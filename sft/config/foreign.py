"""Recognises the configurations of other programs, and lists the keys that stand for theirs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from sft.config.aliases import ALIASES
from sft.errors import shorten

# Keys that a program has and the others seldom have -> what to write here; "": nothing is needed.
PROGRAMS = {
    "Axolotl": {
        "base_model": "model.name",
        "base_model_config": "model.name",
        "datasets": "data.train_path (and data.format, which is detected)",
        "test_datasets": "data.eval_path",
        "val_set_size": "data.eval_fraction",
        "dataset_prepared_path": "data.cache_dir",
        "sequence_len": "data.max_seq_len",
        "sample_packing": "train.layout: packed",
        "eval_sample_packing": "train.layout: packed",
        "pad_to_sequence_len": "",
        "adapter": "tuning.mode",
        "load_in_8bit": "tuning.mode: qlora (4 bits)",
        "load_in_4bit": "tuning.mode: qlora",
        "lora_target_linear": "tuning.target_modules: auto",
        "lora_target_modules": "tuning.target_modules",
        "micro_batch_size": "train.micro_batch",
        "num_epochs": "train.epochs",
        "lr_scheduler": "train.schedule",
        "optimizer": "train.optimizer",
        "train_on_inputs": "data.supervise: everything",
        "flash_attention": "model.attn_implementation: flash_attention_2",
        "saves_per_epoch": "train.save_steps",
        "evals_per_epoch": "train.eval_steps",
        "wandb_project": "train.trackers: [wandb]",
        "special_tokens": "model.stop_tokens",
    },
    "LLaMA-Factory": {
        "stage": "(only sft)",
        "do_train": "",
        "finetuning_type": "tuning.mode",
        "lora_rank": "tuning.r",
        "lora_target": "tuning.target_modules",
        "quantization_bit": "tuning.mode: qlora",
        "dataset": "data.train_path",
        "dataset_dir": "data.train_path",
        "eval_dataset": "data.eval_path",
        "val_size": "data.eval_fraction",
        "template": "data.chat_template (the tokenizer's own is the default)",
        "cutoff_len": "data.max_seq_len",
        "max_samples": "data.max_rows",
        "train_on_prompt": "data.supervise: everything",
        "mask_history": "data.supervise: last",
        "use_dft_loss": "train.loss: dft",
        "flash_attn": "model.attn_implementation",
        "overwrite_cache": "",
        "overwrite_output_dir": "",
        "preprocessing_num_workers": "",
        "plot_loss": "train.tensorboard: true",
        "report_to": "train.trackers: [wandb]",
    },
    "TRL": {
        "dataset_name": "data.train_path",
        "datasets": "data.train_path",
        "dataset_train_split": "data.train_path",
        "dataset_test_split": "data.eval_path",
        "dataset_text_field": "data.columns",
        "use_peft": "tuning.mode: lora",
        "lora_r": "tuning.r",
        "lora_target_modules": "tuning.target_modules",
        "load_in_4bit": "tuning.mode: qlora",
        "max_length": "data.max_seq_len",
        "max_seq_length": "data.max_seq_len",
        "packing": "train.layout: packed",
        "padding_free": "train.layout: packed",
        "assistant_only_loss": "data.supervise: all",
        "completion_only_loss": "data.supervise: all",
        "chat_template_path": "data.chat_template",
        "report_to": "train.trackers: [wandb]",
    },
    "Unsloth": {
        "model_name": "model.name",
        "max_seq_length": "data.max_seq_len",
        "load_in_4bit": "tuning.mode: qlora",
        "load_in_8bit": "tuning.mode: qlora (4 bits)",
        "full_finetuning": "tuning.mode: full",
        "dataset": "data.train_path",
        "r": "tuning.r",
        "target_modules": "tuning.target_modules",
        "use_gradient_checkpointing": "train.gradient_checkpointing",
        "random_state": "train.seed",
        "use_rslora": "tuning.lora",
        "loftq_config": "tuning.lora",
        "train_on_completions": "data.supervise: all",
        "save_method": "",
        "save_gguf": "",
    },
    "torchtune": {
        "tokenizer": "model.name",
        "checkpointer": "model.name",
        "model": "model.name, tuning.r, tuning.lora_alpha",
        "dataset": "data.train_path",
        "batch_size": "train.micro_batch",
        "optimizer": "train.optimizer, train.learning_rate",
        "lr_scheduler": "train.schedule, train.warmup_ratio",
        "loss": "",
        "dtype": "train.precision",
        "clip_grad_norm": "train.max_grad_norm",
        "max_steps_per_epoch": "train.max_steps",
        "enable_activation_checkpointing": "train.gradient_checkpointing",
        "metric_logger": "train.tensorboard: true",
        "log_every_n_steps": "train.log_steps",
        "resume_from_checkpoint": "train.resume_from_checkpoint",
        "device": "",
        "compile": "train.compile",
        "profiler": "",
    },
    "NeMo": {
        "name": "train.output_dir",
        "trainer": "train.epochs, train.max_steps, train.precision",
        "exp_manager": "train.output_dir, train.save_steps",
        "model": "model.name, tuning.mode, data.train_path, train.global_batch",
        "inference": "",
        "cluster_type": "",
    },
    "a model (give its folder as model.name)": {
        "architectures": "",
        "model_type": "",
        "hidden_size": "",
        "num_hidden_layers": "",
        "num_attention_heads": "",
        "vocab_size": "",
    },
    "an adapter (give its folder as model.adapter)": {
        "peft_type": "",
        "task_type": "",
        "base_model_name_or_path": "model.name",
        "inference_mode": "",
        "r": "tuning.r",
        "lora_alpha": "tuning.lora_alpha",
        "target_modules": "tuning.target_modules",
    },
    "LitGPT": {
        "checkpoint_dir": "model.name",
        "out_dir": "train.output_dir",
        "quantize": "tuning.mode: qlora",
        "devices": "train.num_processes",
        "num_nodes": "",
        "lora_r": "tuning.r",
        "lora_query": "tuning.target_modules",
        "lora_key": "tuning.target_modules",
        "lora_value": "tuning.target_modules",
        "data": "data.train_path, data.supervise",
        "train": "train.epochs, train.global_batch, train.micro_batch, train.save_steps",
        "eval": "train.eval_steps, evaluation.max_new_tokens",
        "optimizer": "train.optimizer, train.learning_rate",
        "logger_name": "train.tensorboard: true",
    },
    "AutoTrain": {
        "base_model": "model.name",
        "project_name": "train.output_dir",
        "log": "train.tensorboard: true",
        "backend": "",
        "data": "data.train_path, data.chat_template, data.columns",
        "params": "train.epochs, train.learning_rate, tuning.r",
        "hub": "",
    },
    "ms-swift": {
        "model": "model.name",
        "train_type": "tuning.mode",
        "tuner_type": "tuning.mode",
        "dataset": "data.train_path",
        "val_dataset": "data.eval_path",
        "split_dataset_ratio": "data.eval_fraction",
        "torch_dtype": "train.precision",
        "lora_rank": "tuning.r",
        "target_modules": "tuning.target_modules",
        "quant_bits": "tuning.mode: qlora",
        "max_length": "data.max_seq_len",
        "attn_impl": "model.attn_implementation",
    },
    "Accelerate (give it as ACCELERATE_CONFIG=file)": {
        "compute_environment": "",
        "distributed_type": "train.engine",
        "fsdp_config": "train.engine: fsdp",
        "deepspeed_config": "train.deepspeed_config",
        "mixed_precision": "train.precision",
        "num_processes": "train.num_processes",
        "num_machines": "",
        "machine_rank": "",
        "main_training_function": "",
        "downcast_bf16": "",
    },
    "DeepSpeed (give it as train.deepspeed_config=file)": {
        "zero_optimization": "train.deepspeed_config",
        "train_batch_size": "train.global_batch",
        "train_micro_batch_size_per_gpu": "train.micro_batch",
        "gradient_accumulation_steps": "train.global_batch",
        "bf16": "train.precision",
        "fp16": "train.precision",
        "gradient_clipping": "train.max_grad_norm",
    },
}
WITH_ARGUMENTS = ("TRL", "LLaMA-Factory", "ms-swift")  # have these keys, too:
TRAINER = "Transformers (TrainingArguments)"
ARGUMENTS = {
    "model_name_or_path": "model.name",
    "train_file": "data.train_path",
    "validation_file": "data.eval_path",
    "per_device_train_batch_size": "train.micro_batch",
    "num_train_epochs": "train.epochs",
    "logging_steps": "train.log_steps",
    "lr_scheduler_type": "train.schedule",
    "eval_strategy": "train.eval_steps",
    "evaluation_strategy": "train.eval_steps",
    "save_strategy": "train.save_steps",
    "load_best_model_at_end": "train.save_best",
    "metric_for_best_model": "train.save_best",
    "report_to": "train.trackers: [wandb]",
    "do_train": "",
    "do_eval": "",
    "overwrite_output_dir": "",
    "remove_unused_columns": "",
}


def explain(tree: Mapping[str, Any], sections: Mapping[str, Collection[str]]) -> list[str]:
    """Returns lines about the program whose configuration `tree` looks like; [] if none.

    `sections`: the keys of each section of this project.
    """
    own = [name for name, keys in sections.items() if _is_own(tree.get(name), keys)]
    program = find_program([key for key in tree if key not in own], bool(own))
    if program is None:
        return []
    known = PROGRAMS.get(program, {})
    known = {**ARGUMENTS, **known} if program in (*WITH_ARGUMENTS, TRAINER) else known
    found = {key: _equivalent(key, known, sections) for key in tree}
    width = max((len(key) for key, target in found.items() if target), default=0)
    title = f"this looks like a configuration of {program}"
    if not any(found.values()):
        return [title]
    lines = [f"{title}; write its values under these keys, which docs/CONFIG.md explains:"]
    lines += [
        f"{key:<{width}} -> {target:<26} (now {shorten(tree[key])})"
        for key, target in found.items()
        if target
    ]
    lines.append("train.global_batch is micro-batch x accumulation x processes: examples per step")
    if others := [key for key, target in found.items() if target is None]:
        lines.append(f"without an equivalent: {', '.join(others)}")
    return lines


def find_program(keys: Collection[str], has_own: bool) -> str | None:
    """Returns the program that has most of these keys; None if each has fewer than three.

    A configuration that also has sections of this project is that of a program with such sections,
    but none of TrainingArguments.
    """
    shared = 0 if has_own else sum(key in ARGUMENTS for key in keys)
    counts = dict[str, int]()
    for name, known in PROGRAMS.items():
        num = sum(key in known for key in keys)
        extra = sum(key in ARGUMENTS and key not in known for key in keys)
        is_likely = name in WITH_ARGUMENTS and num > 1 and not has_own
        counts[name] = num + (extra if is_likely else 0)
    program = max(counts, key=lambda name: counts[name])
    if counts[program] >= 3 and counts[program] > shared:
        return program
    return TRAINER if shared >= 3 else None


def _is_own(values: Any, keys: Collection[str]) -> bool:
    """Returns whether a value may be a section of this project: it has a key of it, or none."""
    if not isinstance(values, dict):
        return False
    return not values or any(key in keys or key in ALIASES for key in values)


def _equivalent(
    key: str, known: Mapping[str, str], sections: Mapping[str, Collection[str]]
) -> str | None:
    """Returns what to write in place of `key`; None if there is nothing like it."""
    if key in known:
        return known[key]
    if key in ALIASES:
        return ALIASES[key].key
    return next((f"{name}.{key}" for name, keys in sections.items() if key in keys), None)
