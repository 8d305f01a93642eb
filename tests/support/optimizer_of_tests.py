"""Optimizers that a run cannot resume, given by their import path."""

from __future__ import annotations

from typing import Any

import torch


class Plain(torch.optim.Optimizer):
    """Descends the gradient by its rate."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    def rate(self, group: dict[str, Any], parameter: torch.Tensor) -> Any:
        return group["lr"]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(self.rate(group, parameter) * parameter.grad)


class Noisy(Plain):
    """Draws random numbers."""

    def rate(self, group: dict[str, Any], parameter: torch.Tensor) -> Any:
        return group["lr"] * torch.rand(())


class Forgetful(Plain):
    """Counts in an attribute, which is no state."""

    count = 0

    def rate(self, group: dict[str, Any], parameter: torch.Tensor) -> Any:
        self.count += 1
        return group["lr"] / self.count


class Listing(Plain):
    """Keeps a list of tensors."""

    def rate(self, group: dict[str, Any], parameter: torch.Tensor) -> Any:
        self.state[parameter].setdefault("history", []).append(parameter.grad)
        return group["lr"]
