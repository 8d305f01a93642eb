"""What every script shares: `--config file a.b=c ...`, and errors told in one message."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn

from sft.config import Config, UserError, load_config, redacted

INTERRUPTED = 130  # 128 + SIGINT, what shells report


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the configuration file and its overrides."""
    result = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    result.add_argument("--config", default="configs/nano.yaml", help="YAML file (docs/CONFIG.md)")
    result.add_argument("overrides", nargs="*", metavar="section.key=value")
    return result


def configuration(args: argparse.Namespace) -> Config:
    return load_config(args.config, args.overrides)


def quiet_libraries() -> None:
    """Silences what libraries say that asks nothing of a user; their errors stay."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in ("bitsandbytes", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch|peft")


def _tell_crash(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """A traceback as usual, without secrets: what a cluster shows on a console, it also keeps."""
    told = "".join(traceback.format_exception(kind, error, trace))
    print(redacted(told), file=sys.stderr, end="")


def run(main: Callable[[], int | None]) -> NoReturn:
    """Runs a script's main and exits: a UserError is one message and its exit code."""
    quiet_libraries()
    sys.excepthook = _tell_crash
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
        # Segments that grow leave less of a GPU's memory unusable; the plan counts on it.
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    try:
        sys.exit(main() or 0)
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # raised on all ranks, told by one a node
            print(f"error: {redacted(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
