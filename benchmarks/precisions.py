"""What a precision costs: exact match of the nano run in each, and how bf16 weights are rounded.

    PYTHONPATH=. python benchmarks/precisions.py [--parts runs rounding] [--seeds 0 1 2]
        [--threads 1] [--shared ../shared] [--json benchmarks/results/precisions.json]

runs      configs/nano.yaml in fp32, bf16, bf16_pure and fp16 for each seed; exact match against
          that of fp32 with the same seed. Many CPUs multiply such matrices slowly, or round each
          sum of a product. Here, and only here, products of matrices in 16 bits are computed in
          fp32 and rounded once, as tensor cores do.
rounding  Full fine-tuning of the nano model and of stories260K (../shared) with weights in bf16
          that are rounded in several ways; held-out loss after the same steps against fp32.
          `kahan` needs torch-optimi 0.3.3, the moments in 8 and 4 bits torchao.

A finished run is added to the JSON at once, so that a benchmark that was killed goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sft import api
from sft.config.schema import Train
from sft.runtime.console import make_console, write_json
from sft.train.updates import Updates

PRECISIONS = ("fp32", "bf16", "bf16_pure", "fp16")
STEPS, ROWS, LENGTH = 100, 8, 128  # of the part `rounding`
RATES = (1e-3, 1e-4)


# -- runs


@contextmanager
def halves_as_on_tensor_cores() -> Iterator[None]:
    """Makes products of fp16 or bf16 matrices sum in fp32 and round once."""
    library = torch.library.Library("aten", "IMPL")
    outs = {name: getattr(torch.ops.aten, name).out for name in ("mm", "bmm", "addmm", "baddbmm")}

    def replace(name: str) -> Callable[..., torch.Tensor]:
        def multiply(*tensors: torch.Tensor, **factors: float) -> torch.Tensor:
            kind = tensors[-1].dtype
            wide = torch.float32 if kind in (torch.float16, torch.bfloat16) else kind
            operands = [tensor.to(wide) for tensor in tensors]
            out = operands[-1].new_empty(0)
            return outs[name](*operands, **factors, out=out).to(kind)

        return multiply

    for name in outs:
        library.impl(name, replace(name), "CPU", allow_override=True)
    with sdpa_kernel(SDPBackend.MATH):
        yield
    library._destroy()


def run_once(precision: str, seed: int, folder: Path) -> None:
    """Trains the nano model once, into `folder`."""
    values = {"output_dir": str(folder), "precision": precision, "seed": seed, "tensorboard": False}
    overrides = {f"train.{key}": value for key, value in (values | {"save_steps": None}).items()}
    with nullcontext() if precision == "fp32" else halves_as_on_tensor_cores():
        api.train("configs/nano.yaml", overrides)


def measure_runs(results: dict[str, Any], args: argparse.Namespace) -> None:
    """Adds each run that `results` lacks."""
    for seed in args.seeds:
        for precision in PRECISIONS:
            known = results.setdefault("runs", {}).setdefault(precision, {})
            if str(seed) in known:
                continue
            with tempfile.TemporaryDirectory() as folder:
                words = ["--one", precision, "--seeds", str(seed), "--work", folder + "/run"]
                environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
                subprocess.run(
                    [sys.executable, __file__, *words],
                    env=environment,
                    check=True,
                    stdout=subprocess.DEVNULL,
                )
                found = json.loads(Path(folder, "run/evaluation/metrics.json").read_text("utf-8"))
            tuned = found["tuned"]
            known[str(seed)] = {key: tuned[key] for key in ("exact_match", "loss")}
            write_json(args.json, results)
            console.print(f"{precision:<10} seed {seed}  {known[str(seed)]}")


def compare_runs(runs: dict[str, Any]) -> dict[str, Any]:
    """Returns each precision's exact match less that of fp32, by seed and on average."""
    found = {}
    for precision in PRECISIONS[1:]:
        both = [seed for seed in runs["fp32"] if seed in runs.get(precision, {})]
        values = {
            seed: runs[precision][seed]["exact_match"] - runs["fp32"][seed]["exact_match"]
            for seed in both
        }
        if values:
            found[precision] = {"by_seed": values, "mean": mean(values.values())}
    return found


# -- rounding


def optimizers(rate: float) -> dict[str, Callable[[nn.Module], tuple[torch.dtype, Any]]]:
    """Returns what makes the optimizer of a model, by name, with the dtype of its weights."""
    half = torch.bfloat16
    found: dict[str, Any] = {
        "fp32": (torch.float32, lambda params: torch.optim.AdamW(params, lr=rate, weight_decay=0)),
        "nearest": (half, lambda params: torch.optim.AdamW(params, lr=rate, weight_decay=0)),
        "stochastic": (half, lambda params: torch.optim.AdamW(params, lr=rate, weight_decay=0)),
    }
    if find_spec("optimi"):
        from optimi import AdamW

        options = {"lr": rate, "weight_decay": 0, "eps": 1e-8, "betas": (0.9, 0.999)}
        found["kahan"] = half, lambda params: AdamW(params, kahan_sum=True, **options)
    if find_spec("torchao"):
        from torchao import optim

        more = {"lr": rate, "weight_decay": 0, "bf16_stochastic_round": True}
        found["torchao"] = half, lambda params: optim._AdamW(params, **more)
        found["torchao, 8 bits"] = half, lambda params: optim.AdamW8bit(params, **more)
        found["torchao, 4 bits"] = half, lambda params: optim.AdamW4bit(params, **more)
    return found


def final_loss(make: Any, name: str, seed: int, ids: torch.Tensor, rate: float) -> float:
    """Returns the held-out loss, in fp32, of a model after `STEPS` steps on rows of `ids`."""
    dtype, build = optimizers(rate)[name]
    model: nn.Module = make().to(dtype)
    held, rows = ids[: 8 * ROWS], ids[8 * ROWS :]
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    optimizer = build(list(model.parameters()))
    settings = Train(output_dir="none", seed=seed, precision="bf16_pure")
    named = dict(model.named_parameters())
    own = Updates(settings, optimizer, named, lambda tensor: (tensor.detach().view(-1), 0))
    for step in range(STEPS):
        chosen = rows[torch.randint(len(rows), (ROWS,), generator=generator)]
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
            model(input_ids=chosen, labels=chosen).loss.backward()
        set_rate(optimizer, rate * min(1.0, (step + 1) / 10))
        own.step = step
        if name == "stochastic":
            own.apply_all()
        else:
            optimizer.step()
    with torch.no_grad():
        return float(model.float()(input_ids=held, labels=held).loss)


def set_rate(optimizer: Any, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def measure_rounding(results: dict[str, Any], args: argparse.Namespace) -> None:
    """Adds each loss that `results` lacks."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    texts = {
        "nano/model": Path("nano/train.jsonl"),
        str(args.shared / "models/stories260K"): args.shared / "data/text/tinyshakespeare.txt",
    }
    for folder, path in texts.items():
        torch.set_num_threads(args.threads)
        text = path.read_text("utf-8")[:600_000]
        ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids[0]
        ids = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)

        def make(folder: str = folder) -> Any:
            return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

        for rate in RATES:
            place = results.setdefault("rounding", {}).setdefault(Path(folder).name, {})
            place = place.setdefault(f"{rate:g}", {})
            for name in optimizers(rate):
                for seed in args.seeds:
                    known = place.setdefault(name, {})
                    if str(seed) not in known:
                        known[str(seed)] = final_loss(make, name, seed, ids, rate)
                        write_json(args.json, results)
                loss = mean(known.values())
                less = loss - mean(place["fp32"].values())
                console.print(f"{Path(folder).name:<13} {rate:g}  {name:<16}{loss:.4f} {less:+.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=["rounding", "runs"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/precisions.json"))
    parser.add_argument("--one", choices=PRECISIONS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        run_once(args.one, args.seeds[0], args.work)
        return
    results = json.loads(args.json.read_text("utf-8")) if args.json.exists() else {}
    if "rounding" in args.parts:
        measure_rounding(results, args)
    if "runs" in args.parts:
        measure_runs(results, args)
        results["differences"] = compare_runs(results["runs"])
        write_json(args.json, results)
        console.print_json(data=results["differences"])


if __name__ == "__main__":
    console = make_console()
    main()
