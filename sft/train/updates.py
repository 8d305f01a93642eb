"""Updates parameters one at a time: bf16 weights through fp32, and updates in the backward pass.

**bf16 weights** (`train.precision: bf16_pure`). A parameter, its gradient and its moments are
copied to fp32, any optimizer updates the copies, and the results are rounded stochastically
(`rounding`). The copies of one parameter, or of one part of it, exist at a time.

**In the backward pass** (`train.optimizer_in_backward`). A parameter is updated as soon as the last
backward pass of a step has its gradient, which is then freed (Lv et al. 2023, Full Parameter
Fine-tuning for Large Language Models with Limited Resources, call it fused backward).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from sft.config.schema import Train
from sft.errors import ConfigError, NonFiniteError
from sft.models.fake import block_starts
from sft.runtime.hardware import resolve_precision
from sft.train.rounding import round_into

PART = 2**24  # elements of a parameter that are updated at once, where the optimizer allows it
# of a tensor -> a view of this rank's elements, flat, and where they start in the flat whole
Slice = Callable[[Any], tuple[torch.Tensor, int]]


class Updates:
    """Applies an optimizer to parameters one at a time."""

    step = 0  # of the run, on which the noise of rounding depends
    factor = 1.0  # of the gradient of bf16 weights, to clip it without rounding it again

    def __init__(
        self, train: Train, optimizer: Any, trained: Mapping[str, nn.Parameter], cut: Slice
    ):
        self.optimizer, self.seed, self.is_bf16 = optimizer, train.seed, train.is_bf16_pure
        self.names = {parameter: name for name, parameter in trained.items()}
        self.cut = cut
        # Elements that do not depend on each other can be updated in parts.
        self.has_parts = type(optimizer) is torch.optim.AdamW
        self.is_torch = "bitsandbytes" not in type(optimizer).__module__

    def begin_step(self, step: int) -> None:
        self.step = step

    def clip(self, max_norm: float) -> float:
        """Returns the norm of the gradient; `apply_all` scales it down to `max_norm`, in fp32."""
        norm = total_norm([gradient_norm(parameter.grad) for parameter in self.names])
        self.factor = min(1.0, max_norm / (norm + 1e-6))
        return norm

    def apply_all(self) -> None:
        """Updates every parameter that has a gradient."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.apply(group, parameter)

    def apply(self, group: dict[str, Any], parameter: nn.Parameter) -> None:
        """Updates one parameter, which belongs to `group` and has a gradient."""
        if not self.is_bf16:
            self._step(group, parameter)
            return
        (weight, start), (grad, _) = self.cut(parameter), self.cut(parameter.grad)
        shape, number = _local(parameter).shape, weight.numel()
        size = PART if self.has_parts else max(1, number)
        before = {key: _local(value) for key, value in self.optimizer.state[parameter].items()}
        after: dict[str, Any] = {}
        for at in block_starts(weight, size) or (0,):
            part = slice(at, at + size)
            form = (-1,) if self.has_parts else shape
            twin = weight[part].float().view(form)
            twin.grad = grad[part].float().view(form).mul_(self.factor)
            self.optimizer.state[twin] = {
                key: value.view(-1)[part].float().view_as(twin)
                if self._is_moment(key, value, shape)
                else _copy(value)
                for key, value in before.items()
            }
            self._step(group, twin)
            noise = start + at, self.seed, self.step, self.names[parameter]
            round_into(weight[part], twin, *noise, "weight")
            for key, value in self.optimizer.state.pop(twin).items():
                if self._is_moment(key, value, twin.shape):
                    if key not in after:
                        known = before.get(key)
                        after[key] = known if _is_bf16(known) else weight.new_empty(shape)
                    round_into(after[key].view(-1)[part], value, *noise, key)
                else:
                    after[key] = value
        self.optimizer.state[parameter] = {
            key: _shared(value, parameter) if _is_bf16(value) else value
            for key, value in after.items()
        }

    def _is_moment(self, key: str, value: Any, shape: torch.Size) -> bool:
        """Returns whether a value of the state has a number for each weight, stored in bf16."""
        is_tensor = isinstance(value, torch.Tensor) and value.dtype.is_floating_point
        return self.is_torch and key != "step" and is_tensor and value.shape == shape

    def _step(self, group: dict[str, Any], parameter: torch.Tensor) -> None:
        """Makes the optimizer update only this parameter."""
        groups = self.optimizer.param_groups
        self.optimizer.param_groups = [group | {"params": [parameter]}]
        try:
            self.optimizer.step()
        finally:
            self.optimizer.param_groups = groups


class BackwardUpdates(Updates):
    """Updates a parameter as soon as its gradient is complete, and frees the gradient."""

    def __init__(self, accelerator: Any, train: Train, *arguments: Any):
        super().__init__(train, *arguments)
        self.accelerator = accelerator
        self.is_last = False  # whether the backward pass that runs is the step's last
        self.losses: list[torch.Tensor] = []  # of the step so far, on this rank
        self.norms: dict[nn.Parameter, torch.Tensor] = {}  # of the gradients that are used up
        self.groups: dict[nn.Parameter, dict[str, Any]] = {}
        self._refuse(train)
        for parameter in self.names:
            parameter.register_post_accumulate_grad_hook(self._use)

    def _refuse(self, train: Train) -> None:
        """Raises ConfigError where weights cannot be updated in the backward pass."""
        refused = "train.optimizer_in_backward: "
        if self.accelerator.num_processes > 1 and train.engine == "ddp":
            raise ConfigError(
                f"{refused}DDP keeps all gradients in its buffers of exchange, so nothing would be "
                "saved: set train.engine: fsdp, or remove this key"
            )
        if resolve_precision(train)[0] == "fp16":
            raise ConfigError(
                f"{refused}in fp16 a step whose gradients overflow is repeated, which needs the "
                "weights of before: set train.precision, or remove this key"
            )

    def begin_step(self, step: int) -> None:
        super().begin_step(step)
        self.losses, self.norms = [], {}

    def backward(self, loss: torch.Tensor, is_last: bool) -> None:
        """Runs a backward pass; the step's last one not if a loss is not finite on any rank."""
        self.losses.append(loss.detach())
        if is_last and not self._are_finite():
            return  # the engine ends the run; no weight has changed
        self.is_last = is_last
        groups = self.optimizer.param_groups  # a resumed optimizer has new ones
        self.groups = {parameter: group for group in groups for parameter in group["params"]}
        try:
            loss.backward()
        finally:
            self.is_last = False

    def _are_finite(self) -> bool:
        fine = torch.stack(self.losses).isfinite().all().float()
        world = self.accelerator.num_processes
        return float(self.accelerator.reduce(fine, "sum") if world > 1 else fine) == world

    def finish(self) -> float:
        """Updates what got no gradient, as if it were 0, and returns the gradient's norm."""
        for parameter in self.names:
            if parameter not in self.norms:
                parameter.grad = torch.zeros_like(parameter)
                self._update(parameter)
        norm = total_norm([self.norms[parameter] for parameter in self.names])
        if not math.isfinite(norm):
            raise NonFiniteError(
                f"gradient norm is {norm} in step {self.step + 1}. With "
                "train.optimizer_in_backward it is known only after the update: these weights are "
                "lost, and no checkpoint of the step exists. Without that key, a resumed run "
                "names the examples, or skips them with train.skip_nonfinite."
            )
        return norm

    def _use(self, parameter: nn.Parameter) -> None:
        if self.is_last:
            self._update(parameter)

    def _update(self, parameter: Any) -> None:
        assert parameter not in self.norms, "a gradient is complete once in the last pass"
        self.norms[parameter] = gradient_norm(parameter.grad)
        self.apply(self.groups[parameter], parameter)
        parameter.grad = None


def make_updates(
    train: Train,
    accelerator: Any,
    optimizer: Any,
    trained: Mapping[str, nn.Parameter],
    cut: Slice,
) -> Updates | None:
    """Returns what updates parameters one at a time; None if the optimizer updates all at once."""
    if train.optimizer_in_backward:
        return BackwardUpdates(accelerator, train, optimizer, trained, cut)
    return Updates(train, optimizer, trained, cut) if train.is_bf16_pure else None


def gradient_norm(gradient: Any) -> torch.Tensor:
    """Returns the norm of a gradient, in fp32."""
    return torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32)


def total_norm(norms: list[torch.Tensor]) -> float:
    """Returns the norm of a gradient from those of its parts. Collective if these are split."""
    norm: Any = torch.linalg.vector_norm(torch.stack(norms))
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def _is_bf16(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16


def _copy(value: Any) -> Any:
    """Returns a copy of the count of steps, which parts must not raise twice; or the value."""
    return value.clone() if isinstance(value, torch.Tensor) and value.ndim == 0 else value


def _local(value: Any) -> Any:
    return value.to_local() if hasattr(value, "to_local") else value


def _shared(value: torch.Tensor, parameter: Any) -> torch.Tensor:
    """Returns this rank's part of a tensor as a DTensor, if the parameter is one."""
    if not hasattr(parameter, "device_mesh"):
        return value
    from torch.distributed.tensor import DTensor

    whole = {"shape": parameter.shape, "stride": parameter.stride(), "run_check": False}
    return DTensor.from_local(value, parameter.device_mesh, parameter.placements, **whole)
