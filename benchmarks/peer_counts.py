"""Counts a step of TRL's SFTTrainer on fake tensors, for benchmarks/counters.py.

`SFTTrainer.train()` itself runs for two optimizer steps, and the second is counted from the end of
the first: loading a batch, counting its tokens, passes, metrics, clipping, update and schedule.
What a CPU would do in place of a GPU is replaced:

- Its head chooses the supervised positions, as with Triton, and each of its Triton kernels counts
  as one operator that reads a tile of logits, and in the backward pass writes it, too.
- Batches are collated outside: that is work of the host. Examples come in their order, since to
  shuffle them needs values.
- Packed rows reach attention without a mask, as with a flash kernel for documents.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from conftest import ROOT
from counters import RANK, share_of_scores
from counting import Counting, Counts, gpu_choices, weights_of
from datasets import Dataset
from peft import LoraConfig
from torch.utils._python_dispatch import _disable_current_modes
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer
from trl.kernels import chunked_logprob
from trl.trainer import utils

from sft.models.fake import FakeTensor, FastMode, fake_tensors
from sft.models.quantise import quantise
from sft.models.sizes import read_sizes
from sft.plan import dry_run

aten = torch.ops.aten
Rows = tuple[tuple[int, int], ...]


def count_step(
    folder: Path,
    architecture: PretrainedConfig,
    rows: Rows,
    case: tuple[str, str, bool],
    batch: int,
) -> tuple[Counts, Counter[str]]:
    """Returns the counts of an optimizer step of `rows`, and how often it launched each operator.

    `batch`: examples of a micro-batch.
    """
    mode, layout, _ = case
    sizes = read_sizes(architecture)
    with ExitStack() as stack:
        stack.enter_context(fake_tensors(mode))
        stack.enter_context(dry_run._imitate_gpu(sizes, "bf16"))
        stack.enter_context(gpu_choices())
        masks = stack.enter_context(_Masks())
        trainer = make_trainer(folder, architecture, rows, case, batch)
        trainer.data_collator = _Collator(trainer.data_collator, masks)
        counting = Counting(weights_of(trainer.model), share_of_scores(layout))
        callback = _SecondStep(counting)
        trainer.add_callback(callback)
        stack.enter_context(_triton(counting))
        with counting:
            trainer.train()
    return callback.found


def make_trainer(
    folder: Path,
    architecture: PretrainedConfig,
    rows: Rows,
    case: tuple[str, str, bool],
    batch: int,
) -> Any:
    mode, layout, checkpointing = case
    dtype = torch.float32 if mode == "full" else torch.bfloat16
    model: Any = AutoModelForCausalLM.from_config(architecture, dtype=dtype)
    if mode == "qlora":
        quantise(model, torch.bfloat16)
    examples = [
        {"input_ids": [3] * length, "completion_mask": [0] * (length - own) + [1] * own}
        for length, own in rows
    ]
    packing = {"packing": True, "max_length": 1024} if layout == "packed" else {}
    each = batch if layout == "padded" else len(rows)  # packed: whatever rows there are, at once
    settings = SFTConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        completion_only_loss=True,
        gradient_checkpointing=checkpointing,
        per_device_train_batch_size=each,
        gradient_accumulation_steps=len(rows) // each,
        train_sampling_strategy="sequential",
        max_steps=2,
        **packing,
    )
    adapters = LoraConfig(task_type="CAUSAL_LM", r=RANK, target_modules="all-linear")
    with _disable_current_modes():
        data = Dataset.from_list(examples)
    return SFTTrainer(
        model=model,
        args=settings,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(ROOT / "nano/model"),
        peft_config=None if mode == "full" else adapters,
    )


class _SecondStep(TrainerCallback):
    """Finds what was counted between the ends of the first and the second step."""

    def __init__(self, counting: Counting):
        self.counting = counting
        self.before: tuple[Counts, Counter[str]]
        self.found: tuple[Counts, Counter[str]]

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = deepcopy(self.counting.counts), self.counting.launched.copy()
        if state.global_step == 2:
            counts, before = vars(now[0]), vars(self.before[0])
            most = ("saved", "saved_weights")  # the most at a time; the others are sums
            difference = {k: v if k in most else v - before[k] for k, v in counts.items()}
            self.found = Counts(**difference), now[1] - self.before[1]
        self.before = now


class _Collator:
    """Collates on the host, and gives the trainer fake tensors of the same shapes."""

    def __init__(self, collate: Any, masks: _Masks):
        self.collate, self.masks = collate, masks

    def __call__(self, examples: Any) -> dict[str, Any]:
        with _disable_current_modes():
            batch = self.collate(examples)
            number = int((batch["labels"][:, 1:] != -100).sum())
        new: Any = torch.empty(0)
        fake = new.fake_mode
        given = {k: fake.from_tensor(v) if torch.is_tensor(v) else v for k, v in batch.items()}
        self.masks.chosen[given["labels"].shape] = number
        return given


class _Masks(FastMode):
    """Gives an index with a mask of labels the number of elements that it has for real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.chosen: dict[torch.Size, int] = {}

    def dispatch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is aten.index.Tensor and args[1][0].dtype == torch.bool:
            tensor, (mask,) = args
            assert isinstance(tensor, FakeTensor)
            rows, time = mask.shape
            number = self.chosen[torch.Size((rows, time + 1))]
            return tensor.new_empty(number, *tensor.shape[2:])
        return func(*args, **kwargs)


@contextmanager
def _triton(counting: Counting) -> Iterator[None]:
    """Counts the head's kernels as those of a GPU."""
    forward, backward = chunked_logprob._forward_tile, chunked_logprob._backward_tile

    def fold(tile: torch.Tensor, *arguments: Any, **options: Any) -> None:
        counting.record_kernel("_forward_kernel", tile.numel() * tile.element_size())
        with counting.paused():
            forward(tile, *arguments, **options)

    def unfold(tile: torch.Tensor, *arguments: Any, **options: Any) -> None:
        counting.record_kernel("_backward_kernel", 2 * tile.numel() * tile.element_size())
        with counting.paused():
            backward(tile, *arguments, **options)

    def product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        with counting.paused():
            a, b = a.float(), b.float()
        total.addmm_(a, b)

    changes = {"_forward_tile": fold, "_backward_tile": unfold, "_addmm_fp32": product}
    with (
        mock.patch.multiple(chunked_logprob, **changes),
        mock.patch.object(utils, "_use_triton", return_value=True),
    ):
        yield
