"""The parts of benchmarks/gpu.sh: what only a GPU shows.

    SFT_TEST_GPU=1 PYTHONPATH=.:tests:tests/support python benchmarks/gpu.py PART --out FOLDER

machine    Device, driver and versions.
speed      Real tokens/s, without padding, of Llama shapes with random weights: LoRA, QLoRA and full
           weights, on conversations with the lengths of GSM8K and on rows of 4,096 tokens, against
           TRL with Liger and packing in the same process, where they are installed.
memory     Peaks of 22 steps against their predictions, then the largest micro-batch that runs,
           found by bisection, against the planned one.
variants   What each key that changes speed or memory gives on the smaller shape.
attention  The varlen kernel on packed rows, against padded rows and against a mask.
inference  Answers of ours, of transformers, and of vLLM where it is installed.

Each measurement is a line of FOLDER/PART.jsonl as soon as it is made. With SFT_TEST_GPU=rehearse
all shapes are tiny, and a CPU runs them.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from counted import LLAMA
from counting import minimum_flops
from published import LLAMA_8B, llama
from shapes import configured, uniform_window

from sft.cli import prepare_libraries
from sft.config.load import with_values
from sft.config.schema import Config
from sft.data import batches
from sft.errors import OutOfMemory, UserError
from sft.models import classes, load
from sft.models.fp8 import compute_in_fp8
from sft.plan import choose, dry_run, gpus, memory
from sft.plan.dry_run import Window
from sft.runtime.hardware import resolve_precision
from sft.runtime.processes import start_processes
from sft.train.compiled import compiled

Rows = list[tuple[int, int]]  # tokens of an example, and those that are supervised
REHEARSE = os.environ.get("SFT_TEST_GPU") == "rehearse"
BIG, SMALL, LONG = "8B", "1.1B", 64 if REHEARSE else 4096
SHAPES = {SMALL: llama(2048, 5632, 22, 32, 4, 32000), BIG: LLAMA_8B}
if REHEARSE:
    SHAPES = dict.fromkeys(SHAPES, LLAMA)
ON_GPU = torch.cuda.is_available()
RANK, STEPS, SECONDS = 16, 8, 6.0  # of a measurement: at most so many steps and seconds


def conversations(number: int, seed: int = 0) -> Rows:
    """Returns lengths as in GSM8K with a chat template: mean 210, from 80 to 600 tokens."""
    random = np.random.default_rng(seed)
    if REHEARSE:
        return [(int(n), int(n) // 2) for n in random.integers(8, 24, min(number, 6))]
    lengths = np.clip(random.lognormal(np.log(200), 0.35, number), 80, 600).astype(int)
    return [(int(n), int(n * 0.55)) for n in lengths]


def long_rows(number: int) -> Rows:
    return [(LONG, LONG)] * (2 if REHEARSE else number)


# --- an engine on this device ------------------------------------------------------------------


@contextmanager
def built_on_device() -> Iterator[None]:
    """Makes models with random weights on the GPU: a CPU would take a minute for 8B."""
    make, build = classes.from_config, load.build
    device = torch.device("cuda" if ON_GPU else "cpu")

    def on_device(*arguments: Any, **options: Any) -> Any:
        with device:
            return make(*arguments, **options)

    def build_as_run(config: Config, *arguments: Any, **options: Any) -> Any:
        model = build(config, *arguments, **options)
        if config.train.fp8:  # which a run does with real weights only
            compute_in_fp8(model, device)
        return model

    with (
        mock.patch.object(classes, "from_config", on_device),
        mock.patch.object(load, "build", build_as_run),
    ):
        yield


@contextmanager
def engine(config: Config, window: Window) -> Iterator[Any]:
    """Yields the run's engine, which computes `window` in every step."""
    made = None
    accelerator = start_processes(config.train)
    precision = resolve_precision(config.train)[0]
    try:
        with built_on_device():
            options: dict[str, Any] = {"weights": False, "accelerator": accelerator}
            made = dry_run.make_engine(config, precision, window, **options)
        backend = "inductor" if ON_GPU else "eager"
        required = config.train.compile is True
        with compiled(made, required, backend) if required else nullcontext():
            yield made
    finally:
        if made is not None:
            accelerator.free_memory(made.model, made.optimizer)
        del made
        release()


def release() -> None:
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def wait() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def peaks() -> dict[str, float]:
    """Returns the most memory since the last `release`, in GiB."""
    if not ON_GPU:
        return {}
    found = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return dict(zip(("allocated_gib", "reserved_gib"), (n / 2**30 for n in found), strict=True))


def seconds_per_step(step: Callable[[], Any]) -> tuple[float, int]:
    """Returns the mean of some steps after two that warm up, and how many they were."""
    for _ in range(1 if REHEARSE else 2):
        step()
    wait()
    began, number = time.perf_counter(), 0
    while number < (1 if REHEARSE else STEPS) and time.perf_counter() - began < SECONDS:
        step()
        number += 1
    wait()
    return (time.perf_counter() - began) / number, number


def peak_flops() -> float | None:
    name = torch.cuda.get_device_name() if ON_GPU else ""
    found = [gpu for key, gpu in gpus.GPUS.items() if key.split("-")[0] in name]
    return found[-1].teraflops * 1e12 if found else None


def measured(
    who: str, shape: str, mode: str, what: str, rows: Rows, seconds: float, steps: int
) -> dict[str, Any]:
    tokens = sum(length for length, _ in rows)
    row: dict[str, Any] = {"who": who, "what": f"{shape} {mode}, {what}"}
    row |= {"tokens": tokens, "steps": steps, "seconds_per_step": seconds}
    flops = minimum_flops(SHAPES[shape], mode, RANK, rows)
    row |= {"tokens_per_second": tokens / seconds, "teraflops": flops / seconds / 1e12}
    peak = peak_flops()
    return row | {"share_of_peak": flops / seconds / peak if peak else None} | peaks()


def window_of(rows: Rows, layout: batches.Layout, max_tokens: int) -> Window:
    lengths = [length for length, _ in rows]
    (mine,) = batches.cut(range(len(rows)), lengths, 1, batches.Budget(max_tokens, layout))
    return Window(tuple(tuple(rows[i] for i in each) for each in mine), layout)


def ours(
    folder: Path,
    shape: str,
    mode: str,
    what: str,
    rows: Rows,
    layout: batches.Layout = "packed",
    max_tokens: int = LONG,
    **changes: Any,
) -> dict[str, Any]:
    values = {"tuning.r": RANK, "train.precision": "bf16", "train.gradient_checkpointing": False}
    if layout == "packed" and ON_GPU:
        values["model.attn_implementation"] = "varlen"
    config = with_values(configured(folder, SHAPES[shape], mode), values | changes)
    with engine(config, window_of(rows, layout, max_tokens)) as made:
        seconds, steps = seconds_per_step(made.optimizer_step)
        return measured("ours", shape, mode, f"{what}, {layout}", rows, seconds, steps)


# --- speed ---------------------------------------------------------------------------------------


def speed(folder: Path) -> Iterator[Callable[[], dict[str, Any]]]:
    text, long = conversations(64), long_rows(4)
    kept = {"train.gradient_checkpointing": True}
    light = {"train.precision": "bf16_pure", "train.optimizer": "adamw_8bit", **kept}
    yield partial(ours, folder, BIG, "lora", "rows of 4,096 tokens", long)
    yield partial(trl, folder, BIG, "lora", "rows of 4,096 tokens", long, packing=True, liger=True)
    yield partial(ours, folder, BIG, "lora", "conversations", text)
    yield partial(trl, folder, BIG, "lora", "conversations", text, packing=True, liger=True)
    yield partial(trl, folder, BIG, "lora", "conversations", text)
    yield partial(ours, folder, BIG, "lora", "conversations", text, "padded")
    yield partial(ours, folder, BIG, "qlora", "conversations", text)
    yield partial(ours, folder, BIG, "full", "bf16_pure, 8 bits, conversations", text, **light)
    for mode in ("lora", "qlora", "full"):
        many = conversations(256)
        yield partial(ours, folder, SMALL, mode, "conversations", many, max_tokens=2 * LONG)
        packed = {"packing": True, "liger": True}
        yield partial(trl, folder, SMALL, mode, "conversations", many, **packed)


class Skipped(Exception):
    """Says why something is not measured here."""


def trl(
    folder: Path,
    shape: str,
    mode: str,
    what: str,
    rows: Rows,
    packing: bool = False,
    liger: bool = False,
) -> dict[str, Any]:
    """Measures SFTTrainer in its loop: from the end of a step to the end of the last."""
    if not find_spec("trl"):
        raise Skipped(f"TRL, {shape} {mode}, {what}: it is not installed (see PEERS)")
    has_liger = liger and find_spec("liger_kernel") is not None
    without = " without Liger, which is not installed" if liger and not has_liger else ""
    who = f"TRL{' with Liger' if has_liger else without}{', packing' if packing else ''}"
    import gpu_peers

    options: dict[str, Any] = {
        "packing": packing,
        "liger": has_liger,
        "rank": RANK,
        "on_gpu": ON_GPU,
    }
    options |= {"longest": max(LONG, *(length for length, _ in rows))}
    steps = 2 if REHEARSE else 6
    with built_on_device():
        seconds = gpu_peers.trl_step_seconds(folder, SHAPES[shape], mode, rows, steps, **options)
    return measured(who, shape, mode, what, rows, seconds, steps - 2 or 1)


# --- memory --------------------------------------------------------------------------------------


Group = tuple[str, str, bool]  # shape, tuning, checkpointing


def memory_part(folder: Path) -> Iterator[Callable[[], dict[str, Any]]]:
    """Predictions are made first, on all cores, before this process uses the GPU."""
    import memory as grid  # benchmarks/memory.py

    steps, bounds = (grid.STEPS[:2], grid.BUDGETS[:1]) if REHEARSE else (grid.STEPS, grid.BUDGETS)
    sizes: dict[Group, list[tuple[int, int]]] = {}
    for *group, size in steps:
        sizes.setdefault(tuple(group), []).append((2, size[1] // 64) if REHEARSE else size)
    lengths = {tuple(group): 16 if REHEARSE else length for *group, length in bounds}
    configs: dict[Group, Config] = {}
    for number, group in enumerate([*sizes, *(each for each in lengths if each not in sizes)]):
        shape = LLAMA if REHEARSE else grid.SHAPES[group[0]]
        train = {"gradient_checkpointing": group[2], "precision": "bf16"}
        configs[group] = configured(folder / str(number), shape, group[1], **train)
    asked = [(configs[group], size) for group, mine in sizes.items() for size in mine]
    room = (1 - choose.MARGIN["cuda"]) * free_bytes()
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("fork")) as pool:
        most = [
            pool.submit(_planned_rows, grid.largest, configs[group], length, room)
            for group, length in lengths.items()
        ]
        predicted = iter(list(pool.map(_predict, asked)))
        planned = [each.result() for each in most]
    for group, mine in sizes.items():
        yield from _peaks(group, configs[group], mine, predicted)
    for (group, length), rows in zip(lengths.items(), planned, strict=True):
        yield partial(_largest, group, configs[group], length, rows)


def free_bytes() -> float:
    """Returns the free memory of the GPU, less what a context takes, without making one."""
    if not ON_GPU:
        return 2**28
    query = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits", "--id=0"]
    return (float(subprocess.check_output(query, text=True)) - 600) * 2**20


def _predict(asked: tuple[Config, tuple[int, int]]) -> dict[str, Any]:
    torch.set_num_threads(1)
    config, (rows, length) = asked
    one = replace(uniform_window(rows, length, length), gradients=True)
    found = memory.predict(config, "bf16", one, on_gpu=True)
    return {"allocated": found.allocated, "reserved": found.reserved, "by": found.breakdown}


def _planned_rows(largest: Any, config: Config, length: int, room: float) -> int:
    def fits(rows: int) -> bool:
        return _predict((config, (rows, length)))["reserved"] <= room

    return largest(fits, 4 if REHEARSE else 512)


def _peaks(
    group: Group, config: Config, sizes: list[tuple[int, int]], predicted: Iterator[dict[str, Any]]
) -> Iterator[Callable[[], dict[str, Any]]]:
    """Measures all sizes of one engine, which takes longer to build than to run."""
    kinds = [uniform_window(rows, length, length, 2) for rows, length in sizes]
    ids = iter(range(sum(2 * rows for rows, _ in sizes)))
    chosen = [[[next(ids) for _ in each] for each in kind.micro_batches] for kind in kinds]
    window = Window(tuple(each for kind in kinds for each in kind.micro_batches))
    with engine(config, window) as made:
        for size, mine in zip(sizes, chosen, strict=True):
            made.micro_batches = mine
            yield partial(_peak, group, size, made, next(predicted))


def _peak(group: Group, size: tuple[int, int], made: Any, predicted: Any) -> dict[str, Any]:
    release()
    for _ in range(2):
        made.optimizer_step()
    row = {"what": f"{_called(group)}, {size[0]} x {size[1]}", **peaks(), "predicted": predicted}
    for kind in ("allocated", "reserved") if ON_GPU else ():
        row[f"{kind}_error"] = predicted[kind] / 2**30 / row[f"{kind}_gib"] - 1
    return row


def _called(group: Group) -> str:
    return f"{group[0]} {group[1]}{', checkpointing' if group[2] else ''}"


def _largest(group: Group, config: Config, length: int, planned: int) -> dict[str, Any]:
    """Finds the most rows that run, to a twentieth, between none and three times the plan."""
    most = 3 * max(1, planned)
    with engine(config, uniform_window(most, length, length, micro_batches=2)) as made:

        def runs(rows: int) -> bool:
            release()
            made.micro_batches = [[*range(rows)], [*range(most, most + rows)]]
            try:
                for _ in range(2):
                    made.optimizer_step()
            except (torch.OutOfMemoryError, OutOfMemory):
                return False
            return True

        fits = runs(planned) if planned else None
        low, high = (planned, most + 1) if fits else (0, max(1, planned))
        while high - low > max(1, low // 20):
            middle = (low + high) // 2
            low, high = (middle, high) if runs(middle) else (low, middle)
    what = f"{_called(group)}, rows of {length}"
    return {"what": what, "planned_rows": planned, "planned_fits": fits, "most_rows": low}


# --- variants ------------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "fp16": {"train.precision": "fp16"},
    "bf16_pure": {"train.precision": "bf16_pure"},
    "update in the backward pass": {
        "train.optimizer_in_backward": True,
        "train.max_grad_norm": 0.0,
    },
    "checkpointing": {"train.gradient_checkpointing": True},
    "selective checkpointing": {"train.gradient_checkpointing": "selective"},
    "offloaded activations": {"train.activation_offload": True},
    "fp8": {"train.fp8": True},
    "compile": {"train.compile": True},  # the last, since to compile takes long
}


def variants(folder: Path) -> Iterator[Callable[[], dict[str, Any]]]:
    rows = conversations(64)
    for name, changes in VARIANTS.items():
        modes = ("full",) if "optimizer_in_backward" in str(changes) else ("lora", "full")
        for mode in modes[:1] if REHEARSE else modes:
            yield partial(_variant, folder, mode, name, rows, changes)


def _variant(
    folder: Path, mode: str, name: str, rows: Rows, changes: dict[str, Any]
) -> dict[str, Any]:
    layout: batches.Layout = "padded" if "fp16" in changes.values() else "packed"
    try:
        return ours(folder, SMALL, mode, name, rows, layout, **changes)
    except (UserError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise Skipped(f"{name}, {mode}: {reason}") from error


# --- attention -----------------------------------------------------------------------------------


def attention(_: Path) -> Iterator[Callable[[], dict[str, Any]]]:
    yield partial(_attention, conversations(40))
    yield partial(_attention, long_rows(2))


def _attention(rows: Rows) -> dict[str, Any]:
    """Times forward and backward pass of the attention of an 8B layer, and compares outputs."""
    from sft.models.attention import attend, remember_starts

    lengths = [length for length, _ in rows]
    heads, groups, size = (4, 2, 16) if REHEARSE else (32, 8, 128)
    place: dict[str, Any] = {"device": "cuda" if ON_GPU else "cpu", "dtype": torch.bfloat16}
    total, longest = sum(lengths), max(lengths)
    positions = torch.cat([torch.arange(n) for n in lengths])[None].to(place["device"])
    remember_starts(positions, lengths)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    seen = (document[:, None] == document) & torch.ones(total, total, dtype=torch.bool).tril()
    seen = seen.to(place["device"])
    scaled = partial(torch.nn.functional.scaled_dot_product_attention, enable_gqa=True)

    def tensors(batch: int, time: int) -> list[torch.Tensor]:
        torch.manual_seed(0)
        shapes = [(batch, n, time, size) for n in (heads, groups, groups)]
        return [torch.randn(shape, **place).requires_grad_() for shape in shapes]

    layer: Any = torch.nn.Module()
    layer.num_key_value_groups = heads // groups
    mask = None if ON_GPU else seen[None, None]  # a CPU has no such kernel

    def varlen(q: Any, k: Any, v: Any) -> torch.Tensor:
        return attend(layer, q, k, v, mask, position_ids=positions)[0]

    ways: dict[str, tuple[Callable[..., torch.Tensor], list[torch.Tensor]]] = {
        "padded": (partial(scaled, is_causal=True), tensors(len(lengths), longest)),
        "packed with a mask": (partial(scaled, attn_mask=seen), tensors(1, total)),
        "packed, varlen": (varlen, tensors(1, total)),
    }
    row: dict[str, Any] = {
        "rows": len(lengths),
        "tokens": total,
        "padded_tokens": longest * len(lengths),
    }
    for name, (call, given) in ways.items():

        def step(call: Any = call, given: Any = given) -> None:
            call(*given).sum().backward()

        row[name], _ = seconds_per_step(step)
    with torch.no_grad():
        whole = ways["packed with a mask"][0](*ways["packed with a mask"][1]).transpose(1, 2)
        found = varlen(*ways["packed, varlen"][1])
    row["error"] = float((found - whole).float().norm() / whole.float().norm())
    return row


# --- inference -----------------------------------------------------------------------------------


def inference_part(folder: Path) -> Iterator[Callable[[], dict[str, Any]]]:
    import inference  # benchmarks/inference.py
    from transformers import AutoModelForCausalLM

    number, new = (4, 4) if REHEARSE else (256, 96)
    shape = SHAPES[SMALL]
    prompts = [[3 + i % 50] * (length // 2) for i, (length, _) in enumerate(conversations(number))]
    place = "cuda" if ON_GPU else "cpu"
    with torch.device(place):
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).eval()
    stop = list(range(3, shape.vocab_size, 40))  # lengths of answers differ, as those of questions
    rows = inference.find_device()[1]

    def timed(who: str, answer: Callable[..., Any]) -> dict[str, Any]:
        answer(model, prompts[:2], stop, 2, 2)
        wait()
        seconds, found = inference.timed_call(lambda: answer(model, prompts, stop, new, rows))
        tokens = sum(map(len, found)) + len(found)
        values = {"prompts": len(prompts), "answer_tokens": tokens, "seconds": seconds}
        return {"who": who, **values, "tokens_per_second": tokens / seconds}

    yield partial(timed, "ours", inference.ours)
    yield partial(timed, "transformers", inference.theirs)
    yield partial(_vllm, folder, model, prompts, stop, new)


def _vllm(folder: Path, model: Any, prompts: Any, stop: list[int], new: int) -> dict[str, Any]:
    if not find_spec("vllm"):
        raise Skipped("vLLM is not installed")
    import gpu_peers

    return gpu_peers.vllm_answers(folder / "model", model, prompts, stop, new)


# --- the machine -------------------------------------------------------------------------------


def machine(_: Path) -> Iterator[Callable[[], dict[str, Any]]]:
    yield _machine


def _machine() -> dict[str, Any]:
    names = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "torchao")
    names += ("trl", "liger_kernel", "flash_attn", "vllm", "deepspeed", "triton")
    versions = {}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    row: dict[str, Any] = {"versions": versions, "python": sys.version.split()[0]}
    row |= {"cores": os.cpu_count(), "gpu": None, "rehearsal": REHEARSE}
    if ON_GPU:
        row |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
        row["gib"] = torch.cuda.get_device_properties(0).total_memory / 2**30
        query = [
            "nvidia-smi",
            "--query-gpu=driver_version,power.limit",
            "--format=csv,noheader",
            "--id=0",
        ]
        row["driver"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout
    git = ["git", "rev-parse", "HEAD"]  # a copy without .git has none
    row["commit"] = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return row


PARTS = {
    "machine": machine,
    "speed": speed,
    "memory": memory_part,
    "variants": variants,
    "attention": attention,
    "inference": inference_part,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if not (ON_GPU or REHEARSE):
        raise SystemExit("needs a GPU that torch can use (REHEARSE=1: tiny shapes on the CPU)")
    prepare_libraries()
    failed = False
    with tempfile.TemporaryDirectory() as folder, (args.out / f"{args.part}.jsonl").open("a") as to:
        for measure in PARTS[args.part](Path(folder)):
            try:
                row = measure()
            except Skipped as reason:
                row = {"skipped": str(reason)}
            except Exception as error:  # noqa: BLE001  # the next measurement may work
                failed = True
                row = {"failed": " ".join(f"{type(error).__name__}: {error}".split())[:500]}
                traceback.print_exc()
                release()
            print(json.dumps(row), flush=True)
            to.write(json.dumps(row) + "\n")
            to.flush()
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
