"""The coverage report on real configurations and on tiny shapes of all model types.

    python benchmarks/coverage.py [--json benchmarks/results/coverage.json]

Every configuration of `../shared/data/model_configs` (or SFT_SHARED) is reported in full size, and
its number of parameters is compared with the published one: that in the header of its weight files.
Every model type of `tests/support/families.py` is reported for full, LoRA and QLoRA, and all other
types of transformers that write text for LoRA. No weights are read. A report that cannot be traced
has its reason in `problem`, one that is refused in `refused`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/support")]

from conftest import SHARED  # noqa: E402
from rich.console import Console  # noqa: E402
from support import families  # noqa: E402

from sft.config.schema import Config  # noqa: E402
from sft.errors import UserError  # noqa: E402
from sft.plan.coverage import STATES, Coverage, cover  # noqa: E402
from sft.runtime.console import make_console, table, write_json  # noqa: E402

TOLERANCE = 0.001  # of the published number of parameters
MODES = ("full", "lora", "qlora")
OTHER_SECONDS = 120  # of a type for which no shape was written


def report(folder: Path, mode: str) -> dict[str, Any]:
    """Returns the report on the config.json in `folder`, its totals and its processor time."""
    config = Config.model_validate(
        {
            "model": {"name": str(folder)},
            "tuning": {"mode": mode},
            "data": {"train_path": "none", "cache_dir": str(folder / "none/cache")},
            "train": {"output_dir": "none"},
        }
    )
    started = time.process_time()
    try:
        found = cover(config)
    except UserError as error:
        return {"mode": mode, "refused": str(error).replace(str(folder), folder.name)[:300]}
    assert isinstance(found, Coverage)
    row: dict[str, Any] = {
        "mode": mode,
        "seconds": round(time.process_time() - started, 2),
        "num_parameters": found.num_parameters,
        "num_trained": found.num_trained,
        "kinds": {
            kind: {
                key: number for key, number in (group.parameters | group.products).items() if number
            }
            for kind, group in found.groups.items()
        },
    }
    notes = {"contradictions": found.contradictions, "missed": found.missed}
    notes |= {"problem": found.problem}
    return row | {key: value for key, value in notes.items() if value}


def real(folder: Path, names: list[str], modes: list[str]) -> dict[str, Any]:
    """Returns the reports on configurations in full size, beside the published numbers."""
    source = SHARED / "data/model_configs"
    published = json.loads((source / "param_counts_meta.json").read_text("utf-8"))
    rows: dict[str, Any] = {}
    for name in sorted(published) if not names else set(names) & set(published):
        (folder / name).mkdir()
        (folder / name / "config.json").write_bytes((source / f"{name}.json").read_bytes())
        reports = [report(folder / name, mode) for mode in modes]
        number = reports[0].get("num_parameters", 0)
        difference = number / published[name] - 1
        rows[name] = {"published": published[name], "difference": difference, "reports": reports}
        print(f"{name}: {number:,} parameters, {difference:+.4%}", flush=True)
    return rows


def tiny(folder: Path, kinds: list[str]) -> dict[str, Any]:
    """Returns the reports on tiny shapes of these model types."""
    rows: dict[str, Any] = {}
    every = [*families.DECODERS, *families.OTHER]
    for kind in every if not kinds else [kind for kind in kinds if kind in every]:
        families.tiny_config(kind).save_pretrained(folder / kind)
        rows[kind] = {"reports": [report(folder / kind, mode) for mode in MODES]}
        print(kind, *(_verdict(each) for each in rows[kind]["reports"]), flush=True)
    return rows


def others(folder: Path, kinds: list[str]) -> dict[str, str]:
    """Returns what the report with LoRA says about all other types that write text: ok or why not.

    Their shapes are the defaults of transformers, shrunk, for which nothing was written by hand.
    """
    found = {}
    for kind in families.other_types() if not kinds else set(families.other_types()) & {*kinds}:
        try:
            with _at_most(OTHER_SECONDS):
                families.tiny_config(kind).save_pretrained(folder / kind)
                found[kind] = _verdict(report(folder / kind, "lora"))
        except Exception as error:  # noqa: BLE001  # a type may fail in any way
            reason = " ".join(str(error).split())[:150]
            found[kind] = f"no tiny shape: {type(error).__name__}: {reason}"
        print(kind, found[kind], flush=True)
    return found


@contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    """Raises TimeoutError in a block that takes longer."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _verdict(row: dict[str, Any]) -> str:
    keys = ("refused", "problem", "contradictions", "missed")
    return next((f"{key}: {row[key]}" for key in keys if key in row), "ok")


def summarise(found: dict[str, Any], console: Console) -> None:
    """Prints a row for each model: what differs, and what is trained."""
    rows = []
    for name, row in found.items():
        for each in row["reports"]:
            states = [0] * len(STATES)
            for group in each.get("kinds", {}).values():
                states = [n + group.get(key, 0) for n, key in zip(states, STATES, strict=True)]
            rows.append([name, each["mode"], *(f"{n:,}" for n in states), _verdict(each)[:80]])
    console.print(table("Coverage", ("model", "mode", *STATES, "verdict"), rows, left=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/coverage.json")
    parser.add_argument("--names", default="", help="configurations, by comma; -: none")
    parser.add_argument("--kinds", default="", help="model types, by comma; -: none")
    parser.add_argument("--others", default="", help="further model types, by comma; -: none")
    parser.add_argument("--modes", default="lora", help="of the configurations, by comma")
    args = parser.parse_args()
    started, before = time.perf_counter(), sum(os.times()[:2])
    names, kinds = (list(filter(None, given.split(","))) for given in (args.names, args.kinds))
    with tempfile.TemporaryDirectory() as folder:
        found = {
            "configurations": real(Path(folder), names, args.modes.split(",")),
            "model_types": tiny(Path(folder), kinds),
            "other_types": others(Path(folder), list(filter(None, args.others.split(",")))),
        }
    seconds = {"wall": time.perf_counter() - started, "cpu": sum(os.times()[:2]) - before}
    summarise(found["configurations"] | found["model_types"], make_console())
    far = [n for n, row in found["configurations"].items() if abs(row["difference"]) > TOLERANCE]
    print(
        f"{seconds['cpu']:.0f} s of processor time; more than {TOLERANCE:.1%} off: {far or 'none'}"
    )
    write_json(args.json, found | {"seconds": seconds, "tolerance": TOLERANCE, "off": far})


if __name__ == "__main__":
    main()
