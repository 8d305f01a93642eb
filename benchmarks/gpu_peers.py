"""What benchmarks/gpu.py measures beside ours, where it is installed: TRL's SFTTrainer and vLLM."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from conftest import ROOT
from transformers import AutoTokenizer, PretrainedConfig, TrainerCallback

from sft.models import classes
from sft.models.quantise import quantise


class StepTimes(TrainerCallback):
    """Notes when each step has ended on the device."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def trl_step_seconds(
    folder: Path,
    architecture: PretrainedConfig,
    mode: str,
    rows: list[tuple[int, int]],
    steps: int,
    *,
    packing: bool,
    liger: bool,
    rank: int,
    longest: int,
    on_gpu: bool,
) -> float:
    """Returns the seconds of an optimizer step that trains all `rows`, without the first two.

    Settings are TRL's defaults, apart from those that are named here; checkpointing is off, as in
    ours.
    """
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    kernel = "flash_attention_2" if packing and on_gpu and _has_flash() else "sdpa"
    dtype = torch.float32 if mode == "full" else torch.bfloat16
    model: Any = classes.from_config(architecture, dtype=dtype, attn_implementation=kernel)
    if mode == "qlora":
        quantise(model, torch.bfloat16)
    each = 1 if longest in [length for length, _ in rows] else 8
    examples = [
        {"input_ids": [5 + i] * n, "completion_mask": [0] * (n - own) + [1] * own}
        for i, (n, own) in enumerate(rows)
    ]
    micro_batches = max(1, len(rows) // each)
    if packing:
        each, micro_batches = 1, max(1, -(-sum(n for n, _ in rows) // longest))
    settings = SFTConfig(
        output_dir=str(folder / "trl"),
        use_cpu=not on_gpu,
        bf16=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        completion_only_loss=True,
        gradient_checkpointing=False,
        use_liger_kernel=liger,
        packing=packing,
        max_length=longest,
        per_device_train_batch_size=each,
        gradient_accumulation_steps=micro_batches,
        max_steps=steps,
    )
    adapters = LoraConfig(task_type="CAUSAL_LM", r=rank, target_modules="all-linear")
    times = StepTimes()
    trainer = SFTTrainer(
        model=model,
        args=settings,
        train_dataset=Dataset.from_list(examples * 2),
        processing_class=AutoTokenizer.from_pretrained(ROOT / "nano/model"),
        peft_config=None if mode == "full" else adapters,
        callbacks=[times],
    )
    trainer.train()
    first = min(1, len(times.ends) - 2)
    return (times.ends[-1] - times.ends[first]) / (len(times.ends) - 1 - first)


def _has_flash() -> bool:
    from transformers.utils import is_flash_attn_2_available

    return bool(is_flash_attn_2_available())


def vllm_answers(
    folder: Path, model: Any, prompts: list[list[int]], stop: list[int], new: int
) -> dict[str, Any]:
    """Returns vLLM's speed on the same prompts, without its start."""
    from vllm import LLM, SamplingParams

    model.save_pretrained(folder)
    engine = LLM(str(folder), skip_tokenizer_init=True, gpu_memory_utilization=0.6)
    sampling = SamplingParams(temperature=0, max_tokens=new, stop_token_ids=stop, detokenize=False)
    given = [{"prompt_token_ids": ids} for ids in prompts]
    engine.generate(given[:2], sampling)
    began = time.perf_counter()
    found = engine.generate(given, sampling)
    seconds = time.perf_counter() - began
    tokens = sum(len(each.outputs[0].token_ids) for each in found)
    values = {"prompts": len(prompts), "answer_tokens": tokens, "seconds": seconds}
    return {"who": "vLLM", **values, "tokens_per_second": tokens / seconds}
