"""What every script shares: `--config file a.b=c ...`, and errors told in one message."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from sft.config.load import load_config, parse_generation
from sft.config.schema import Config, RunConfig
from sft.errors import UserError, redact
from sft.runtime.children import LAUNCHER, die_with_parent
from sft.tasks.registry import load_run

INTERRUPTED = 130  # 128 + SIGINT, what shells report


class Parser(argparse.ArgumentParser):
    """A parser of a script's own options; all other words are `overrides` of a configuration."""

    def __init__(self, description: str | None):
        epilog = (
            "set keys (docs/CONFIG.md) with section.key=value, --section.key value, --key value"
        )
        first = (description or "").split("\n")[0]
        super().__init__(description=first, epilog=epilog, allow_abbrev=False)

    def parse_args(self, args: Sequence[str] | None = None) -> argparse.Namespace:  # type: ignore[override]
        """Returns the options, and the other words in their order as `overrides`."""
        result, overrides = self.parse_known_args(args)
        result.overrides = overrides
        return result


def parser(description: str | None) -> Parser:
    """Returns a parser with the configuration file and its overrides."""
    result = Parser(description)
    result.add_argument("--config", default="configs/nano.yaml", help="YAML file (docs/CONFIG.md)")
    return result


def configuration(args: argparse.Namespace) -> Config:
    return load_config(args.config, args.overrides)


def run_configuration(args: argparse.Namespace) -> RunConfig:
    """Of whatever task."""
    return load_run(args.config, args.overrides)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Arguments that name a model to be used, and how it answers."""
    parser.add_argument("--model", default="outputs/nano", help="run, checkpoint, model or hub id")
    parser.add_argument("--adapter", help="folder of a LoRA adapter for the model")
    parser.add_argument("--quantization", choices=["nf4"], help="of the frozen weights")
    parser.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto")
    parser.add_argument("--batch-size", type=_rows, default="auto", help="prompts at once")
    parser.add_argument("--cache-dir", help="where a hub id is downloaded to")


def _rows(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def model_of(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_model` was given, as arguments of AccelerateConnector."""
    return {
        "model_name": args.model,
        "adapter": args.adapter,
        "quantization": args.quantization,
        "mixed_precision": args.precision,
        "batch_size": args.batch_size,
        "cache_dir": args.cache_dir,
    }


def generation(overrides: list[str]) -> dict[str, Any]:
    """Returns settings of generation from overrides, validated."""
    return parse_generation(overrides).model_dump()


def write_json(file: Path, report: object) -> None:
    """What `JSON=file` asks for. Raises UserError where it cannot be written."""
    from sft.runtime import console  # not before a rank has asked to end with its launcher

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        console.write_json(file, report)
    except OSError as error:
        raise UserError(f"JSON: cannot write {file}: {error.strerror}") from None


def quiet_libraries() -> None:
    """Silences what libraries say that asks nothing of a user; their errors stay."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in ("bitsandbytes", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch|peft")


def run(main: Callable[[], int | None]) -> NoReturn:
    """Runs a script's main and exits: a UserError is one message and its exit code."""
    parent = os.environ.pop(LAUNCHER, None)
    if "LOCAL_RANK" in os.environ:  # started by a launcher. A shell may go, as with nohup
        die_with_parent(int(parent or os.getppid()))
    quiet_libraries()
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
        # Segments that grow leave less of a GPU's memory unusable; the plan counts on it.
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    sys.excepthook = _bug
    try:
        sys.exit(main() or 0)
    except UserError as error:
        _tell(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        if _is_first():
            print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


# --- the first word is the cause's ---------------------------------------------------------------
# Where several ranks fail, the first one to do so tells why; the errors of the others are the same,
# or follow from it ("connection closed by peer"). Bugs are written into torchrun's file as well.


def _bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Python's hook for what nobody caught: never lost, and told once."""
    text = redact("".join(traceback.format_exception(kind, error, trace)))
    told = redact(f"{kind.__name__}: {error}")
    if _is_first():
        rank = _rank()
        print(f"error: {rank}{told}\n" * bool(rank) + text, file=sys.stderr)
    _record(told, text)


def _tell(error: UserError) -> None:
    if _is_first():
        told = redact(str(error))  # what a cluster shows on a console, it also keeps
        print(f"error: {'' if told.startswith('rank ') else _rank()}{told}", file=sys.stderr)


def _rank() -> str:
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return f"rank {os.environ.get('RANK', '0')}: " if several else ""


def _error_file() -> Path | None:
    name = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(name) if name else None


def _is_first() -> bool:
    """Whether no other rank on this machine has told an error in this attempt."""
    from sft.runtime import slurm

    mark = None
    if file := _error_file():  # of torchrun: attempt/local_rank/error.json
        mark = file.parent.parent / "reported"
    elif step := slurm.step_id():
        mark = Path(tempfile.gettempdir()) / f"sft_reported_{step}"
    try:
        if mark:
            mark.touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # better twice than never
        return True
    return True


def _record(message: str, text: str) -> None:
    """As torch.distributed.elastic writes it, without importing torch."""
    if file := _error_file():
        extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
        try:
            file.write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))
        except OSError:
            sys.stderr.write(text)
