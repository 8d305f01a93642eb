"""Run by two ranks: a model that chooses experts, some of which get no token on a rank, or on any.

branch_worker.py OUT; every rank writes what it saw with each engine to OUT/rank<n>.pt
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tiny
import torch
from accelerate.state import AcceleratorState, PartialState
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from sft.errors import ConfigError
from sft.models.layers import full_tensor
from sft.runtime import processes
from sft.train.parallel import share_model

WORDS, WIDTH, EXPERTS, STEPS = 16, 12, 4, 3
RATE = 0.2
ENGINES = ("ddp", "fsdp", "fsdp_all", "zero1", "zero2", "zero3")  # after DeepSpeed, no other
TOKENS = [[0, 0, 5, 1], [2, 6, 1, 2]]  # of each rank, in two micro-batches; `% EXPERTS`: the expert


class Layer(nn.Module):
    """Sends each token to one expert. An expert without a token does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(EXPERTS))
        self.ran: list[list[int]] = []  # the experts that ran, in each pass

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.router(x).softmax(-1)
        best, chosen = scores.max(-1)
        result = torch.zeros_like(x)
        self.ran.append(chosen.unique().tolist())
        for number in self.ran[-1]:
            row, time = (chosen == number).nonzero(as_tuple=True)
            own = self.experts[number](x[row, time]).tanh() * best[row, time, None]
            result = result.index_put((row, time), own)
        return x + result


class Config(PreTrainedConfig):
    model_type = "branching"


class Net(PreTrainedModel):
    config_class = Config

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.table = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        x = self.table(input_ids)
        for layer in self.layers:
            x = layer(x)
        return SimpleNamespace(logits=self.head(x))


def make_net() -> Net:
    """Returns a network in which a token's id, modulo EXPERTS, is its expert in both layers."""
    torch.manual_seed(0)
    net = Net(Config(tie_word_embeddings=False, hidden_size=WIDTH, vocab_size=WORDS))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
        net.table.weight[torch.arange(WORDS), torch.arange(WORDS) % EXPERTS] += 3
        for layer in net.layers:
            layer.router.weight.copy_(5 * torch.eye(EXPERTS, WIDTH))
    return net


def loss_of(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Returns this part's share of the mean over all tokens."""
    wanted = (ids.flatten() * 7 + 3) % WORDS
    count = sum(map(len, TOKENS))
    return nn.functional.cross_entropy(logits.flatten(0, 1), wanted, reduction="sum") / count


def train(engine: str, out: Path) -> dict[str, Any]:
    """Returns what this rank sees of steps of two micro-batches, or what is refused."""
    AcceleratorState._reset_state(False)  # Accelerate takes one DeepSpeed configuration a process
    given: dict[str, Any] = {"optimizer": "torch.optim.SGD", "learning_rate": RATE}
    if engine.startswith("zero"):
        given |= {"engine": "deepspeed", "deepspeed_config": str(out / f"{engine}.json")}
    elif engine.startswith("fsdp"):
        given |= {"engine": "fsdp", "keep_whole": "all" if engine == "fsdp_all" else False}
    configured = tiny.config(out, precision="fp32", **given).train
    accelerator = processes.start_processes(configured)
    net = make_net()
    try:
        parallel = share_model(net, configured, accelerator)
    except ConfigError as error:
        return {"refused": str(error)}
    own = torch.tensor(TOKENS[accelerator.process_index])[None]
    seen: dict[str, Any] = {"norms": [], "losses": []}
    for _ in range(STEPS):
        parallel.begin_step()
        losses = []
        for index, part in enumerate(own.chunk(2, 1)):
            with parallel.no_sync():
                losses.append(loss_of(parallel.model(input_ids=part).logits, part))
            parallel.prepare_backward(index == 1)
            parallel.backward(losses[-1] * parallel.loss_factor)
        seen["losses"].append(sum(map(float, losses)))
        seen["norms"].append(parallel.clip())
        parallel.update()
    seen["ran"] = [layer.ran for layer in net.layers]
    return seen | {"weights": {name: full_tensor(p) for name, p in parallel.trained.items()}}


def main(out: Path) -> None:
    found = {engine: train(engine, out) for engine in ENGINES}
    state = PartialState()
    torch.save(found, out / f"rank{state.process_index}.pt")
    state.wait_for_everyone()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
