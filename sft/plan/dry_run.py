"""Runs one optimizer step without data, to find its memory before any weights are loaded.

The step is the run's own: the task's model and loss and `Engine.optimizer_step` run unchanged, on
fake tensors, which have shapes but no data. A recorder notes the allocations.

The dry run is on the CPU, whatever the run's device. To predict a GPU, operations are patched to
keep the tensors that they would keep there, as far as possible (docs/PLAN.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import DistributedType, convert_outputs_to_fp32
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import _disable_current_modes

from sft.config.load import with_values
from sft.config.schema import RunConfig
from sft.data import batches
from sft.data.batches import MicroBatch
from sft.evaluate import generate
from sft.models import attention, dtypes, offload
from sft.models.fake import fake_tensors, set_attributes
from sft.models.layers import embedding_layers, weights_to_save
from sft.plan.trace import Recorder, Trace
from sft.runtime.processes import Context
from sft.tasks.base import ExampleSize
from sft.tasks.registry import task_of
from sft.train.engine import Engine
from sft.train.parallel.ddp import keeps_weight_copies
from sft.train.task import Batch

CPU = torch.device("cpu")
OFFLOADED = "offloaded activations"  # the label of what is in host memory


@dataclass(frozen=True)
class Window:
    """What one process computes in an optimizer step."""

    micro_batches: tuple[tuple[ExampleSize, ...], ...]
    layout: batches.Layout = "padded"
    gradients: bool = False  # exist before the step, from earlier micro-batches or in DDP's buckets
    waiting: int = 0  # tokens of collated micro-batches that wait; `memory` adds their bytes
    shared_by: int = 1  # processes that share its sequences

    @property
    def tokens(self) -> int:
        """Returns the tokens of the last micro-batch that a process computes, with padding."""
        lengths = [length for length, _ in self.micro_batches[-1]]
        whole = batches.num_tokens(lengths, [*range(len(lengths))], self.layout)
        return math.ceil(whole / self.shared_by)


def trace_step(
    config: RunConfig,
    precision: str,
    window: Window,
    *,
    depth: int | None = None,
    on_gpu: bool = False,
    evaluation: bool = False,
) -> Trace:
    """Returns the allocations of the second step, weights and optimizer state included.

    `depth`: the number of layers; None: all. `on_gpu`: predicts the allocations on a GPU.
    `evaluation`: records a held-out loss in place of the step, while the gradients still exist.
    """
    task_class = task_of(config)
    info = task_class.info(config)
    needs_mask = not attention.needs_no_mask(info.attention, precision, on_gpu)
    if not needs_mask:  # such kernels need a GPU; SDPA, if a model has it, keeps the same tensors
        config = with_values(config, {"model.attn_implementation": "auto"})
    if depth is not None:
        config = task_class.with_depth(config, depth)
    masked = needs_mask and window.layout == "packed" and max(map(len, window.micro_batches)) > 1
    imitated = _imitate_gpu(info.sizes, precision) if on_gpu else nullcontext()
    numbered = {} if masked else {"number_documents": lambda _: None}
    with fake_tensors(info.mode, masked), imitated, set_attributes(attention, **numbered):
        engine = make_engine(config, precision, window, weights=False, depth=depth)
        return record_step(engine, gradients=window.gradients or evaluation, evaluation=evaluation)


@contextmanager
def _imitate_gpu(sizes: Any, precision: str) -> Iterator[None]:
    """Makes operations keep the tensors that they keep on a GPU. `sizes`: as in TaskInfo."""
    attend: Any = F.scaled_dot_product_attention
    normalise: Any = F.layer_norm

    def dropout(
        x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> torch.Tensor:
        """Keeps a boolean mask, as on a GPU; on a CPU the mask has the dtype of `x`."""
        del inplace
        return torch.native_dropout(x, p, training)[0]

    def attention(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
        """Keeps no dropout mask: on a CPU it would be quadratic, and GPU kernels make it again."""
        return attend(*tensors, **options | {"dropout_p": 0.0})

    def layer_norm(*arguments: Any) -> torch.Tensor:
        """Computes in fp32 under autocast, as on a GPU."""
        if not torch.is_autocast_enabled("cpu"):
            return normalise(*arguments)
        tensors = (a.float() if isinstance(a, torch.Tensor) else a for a in arguments)
        return normalise(*tensors)

    heads = getattr(sizes, "num_attention_heads", None)
    grouped = getattr(sizes, "num_key_value_heads", heads) != heads
    # No flash or memory-efficient kernel takes grouped queries in fp32.
    kernels = sdpa_kernel(SDPBackend.MATH) if precision == "fp32" and grouped else nullcontext()
    operations = {"dropout": dropout, "scaled_dot_product_attention": attention}
    with set_attributes(F, **operations, layer_norm=layer_norm), kernels:
        yield


class DryEngine(Engine):
    """An engine that computes the same window in every step, and records the allocations."""

    micro_batches: list[MicroBatch]
    recorder: Recorder | None = None
    gradients = False  # as in Window

    def window(self, step: int) -> tuple[list[int], list[MicroBatch]]:
        return [i for micro_batch in self.micro_batches for i in micro_batch], self.micro_batches

    def collate(self, micro_batch: MicroBatch) -> Batch:
        if self.recorder is None:
            return super().collate(micro_batch)
        first = next(iter(self.parallel.trained.values()))
        if self.gradients and first.grad is None:
            self.fill_gradients()
            self.label_gradients(self.recorder)
        with _disable_current_modes():  # numpy arrays become real tensors
            batch = super().collate(micro_batch)
            if fake := getattr(first, "fake_mode", None):
                real = {k: t for k, t in vars(batch).items() if isinstance(t, torch.Tensor)}
                batch = replace(batch, **{k: fake.from_tensor(t) for k, t in real.items()})
        self.recorder.label_tensors(tensors_in(vars(batch)), "activations")
        return batch

    def fill_gradients(self) -> None:
        """Gives every trained weight a gradient of 0."""
        for parameter in self.parallel.trained.values():
            parameter.grad = torch.zeros_like(parameter)

    def label_gradients(self, recorder: Recorder) -> None:
        recorder.label_tensors((p.grad for p in self.parallel.trained.values()), "gradients")

    def clip(self) -> float:
        if self.recorder is not None:
            self.recorder.begin_phase("update")
            self.recorder.label = "update"  # of what the optimizer needs in between
        return super().clip()


def make_engine(
    config: RunConfig,
    precision: str,
    window: Window,
    *,
    weights: bool,
    depth: int | None = None,
    accelerator: Any = None,
) -> DryEngine:
    """Returns an engine that computes `window` in every step.

    `weights`: reads the model's weights; without them they are random. The engine uses the device
    and the processes of `accelerator`. Without one, it uses one process on the CPU, and the
    optimizer already has the state of a first step.
    """
    rows = [row for micro_batch in window.micro_batches for row in micro_batch]
    config = with_values(config, {"train.global_batch": len(rows)})
    tokens = sum(length for length, _ in rows)
    budget = batches.Budget(tokens, window.layout, shared_by=window.shared_by)
    train = config.train
    caches = train.engine == "ddp" and keeps_weight_copies(train)
    context = Context(accelerator or CpuAccelerator(precision, caches))
    task_class = task_of(config)
    examples = task_class.blank_data(config, rows)
    model = task_class.build_model(config, precision, context.accelerator.device, weights, depth)
    task = task_class(config, examples, model, budget, context)
    numbers = iter(range(len(rows)))
    engine = DryEngine(task, config.train, context)
    engine.micro_batches = [[next(numbers) for _ in each] for each in window.micro_batches]
    if accelerator is None:
        engine.fill_gradients()
        engine.parallel.update()
        engine.optimizer.zero_grad()
    return engine


class CpuAccelerator:
    """Replaces an Accelerator for one process on the CPU.

    A process can have only one Accelerator, and that of the run may be on a GPU.
    """

    device, num_processes, process_index, is_main_process = CPU, 1, 0, True
    distributed_type = DistributedType.NO

    def __init__(self, precision: str, caches: bool = True):
        self.precision = precision
        self.caches = caches  # whether copies of weights in that precision live until a pass ends

    def prepare(self, model: nn.Module, optimizer: Any) -> tuple[nn.Module, Any]:
        """Makes the model compute in the precision and return fp32, as Accelerator does."""
        if self.precision != "fp32":
            dtype = dtypes.DTYPES[self.precision]
            autocast = torch.autocast("cpu", dtype, cache_enabled=self.caches)
            model.forward = convert_outputs_to_fp32(autocast(model.forward))
        return model, optimizer

    def reduce(self, tensor: torch.Tensor, _: str) -> torch.Tensor:
        return tensor


def record_step(engine: DryEngine, *, gradients: bool = False, evaluation: bool = False) -> Trace:
    """Returns the allocations of the engine's next step, labelled by use and cut into phases.

    `gradients`: whether gradients exist before the step. `evaluation`: records the held-out loss of
    the first micro-batch in place of the step.
    """
    recorder, model = Recorder(), engine.task.model
    engine.recorder, engine.gradients = recorder, gradients
    recorder.begin_phase("forward")
    for label, tensors in tensors_by_use(model).items():
        recorder.label_tensors(tensors, label)
    state = (t for s in engine.optimizer.state.values() for t in tensors_in(s))
    recorder.label_tensors(state, "optimizer")
    recorder.label, recorder.namespace_labels = "activations", {"bitsandbytes": "dequantisation"}
    with recorder, _label_passes(model, recorder), _observe(recorder):
        if evaluation:
            with generate.eval_mode(model):
                engine.task.eval_loss(engine.model, engine.collate(engine.micro_batches[0]))
        else:
            engine.optimizer_step()
            engine.label_gradients(recorder)
    engine.recorder = None
    return recorder.trace


@contextmanager
def _observe(recorder: Recorder) -> Iterator[None]:
    """Reports what goes to the host, and when checkpointing repeats a forward pass."""
    run = torch.utils.checkpoint._run_fn_with_dynamo_disabled

    def repeat(*arguments: Any, **options: Any) -> None:
        recorder.recomputing = True
        try:
            run(*arguments, **options)
        finally:
            recorder.recomputing = False

    def on_copy(tensor: torch.Tensor) -> None:
        recorder.label_tensors([tensor], OFFLOADED)

    with (
        set_attributes(torch.utils.checkpoint, _run_fn_with_dynamo_disabled=repeat),
        set_attributes(offload, on_copy=on_copy),
    ):
        yield


def tensors_by_use(model: nn.Module) -> dict[str, list[torch.Tensor]]:
    """Returns all tensors that a model keeps, by their use."""
    weights, adapters, states = list(model.buffers()), list[torch.Tensor](), list[torch.Tensor]()
    own = set(weights_to_save(model).values()) if hasattr(model, "peft_config") else set()
    for parameter in model.parameters():
        (adapters if parameter in own else weights).append(parameter)
        state = getattr(parameter, "quant_state", None)
        while state is not None:
            states += tensors_in(vars(state))
            state = state.state2
    return {"weights": weights, "adapters": adapters, "quantisation state": states}


def tensors_in(values: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    """Yields the values that are tensors."""
    return (value for value in values.values() if isinstance(value, torch.Tensor))


@contextmanager
def _label_passes(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Begins a phase with each forward pass, each loss (from the head on) and backward pass."""
    count = 0

    def before_model(*_: object) -> None:
        nonlocal count
        count += 1
        recorder.label = "activations"
        recorder.begin_phase(f"forward {count}")

    def before_head(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        recorder.label = "logits and loss"
        recorder.begin_phase(f"loss {count}")
        if inputs[0].requires_grad:
            inputs[0].register_hook(after_head_backward)

    def after_head_backward(_: torch.Tensor) -> None:
        recorder.label = "backward"
        recorder.begin_phase(f"backward {count}")

    def after_embedding(_: nn.Module, __: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(before_embedding_backward)

    def before_embedding_backward(_: torch.Tensor) -> None:
        recorder.begin_phase(f"backward of the embedding {count}")

    embeddings, head = embedding_layers(model)
    handles = [model.register_forward_pre_hook(before_model)]
    if embeddings is not None:
        handles.append(embeddings.register_forward_hook(after_embedding))
    if head is not None:
        handles.append(head.register_forward_pre_hook(before_head))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
