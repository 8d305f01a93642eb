"""One optimizer step of the run, rehearsed before a weight is loaded: the memory that it takes.

The step is the run's own: `model.build`, the task's loss and `Engine.optimizer_step` run as they
are, on fake tensors, which have shapes but no data, under a recorder of allocations.

On the CPU, whatever the run's device; for a GPU operations keep what they would keep there, as far
as they can tell (docs/PLAN.md).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from logging import getLogger
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from accelerate.utils import DistributedType, convert_outputs_to_fp32
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import _disable_current_modes

from sft.config.load import with_values
from sft.config.schema import RunConfig
from sft.data import batches
from sft.evaluate import generate
from sft.models import dtypes, load
from sft.models.attention import needs_no_mask
from sft.models.layers import embedding_layers
from sft.models.load import keep_layers
from sft.plan.trace import Assume, Recorder, Trace
from sft.runtime.context import Context
from sft.tasks.base import Row
from sft.tasks.registry import task_of
from sft.train.engine import Engine
from sft.train.task import Batch

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Window:
    """What one process computes in an optimizer step."""

    micro_batches: tuple[tuple[Row, ...], ...]
    layout: batches.Layout = "padded"
    gradients: bool = False  # are there from the start: of earlier micro-batches, in DDP's buckets
    waiting: int = 0  # tokens of other micro-batches that are there; `memory` adds them

    @property
    def tokens(self) -> int:
        """That the last micro-batch computes."""
        lengths = [length for length, _ in self.micro_batches[-1]]
        return sum(lengths) if self.layout == "packed" else len(lengths) * max(lengths)


def uniform(
    rows: int,
    length: int,
    supervised: int,
    micro_batches: int = 1,
    layout: batches.Layout = "padded",
) -> Window:
    """`micro_batches` of as many `rows`, all of one length."""
    return Window((((length, supervised),) * rows,) * micro_batches, layout)


def rehearse(
    config: RunConfig,
    precision: str,
    window: Window,
    *,
    depth: int | None = None,
    on_gpu: bool = False,
    evaluation: bool = False,
) -> Trace:
    """The allocations of a step that is not the first, with its weights and optimizer state; or of
    a held-out loss behind one (`evaluation`), when gradients are still there.

    `depth`: layers, instead of all that the model has. `on_gpu`: as they would be on a GPU, as far
    as an operation can tell.
    """
    task = task_of(config)
    own = task.info(config)
    isolates = needs_no_mask(own.attention, precision, on_gpu)
    if isolates:  # its kernels need a GPU; what they keep is what SDPA keeps, where a model has it
        config = with_values(config, {"model.attn_implementation": "auto"})
    if depth is not None:
        config = task.with_depth(config, depth)
    masked = window.layout == "packed" and max(map(len, window.micro_batches)) > 1 and not isolates
    with _fake(config, masked, depth), _like_a_gpu(config, precision) if on_gpu else nullcontext():
        made = make_engine(config, precision, window, weights=False)
        return record(made, gradients=window.gradients or evaluation, evaluation=evaluation)


@contextmanager
def _fake(config: RunConfig, masked: bool, depth: int | None) -> Iterator[None]:
    """Every tensor made in it is fake, and nothing outside keeps one.

    `masked`: transformers makes a mask, as it does for packed documents; it would make one, too,
    where it cannot see whether it needs one.
    """

    def is_tracing(*_: object) -> bool:  # a Mock would keep its arguments alive
        return masked

    whole = load.architecture

    def architecture(asked: Any) -> Any:
        return whole(asked) if depth is None else keep_layers(whole(asked), depth)

    with ExitStack() as stack:
        enter = stack.enter_context
        enter(torch.random.fork_rng(devices=[]))
        if (
            task_of(config).info(config).mode == "qlora"
        ):  # bitsandbytes keeps its tables for all models
            enter(mock.patch.dict("bitsandbytes.functional.name2qmap", clear=True))
        enter(mock.patch("transformers.masking_utils.is_tracing", is_tracing))
        enter(mock.patch.object(nn.Module, "_apply", _convert))
        enter(mock.patch.object(load, "architecture", architecture))
        enter(warnings.catch_warnings(action="ignore"))  # the real build gives them, too
        # Of a failure torch logs the trace; the plan falls back on a closed form and says why.
        enter(mock.patch.object(getLogger("torch._subclasses.fake_tensor"), "disabled", True))
        enter(FakeTensorMode(allow_non_fake_inputs=True))
        enter(Assume())
        yield


def _convert(module: nn.Module, function: Callable[[Any], Any], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply`, which swaps parameters in place; fake ones refuse that."""
    for child in module.children() if recurse else ():
        _convert(child, function)
    for name, parameter in module._parameters.items():
        if parameter is not None and (value := function(parameter)) is not parameter:
            module._parameters[name] = nn.Parameter(value.detach(), parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = function(buffer)
    return module


@contextmanager
def _like_a_gpu(config: RunConfig, precision: str) -> Iterator[None]:
    """Operations keep what they would keep on a GPU."""
    attend: Any = F.scaled_dot_product_attention
    normalise: Any = F.layer_norm

    def dropout(
        x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> torch.Tensor:
        """Its mask is one of booleans, on a CPU one of numbers."""
        del inplace
        return torch.native_dropout(x, p, training)[0]

    def attention(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
        """Its kernels make the mask of dropout again; on a CPU it would be quadratic and kept."""
        return attend(*tensors, **options | {"dropout_p": 0.0})

    def layer_norm(*arguments: Any) -> torch.Tensor:
        """In fp32 under autocast."""
        if not torch.is_autocast_enabled("cpu"):
            return normalise(*arguments)
        tensors = (a.float() if isinstance(a, torch.Tensor) else a for a in arguments)
        return normalise(*tensors)

    text = task_of(config).info(config).text
    heads = getattr(text, "num_attention_heads", None)
    grouped = getattr(text, "num_key_value_heads", heads) != heads
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(F, "dropout", dropout))
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", attention))
        stack.enter_context(mock.patch.object(F, "layer_norm", layer_norm))
        if precision == "fp32" and grouped:  # no flash or memory-efficient kernel takes these
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def make_engine(
    config: RunConfig, precision: str, window: Window, weights: bool, accelerator: Any = None
) -> Engine:
    """An engine whose every step is `window`: on the device of an Accelerator, in its processes; or
    (None) alone on the CPU and behind its first step, in which the optimizer makes its state."""
    rows = [row for micro_batch in window.micro_batches for row in micro_batch]
    config = with_values(config, {"train.global_batch": len(rows)})
    budget = batches.Budget(sum(length for length, _ in rows), window.layout)
    context = Context(accelerator or Alone(precision, config.train.engine))
    kind = task_of(config)
    task = kind.build(config, kind.blank_data(config, rows), precision, budget, context, weights)
    made = Engine(task, config.train, context, budget)
    numbers = iter(range(len(rows)))
    micro_batches = [[next(numbers) for _ in each] for each in window.micro_batches]
    made.window = lambda step: (list(range(len(rows))), micro_batches)  # type: ignore[method-assign]
    if accelerator is None:
        for parameter in task.model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        made.optimizer.step()
        made.optimizer.zero_grad()
    return made


class Alone:
    """What an engine asks of an Accelerator, for one process on the CPU: there is one Accelerator
    in a process, and that of the run may be on a GPU."""

    device, num_processes, process_index, is_main_process = CPU, 1, 0, True
    distributed_type = DistributedType.NO

    def __init__(self, precision: str, engine: str = "ddp"):
        self.precision = precision
        self.caches = engine == "ddp"  # bf16 copies of weights live through a forward pass

    def prepare(self, built: nn.Module, optimizer: Any) -> tuple[nn.Module, Any]:
        """Computes in the precision, and gives results in fp32, as Accelerator.prepare_model."""
        if self.precision != "fp32":
            dtype = dtypes.DTYPES[self.precision]
            autocast = torch.autocast("cpu", dtype, cache_enabled=self.caches)
            built.forward = convert_outputs_to_fp32(autocast(built.forward))
        return built, optimizer

    def reduce(self, tensor: torch.Tensor, _: str) -> torch.Tensor:
        return tensor

    def no_sync(self, _: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()


def record(made: Engine, *, gradients: bool = False, evaluation: bool = False) -> Trace:
    """The allocations of the engine's next step, or of a held-out loss of its first micro-batch:
    labelled by what they are for, in phases.

    `gradients`: as if there were some from the start.
    """
    recorder, built, collate = Recorder(), made.task.model, made.task.collate
    trained = [p for p in built.parameters() if p.requires_grad]
    fake = getattr(trained[0], "fake_mode", None)
    update = made.parallel.clip

    def collate_unseen(ids: list[int]) -> Batch:
        with _disable_current_modes():  # arrays of numpy are made real
            batch = collate(ids)
            if fake is not None:
                real = {k: t for k, t in vars(batch).items() if isinstance(t, torch.Tensor)}
                batch = replace(batch, **{k: fake.from_tensor(t) for k, t in real.items()})
        recorder.name(tensors_of(vars(batch)), "activations")
        return batch

    def update_seen() -> float:
        recorder.enter("update")
        return update()

    recorder.enter("forward")
    for label, tensors in held(built).items():
        recorder.name(tensors, label)
    recorder.name((t for s in made.optimizer.state.values() for t in tensors_of(s)), "optimizer")
    if gradients:
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        recorder.name((p.grad for p in trained), "gradients")
    recorder.label, recorder.labels = "activations", {"bitsandbytes": "dequantisation"}
    with (
        mock.patch.object(made.optimizer, "zero_grad") if gradients else nullcontext(),
        mock.patch.object(made.task, "collate", collate_unseen),
        mock.patch.object(made.parallel, "clip", update_seen),
        recorder,
        _labelled(built, recorder),
    ):
        if evaluation:
            with generate.eval_mode(built):
                made.task.eval_loss(made.model, made.task.collate(made.window(0)[1][0]))
            return recorder.trace
        made.optimizer_step()
        recorder.name((p.grad for p in trained), "gradients")
    return recorder.trace


def held(built: nn.Module) -> dict[str, list[torch.Tensor]]:
    """All tensors that a model keeps, by what they are."""
    result: dict[str, list[torch.Tensor]] = {
        "weights": list(built.buffers()),
        "adapters": [],
        "quantisation state": [],
    }
    for name, parameter in built.named_parameters():
        result["adapters" if "lora_" in name else "weights"].append(parameter)
        state = getattr(parameter, "quant_state", None)
        while state is not None:
            result["quantisation state"] += tensors_of(vars(state))
            state = state.state2
    return result


def tensors_of(values: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    return (value for value in values.values() if isinstance(value, torch.Tensor))


@contextmanager
def _labelled(built: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Forward, loss (from the vocabulary head on) and backward of each micro-batch."""
    count = 0

    def into_model(*_: object) -> None:
        nonlocal count
        count += 1
        recorder.label = "activations"
        recorder.enter(f"forward {count}")

    def into_head(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        recorder.label = "logits and loss"
        recorder.enter(f"loss {count}")
        if inputs[0].requires_grad:
            inputs[0].register_hook(out_of_head)

    def out_of_head(_: torch.Tensor) -> None:
        recorder.label = "backward"
        recorder.enter(f"backward {count}")

    def behind_embedding(_: nn.Module, __: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(into_embedding)

    def into_embedding(_: torch.Tensor) -> None:
        recorder.enter(f"backward of the embedding {count}")

    embeddings, head = embedding_layers(built)
    handles = [built.register_forward_pre_hook(into_model)]
    if embeddings is not None:
        handles.append(embeddings.register_forward_hook(behind_embedding))
    if head is not None:
        handles.append(head.register_forward_pre_hook(into_head))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
