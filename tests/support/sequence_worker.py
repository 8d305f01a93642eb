"""Run by several ranks: shared sequences against whole ones; every rank writes what it saw.

sequence_worker.py OUT types SIZE TYPE...      tiny models of these types, one after the other
sequence_worker.py OUT engine CASES.json       a step and an evaluation of the engine for each case
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import families
import tiny
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, PartialState
from torch import distributed, nn

from sft.config.load import with_values
from sft.config.schema import Train
from sft.data import batches, template
from sft.data.examples import Batch, collate, share
from sft.errors import ConfigError, UserError
from sft.models import attention, checkpointing
from sft.models.fake import set_attributes
from sft.models.sequences import SequenceGroup, find_difference
from sft.plan import network
from sft.runtime import processes

CPU = torch.device("cpu")


def loss(model: nn.Module, batch: Batch, layout: str) -> torch.Tensor:
    """The sum of the cross-entropy at the supervised positions."""
    with attention.known_documents(batch.lengths if layout == "packed" else ()):
        logits = model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
        ).logits
    return F.cross_entropy(logits.flatten(0, 1)[batch.positions], batch.targets, reduction="sum")


def gradient(model: nn.Module) -> torch.Tensor:
    """The flat gradient of all trained weights, which it removes."""
    found = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    model.zero_grad()
    return torch.cat([each.flatten() for each in found])


def examples() -> list[template.Example]:
    """Three of 17, 9 and 6 tokens, no multiple of anything, of which half are supervised."""
    ids = [(11 * i + 3) % 900 for i in range(32)]
    labels = [t if i % 2 else template.IGNORED for i, t in enumerate(ids)]
    parts = [slice(0, 17), slice(17, 26), slice(26, 32)]
    return [template.Example(ids=ids[part], labels=labels[part]) for part in parts]


def compare(model_type: str, layout: Any, group: SequenceGroup) -> dict[str, Any]:
    """What is refused, or how far the shared loss and gradient are from those of one process."""
    model = families.tiny_model(model_type, torch.float64).eval()
    model.config._experts_implementation = "batched_mm"  # for tensors of any dtype
    rows = tiny.stored(examples())
    group.follow(model)
    try:
        if attention.reads_later_tokens(model, "fp32", CPU):
            return {"refused": "tokens see those that follow"}
        if layout == "packed" and not attention.keep_documents_apart(model, "fp32", CPU):
            return {"refused": "packed documents attend to each other"}
        if reason := find_difference(model, group.size, "fp64", CPU, layout == "packed"):
            return {"refused": reason}
    except (ConfigError, UserError) as error:
        return {"refused": str(error)}
    whole = collate(rows, range(3), 0, layout, CPU)
    expected = loss(model, whole, layout)
    expected.backward()
    gradients = gradient(model)
    own = share(whole, group.rank, group.size, 0)
    group.share(own.position_ids, own.whole_positions)
    with counted_exchange() as sent:
        part = loss(model, own, layout)
        part.backward()
    found = torch.cat([part.detach().view(1), gradient(model)])
    distributed.all_reduce(found)
    error = (found[1:] - gradients).norm() / gradients.norm()
    return {
        "loss": float((found[0] - expected.detach()) / expected.detach()),
        "gradient": float(error),
        "sent": sum(sent),
        "planned": network.exchanged_bytes(
            model.config, group.size, 8, own.input_ids.numel(), passes=2
        ),
    }


def of_types(size: int, types: list[str]) -> dict[str, Any]:
    accelerator = processes.start_processes(Train(output_dir="none"))
    group = SequenceGroup.of(accelerator, size)
    result: dict[str, Any] = {}
    for name in types:
        for layout in ("padded", "packed"):
            try:
                result[f"{name} {layout}"] = compare(name, layout, group)
            except Exception as error:  # noqa: BLE001  # the test looks at it
                result[f"{name} {layout}"] = {"failed": f"{type(error).__name__}: {error}"}
    return result


@contextmanager
def counted_exchange() -> Iterator[list[int]]:
    """Gives the bytes that each exchange sends to other processes, in this context."""
    sent: list[int] = []
    exchange = distributed.all_to_all_single

    def count(out: torch.Tensor, own: torch.Tensor, group: Any) -> None:
        size = distributed.get_world_size(group)
        sent.append(own.nbytes * (size - 1) // size)
        exchange(out, own, group=group)

    with set_attributes(distributed, all_to_all_single=count):
        yield sent


def of_engine(out: Path, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    result = []
    for case in cases:
        AcceleratorState._reset_state(False)  # Accelerate takes one DeepSpeed configuration
        settings = tiny.config(out, global_batch=9, precision="fp32", **case["train"])
        settings = with_values(settings, case.get("changes", {}))
        rows, held_out = tiny.examples(3, 9), tiny.examples(103, 7)
        model = tiny.llama()
        model = tiny.adapted(settings, base=model) if settings.tuning.mode != "full" else model
        if settings.train.gradient_checkpointing is True:
            checkpointing.enable(model, True)
        size = settings.train.context_parallel
        budget = batches.Budget(case["max_tokens"], case["layout"], shared_by=size)
        engine = tiny.make_engine(model, rows, held_out, settings, budget)
        with counted_exchange() as sent:
            values = engine.optimizer_step()
        own = engine.window(0)[1]
        tokens = sum(engine.collate(each).input_ids.numel() for each in own)
        held = engine.task.evaluate(engine.model)["loss"]
        weights = engine.parallel.weights().all()
        saved = {name: value.flatten().tolist() for name, value in weights.items()}
        result.append({"loss": values["train/loss"], "held_out": held, "weights": saved})
        result[-1] |= {"norm": values["train/grad_norm"], "sent": sum(sent), "tokens": tokens}
    return result


def main(out: Path, kind: str, *arguments: str) -> None:
    if kind == "types":
        result: Any = of_types(int(arguments[0]), list(arguments[1:]))
    else:
        result = of_engine(out, json.loads(Path(arguments[0]).read_text()))
    rank = PartialState().process_index
    (out / f"rank{rank}.json").write_text(json.dumps(result), "utf-8")
    PartialState().wait_for_everyone()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
