"""Run by several ranks: steps of small models, and what ranks exchange in the last one.

exchange_worker.py CASES.json OUT, with cases as in tests/test_exchange.py; rank 0 writes OUT.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from counting import Counting
from shapes import uniform_window
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoConfig, AutoModelForCausalLM

from sft.models import head
from sft.models.rounded import Casts
from sft.plan import dry_run
from sft.runtime.hardware import resolve_precision
from sft.runtime.log import Log
from sft.runtime.processes import start_processes
from sft.tasks.registry import load_run
from sft.train.parallel import fsdp, gathered

STEPS, ROWS = 2, 4  # rows of a micro-batch, over all ranks


def run_peer(case: dict[str, Any]) -> dict[str, Any]:
    """Counts a step as another tool makes it with FSDP2 and its default settings.

    The units, the dtypes and what stays gathered are those of torchtitan (parallelize.py of Llama)
    and of Accelerate 1.14 (fsdp2_prepare_model), whose own wrapper does nothing on CPUs. torchtitan
    exchanges gradients in fp32 after each micro-batch, Accelerate in bf16 after the last.
    """
    accelerator = start_processes(load_run(case["config"]).train)
    world, within = accelerator.num_processes, case.get("within") or accelerator.num_processes
    model: Any = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(case["model"]), dtype=torch.float32
    )
    shape, names = (
        ((world // within, within), ("copies", "shards"))
        if within < world
        else ((world,), ("shards",))
    )
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    is_titan = case["peer"] == "torchtitan"
    dtypes = (
        {"reduce_dtype": torch.float32}
        if is_titan
        else dict.fromkeys(("reduce_dtype", "output_dtype"), torch.bfloat16)
    )
    options = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(torch.bfloat16, **dtypes)}
    for module in (model.model.embed_tokens, *model.model.layers):
        fully_shard(module, reshard_after_forward=True, **options)
    fully_shard([model.model.norm, model.lm_head], reshard_after_forward=False, **options)
    fully_shard(model, **options)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    ids = torch.ones(ROWS // world, 24, dtype=torch.long)
    for _ in range(STEPS):
        with Counting(()) as counting:
            for number in range(case["micro_batches"]):
                last = number == case["micro_batches"] - 1
                model.set_requires_gradient_sync(is_titan or last)
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return {"world_size": world, **exchanged(counting)}


def exchanged(counting: Counting) -> dict[str, int]:
    return {name: getattr(counting.counts, name) for name in ("collectives", "exchanged", "sent")}


def run(case: dict[str, Any]) -> dict[str, Any]:
    AcceleratorState._reset_state(False)  # Accelerate takes one DeepSpeed configuration a process
    config = load_run(case["config"])
    accelerator = start_processes(config.train)
    torch.manual_seed(0)  # the same random weights on all ranks and in all cases
    number = case.get("micro_batches", 2)
    window = uniform_window(ROWS // accelerator.num_processes, 24, 24, micro_batches=number)
    precision = resolve_precision(config.train)[0]
    said: list[str] = []
    Log.say = lambda _, what="": said.append(what)  # type: ignore[method-assign, assignment]
    made = dry_run.make_engine(config, precision, window, weights=False, accelerator=accelerator)
    if rows := case.get("chunk_rows"):  # of logits; their weights' gradient does not count
        head.CHUNK_BYTES = 4 * rows * made.task.head._vocabulary()
        head.SupervisedHead._trained_bytes = lambda _: 0  # type: ignore[method-assign]
        made.task.prove_head(precision)
    steps = []
    for _ in range(STEPS):
        with Counting(()) as counting:
            values = made.optimizer_step()
        steps.append([values["train/loss"].hex(), values["train/grad_norm"].hex()])
    sums = {
        name: float(w.double().sum()).hex() for name, w in made.parallel.weights().all().items()
    }
    sharded = isinstance(made.parallel, fsdp.Sharded)
    records = gathered.parameters_of(made.task.model) if sharded else ()
    return {
        "world_size": accelerator.num_processes,
        "steps": steps,
        "sums": sums,
        "chunks": made.task.head.tail is not None,
        "said": said,
        "rounded": sum(each._orig_size.numel() for each in records if each.gathered_dtype),
        **exchanged(counting),
    }


def main(cases: Path, out: Path) -> None:
    torch.set_num_threads(1)
    found, find = {}, fsdp.find_casts
    for case in json.loads(cases.read_text("utf-8")):
        as_stored = case.get("as_stored")
        fsdp.find_casts = (lambda *_: Casts(problem="a test says so")) if as_stored else find
        found[case["name"]] = (run_peer if "peer" in case else run)(case)
    state = PartialState()
    if state.is_main_process:
        out.write_text(json.dumps(found), "utf-8")
    state.wait_for_everyone()
    os._exit(0)  # gloo may abort in its destructors


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
