"""Answers by `sft.evaluate.generate` and by `generate` of transformers to the same prompts.

    PYTHONPATH=.:tests:tests/support python benchmarks/inference.py [--parts stories 60M processes]
        [--repeats 5] [--json benchmarks/results/inference.json]

All but `processes`, `bf16` and `vllm` run on a GPU where there is one.

stories    stories260K (../shared), 60M: a random Llama of 60M parameters. Seconds for all prompts,
           of one at a time (a sample of them, scaled up) and of batches in their order of arrival,
           as many rows as ours. Outputs are compared token by token.
processes  Two processes of one thread against one process of one thread, through `infer_batch`'s
           own path: loading is not counted.
vllm       60M by our own decoding and by vLLM (a program `vllm`), in turns: answer tokens per
           second of CPU time, of all processes in one thread each, without the start. Not among the
           default parts.
bf16       In bf16 a batch rounds otherwise than one row: how many answers differ, and from where.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from conftest import ROOT, SHARED, clean_environment
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig

from sft.cli import prepare_libraries
from sft.config.schema import Generation, Train
from sft.evaluate import generate
from sft.evaluate.answers import AnswerModel
from sft.runtime.console import make_console, table
from sft.runtime.log import Screen
from sft.runtime.processes import Context, start_processes
from sft.serve.vllm_engine import AnswerEngine

RESULTS = ROOT / "benchmarks/results/inference.json"
PARTS = ("stories", "60M", "processes", "bf16")
OTHERS = ("vllm",)
ROWS = generate.ROWS_CPU
Prompts = list[list[int]]


def stories(number: int) -> tuple[Any, Prompts, list[int], int]:
    """Returns the model, beginnings of real stories (4 to 200 tokens), ids that end a story, and
    the most new tokens."""
    folder = SHARED / "models/stories260K"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = json.loads((SHARED / "data/text/tinystories_1000.json").read_text())[:number]
    random = np.random.default_rng(0)
    prompts = [tokenizer(text).input_ids for text in texts]
    prompts = [ids[: int(random.integers(4, min(201, len(ids))))] for ids in prompts]
    return model, prompts, [1, 2], 256


def shape_60m(number: int) -> tuple[Any, Prompts, list[int], int]:
    """Returns the same of a random Llama of 60M parameters. Some of 32,000 tokens end an answer, so
    lengths differ by chance, as those of real questions do."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=32_000,
        initializer_range=0.05,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    random = np.random.default_rng(0)
    lengths = np.minimum(400, random.lognormal(3.5, 0.8, number).astype(int) + 4)
    prompts = [random.integers(3, 32_000, n).tolist() for n in lengths]
    return model, prompts, list(range(3, 32_000, 40)), 96


def ours(model: Any, prompts: Prompts, stop: list[int], new: int, rows: int) -> list[list[int]]:
    found: dict[int, list[int]] = {}
    decoder = generate.Decoder(model, stop, Generation(max_new_tokens=new), rows)
    for batch, answers in decoder.answer_batches(prompts, start_processes(Train(output_dir="-"))):
        found |= {i: answer.ids for i, answer in zip(batch, answers, strict=True)}
    return [found[i] for i in range(len(prompts))]


def theirs(model: Any, prompts: Prompts, stop: list[int], new: int, rows: int) -> list[list[int]]:
    """Returns the answers of transformers, in the order of arrival, padded on the left."""
    found = []
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=new, eos_token_id=stop, pad_token_id=0, use_cache=True
    )
    for start in range(0, len(prompts), rows):
        some = prompts[start : start + rows]
        width = max(map(len, some))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in some], device=model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in some]).to(ids)
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
        for row in output[:, width:].tolist():
            end = next((i for i, token in enumerate(row) if token in stop), len(row))
            found.append(row[:end])
    return found


def timed_call(call: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


def find_device() -> tuple[torch.device, int]:
    """Returns the device and its largest batch."""
    device = start_processes(Train(output_dir="-")).device
    return device, generate.ROWS_GPU if device.type == "cuda" else generate.ROWS_CPU


def compare_ways(
    name: str, made: tuple[Any, Prompts, list[int], int], sample: int, repeats: int
) -> dict[str, Any]:
    """Times all three ways in turns; returns the medians of each turn's ratios."""
    model, prompts, stop, new = made
    device, rows = find_device()
    model.to(device)
    turns, unlike = [], 0
    ours(model, prompts[:4], stop, 8, 4)  # warm
    chosen = list(range(0, len(prompts), max(1, len(prompts) // sample)))[:sample]
    for _ in range(repeats):
        own, found = timed_call(lambda: ours(model, prompts, stop, new, rows))
        arrival, other = timed_call(lambda: theirs(model, prompts, stop, new, rows))
        single, one = timed_call(lambda: theirs(model, [prompts[i] for i in chosen], stop, new, 1))
        share = sum(len(found[i]) + 1 for i in chosen) / sum(len(each) + 1 for each in found)
        turns.append({"ours": own, "arrival": arrival, "single": single / share})
        unlike = sum(a != b for a, b in zip(found, other, strict=True))
        unlike += sum(found[i] != each for i, each in zip(chosen, one, strict=True))
    lengths = [len(each) for each in found]
    return {
        "model": name,
        "device": str(device),
        "prompts": len(prompts),
        "rows": rows,
        "answer_tokens": sum(lengths),
        "longest_answer": max(lengths),
        "seconds": turns,
        "against_single": statistics.median(t["single"] / t["ours"] for t in turns),
        "against_arrival": statistics.median(t["arrival"] / t["ours"] for t in turns),
        "unlike_answers": unlike,
    }


# --- two processes -------------------------------------------------------------------------------


def process_worker(folder: Path) -> None:
    """Times this rank's share between two barriers; run by torchrun."""
    torch.set_num_threads(1)
    accelerator = start_processes(Train(output_dir="-"))
    torch.set_num_threads(1)
    model, prompts, stop, new = shape_60m(96)
    decoder = generate.Decoder(model, stop, Generation(max_new_tokens=new), 16)
    for _ in decoder.answer_batches(prompts[:4], accelerator):
        pass
    accelerator.wait_for_everyone()
    started = time.perf_counter()
    found: dict[int, list[int]] = {}
    for batch, answers in decoder.answer_batches(prompts, accelerator):
        found |= {i: answer.ids for i, answer in zip(batch, answers, strict=True)}
    own = time.perf_counter() - started
    accelerator.wait_for_everyone()
    result = {"seconds": time.perf_counter() - started, "own": own, "found": found}
    rank, world = accelerator.process_index, accelerator.num_processes
    (folder / f"{world}_{rank}.json").write_text(json.dumps(result))


def compare_processes(repeats: int) -> dict[str, Any]:
    turns, unlike = [], 0
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as name:
            found: dict[int, Any] = {}
            for world in (1, 2):
                command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
                command += [f"--nproc-per-node={world}", __file__, "--worker", name]
                paths = f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'tests/support'}"
                environment = clean_environment(PYTHONPATH=paths, OMP_NUM_THREADS="1")
                subprocess.run(command, env=environment, cwd=ROOT, check=False)
                ranks = [json.loads(p.read_text()) for p in Path(name).glob(f"{world}_*.json")]
                assert len(ranks) == world
                answers = {k: v for each in ranks for k, v in each["found"].items()}
                found[world] = (max(each["seconds"] for each in ranks), answers, ranks)
        (one, alone, _), (two, shared, ranks) = found[1], found[2]
        unlike = sum(alone[i] != shared[i] for i in alone)
        own = [each["own"] for each in ranks]
        turns.append({"one": one, "two": two, "ranks": own})
    return {
        "model": "60M",
        "seconds": turns,
        "two_against_one": statistics.median(t["one"] / t["two"] for t in turns),
        "unlike_answers": unlike,
    }


# --- vLLM ----------------------------------------------------------------------------------------


def compare_vllm(repeats: int) -> dict[str, Any]:
    """Returns CPU seconds of both for the same prompts, and the ratio of tokens per CPU second.

    Each computes in one thread: threads that wait for others on a busy machine use CPU time, too.
    """
    torch.set_num_threads(1)
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = str(min(os.sched_getaffinity(0)))
    model, prompts, stop, new = shape_60m(128)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "nano/model")
    accelerator, turns = start_processes(Train(output_dir="-")), []
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        settings = Generation(max_new_tokens=new)
        own = AnswerModel(model, stop, settings, ROWS, tokenizer=tokenizer, identity="")
        with closing(AnswerEngine("vllm", folder)) as engine:
            context = Context(accelerator, Screen())
            (cpu, taken), other = cpu_seconds(
                lambda: engine.answering(own, "fp32", context, lambda: None)
            )
            started = {"cpu": cpu, "wall": taken}
            for _ in range(repeats):
                turn, answers = {}, {}
                for name, each in (("ours", own), ("vllm", other)):
                    (turn[name], turn[f"{name}_wall"]), answers[name] = cpu_seconds(
                        lambda each=each: dict(
                            pair
                            for batch, found in each.answer_batches(prompts, accelerator)
                            for pair in zip(batch, found, strict=True)
                        )
                    )
                turns.append(turn)
            version = engine._server.version
    tokens = {name: sum(len(a.ids) for a in found.values()) for name, found in answers.items()}
    return {
        "model": "60M, fp32",
        "vllm": version,
        "prompts": len(prompts),
        "answer_tokens": tokens,
        "unlike_answers": sum(answers["ours"][i] != answers["vllm"][i] for i in answers["ours"]),
        "start": started,
        "seconds": turns,
        "vllm_against_ours": statistics.median(t["ours"] / t["vllm"] for t in turns),
    }


def cpu_seconds(call: Callable[[], Any]) -> tuple[tuple[float, float], Any]:
    """Returns (CPU seconds of this process and its descendants, seconds), and the result."""

    def used() -> float:
        times = [p.cpu_times() for p in [me, *me.children(recursive=True)]]
        return sum(each.user + each.system for each in times)

    me = psutil.Process()
    before, started = used(), time.perf_counter()
    result = call()
    return (used() - before, time.perf_counter() - started), result


def count_unlike_in_bf16(_: int) -> list[dict[str, Any]]:
    """Counts answers of batches that differ from those of single rows, in fp32 and bf16."""
    result = []
    for name, make, number in (("stories260K", stories, 64), ("60M", shape_60m, 24)):
        model, prompts, stop, new = make(number)
        counts = {}
        for dtype in (torch.float32, torch.bfloat16):
            model.to(dtype)
            batch = ours(model, prompts, stop, new, ROWS)
            single = ours(model, prompts, stop, new, 1)
            counts[str(dtype).removeprefix("torch.")] = sum(
                a != b for a, b in zip(batch, single, strict=True)
            )
        result.append({"model": name, "answers": number, "unlike": counts})
    return result


def show(found: dict[str, Any]) -> None:
    console, rows = make_console(), []
    for name in ("stories", "60M"):
        if row := found.get(name):
            middle = {
                key: statistics.median(t[key] for t in row["seconds"])
                for key in ("ours", "arrival", "single")
            }
            ratios = f"{row['against_arrival']:.2f}", f"{row['against_single']:.1f}"
            times = (f"{middle[key]:.1f}" for key in ("ours", "arrival", "single"))
            rows.append([row["model"], *times, *ratios, str(row["unlike_answers"])])
    columns = ("model", "ours", "arrival order", "one at a time", "x", "x", "unlike")
    console.print(table("Seconds for all answers", columns, rows))
    if row := found.get("processes"):
        ratio, unlike = row["two_against_one"], row["unlike_answers"]
        console.print(f"two processes of one thread: {ratio:.2f} times one; {unlike} unlike")
    if row := found.get("vllm"):
        ratio, unlike = row["vllm_against_ours"], row["unlike_answers"]
        console.print(f"vLLM: {ratio:.2f} times our tokens per CPU second; {unlike} unlike")
    for row in found.get("bf16", []):
        console.print(f"{row['model']}: of {row['answers']} answers unlike: {row['unlike']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=(*PARTS, *OTHERS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--worker", type=Path)
    args = parser.parse_args()
    prepare_libraries()
    if args.worker:
        process_worker(args.worker)
        os._exit(0)
    torch.set_num_threads(2)
    found = json.loads(args.json.read_text()) if args.json.exists() else {}
    many = 4 if torch.cuda.is_available() else 1  # as many batches as on a CPU
    for part in args.parts:
        if part == "stories":
            found[part] = compare_ways("stories260K", stories(many * 256), 6, args.repeats)
        elif part == "60M":
            found[part] = compare_ways("60M", shape_60m(many * 128), 4, args.repeats)
        else:
            others = {"processes": compare_processes, "bf16": count_unlike_in_bf16}
            others["vllm"] = compare_vllm
            found[part] = others[part](args.repeats)
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    show(found)


if __name__ == "__main__":
    main()
