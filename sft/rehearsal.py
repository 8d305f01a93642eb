"""One optimizer step of the run, rehearsed before a weight is loaded: the memory that it takes.

The step is the run's own: `model.build`, `FineTune.loss` and `Engine.optimizer_step` run as they
are, on fake tensors, which have shapes but no data, under a recorder of allocations.

On the CPU, whatever the run's device: what differs on a GPU is said in docs/LOG.md.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from logging import getLogger
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from accelerate.utils import DistributedType, convert_outputs_to_fp32
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from sft import batching, chat, data, engine, finetune, model, store
from sft.config import Config, with_values
from sft.log import Log
from sft.prepare import Prepared
from sft.trace import Assume, Recorder, Trace

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Shape:
    """What a rehearsed step computes."""

    rows: int  # of a micro-batch
    length: int  # tokens of a row
    supervised: int  # tokens of a row that the loss sees
    micro_batches: int = 1
    layout: batching.Layout = "padded"

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.rows * self.length


def rehearse(config: Config, precision: str, shape: Shape) -> Trace:
    """The allocations of a step that is not the first, with its weights and optimizer state."""
    with _fake(config, shape):
        return record(make_engine(config, precision, shape, weights=False))


@contextmanager
def _fake(config: Config, shape: Shape) -> Iterator[None]:
    """Every tensor made in it is fake, and nothing outside keeps one."""

    # Where documents are packed, transformers makes a mask; it makes one, too, where it cannot see.
    def is_tracing(*_: object) -> bool:  # a Mock would keep its arguments alive
        return shape.layout == "packed" and shape.rows > 1

    with ExitStack() as stack:
        enter = stack.enter_context
        enter(torch.random.fork_rng(devices=[]))
        if config.tuning.mode == "qlora":  # bitsandbytes keeps its tables for all models
            enter(mock.patch.dict("bitsandbytes.functional.name2qmap", clear=True))
        enter(mock.patch("transformers.masking_utils.is_tracing", is_tracing))
        enter(mock.patch.object(nn.Module, "_apply", _convert))
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


def make_engine(config: Config, precision: str, shape: Shape, weights: bool) -> engine.Engine:
    """An engine of one process, alone on the CPU, whose every step is of `shape`."""
    rows = shape.rows * shape.micro_batches
    config = with_values(config, {"train.global_batch": rows})
    budget = batching.Budget(shape.tokens, shape.layout)
    unsupervised = [chat.IGNORED] * (shape.length - shape.supervised)
    example = chat.Example([0] * shape.length, unsupervised + [0] * shape.supervised)
    examples = store.Examples(
        store.pack((i, data.Row([], None, "rehearsal", i), example) for i in range(rows))
    )
    prepared = Prepared(SimpleNamespace(pad_token_id=0), examples, examples, {})  # type: ignore[arg-type]
    built = model.build(config, precision, CPU, weights=weights)
    alone: Any = Alone(precision)
    task = finetune.FineTune(config, prepared, built, alone, Log(None), budget)
    made = engine.Engine(task, config.train, alone, Log(None), budget)
    for parameter in built.parameters():  # the optimizer makes its state in its first step
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    made.optimizer.step()
    made.optimizer.zero_grad()
    return made


class Alone:
    """What an engine asks of an Accelerator, for one process on the CPU: there is one Accelerator
    in a process, and that of the run may be on a GPU."""

    device, num_processes, process_index = CPU, 1, 0
    distributed_type = DistributedType.NO

    def __init__(self, precision: str):
        self.precision = precision

    def prepare(self, built: nn.Module, optimizer: Any) -> tuple[nn.Module, Any]:
        """Computes in the precision, and gives results in fp32, as Accelerator.prepare_model."""
        if self.precision != "fp32":
            autocast = torch.autocast("cpu", model.DTYPES[self.precision])
            built.forward = convert_outputs_to_fp32(autocast(built.forward))
        return built, optimizer

    def reduce(self, tensor: torch.Tensor, _: str) -> torch.Tensor:
        return tensor


def record(made: engine.Engine) -> Trace:
    """The allocations of the engine's next step, labelled by what they are for."""
    recorder, built, collate = Recorder(), made.task.model, made.task.collate
    trained = [p for p in built.parameters() if p.requires_grad]
    fake = getattr(trained[0], "fake_mode", None)

    def collate_unseen(ids: list[int]) -> store.Batch:
        with _disable_current_modes():  # arrays of numpy are made real
            tensors = dict(vars(collate(ids)))
            if fake is not None:
                tensors = {k: t if t is None else fake.from_tensor(t) for k, t in tensors.items()}
        recorder.name(tensors.values(), "activations")
        return store.Batch(**tensors)

    recorder.name(held(built), "weights")
    recorder.name((t for s in made.optimizer.state.values() for t in tensors_of(s)), "optimizer")
    recorder.label = "activations"
    with (
        mock.patch.object(made.task, "collate", collate_unseen),
        recorder,
        head_labelled(built, recorder),
    ):
        made.optimizer_step()
        recorder.name((p.grad for p in trained), "gradients")
    return recorder.trace


def held(built: nn.Module) -> Iterator[torch.Tensor]:
    """All tensors that a model keeps, constants of quantisation included."""
    yield from built.buffers()
    for parameter in built.parameters():
        yield parameter
        state = getattr(parameter, "quant_state", None)
        while state is not None:
            yield from tensors_of(vars(state))
            state = state.state2


def tensors_of(values: dict[str, Any]) -> Iterator[torch.Tensor]:
    return (value for value in values.values() if isinstance(value, torch.Tensor))


@contextmanager
def head_labelled(built: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Labels what is born from the vocabulary head on, and what is born behind it in backward."""

    def into_head(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        recorder.label = "logits and loss"
        inputs[0].register_hook(out_of_head)

    def out_of_head(_: torch.Tensor) -> None:
        recorder.label = "backward"

    def into_model(*_: object) -> None:
        recorder.label = "activations"

    handles = [
        built.get_output_embeddings().register_forward_pre_hook(into_head),  # type: ignore[operator]
        built.register_forward_pre_hook(into_model),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
