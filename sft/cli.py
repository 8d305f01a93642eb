"""The command line of every verb: its arguments and overrides, and how errors are reported."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from sft.config.load import load_config
from sft.config.schema import Config, RunConfig
from sft.errors import ExitCode, UserError, redact
from sft.runtime import output
from sft.runtime.children import LAUNCHER, die_with_parent
from sft.tasks.registry import load_run

FORMS = "{0}.key=value, --{0}.key value or --key value sets a key (docs/CONFIG.md)"


class Parser(argparse.ArgumentParser):
    """Parses a verb's own options; all other arguments are `overrides` of a configuration."""

    def __init__(self, program: str, description: str, config: str | None):
        """Adds the option --config, and overrides, if there is a default `config`."""
        super().__init__(program, description=description, allow_abbrev=False)
        if config is not None:
            self.add_argument("--config", default=config, help="YAML file (default: %(default)s)")
            self.add_overrides("section")

    def add_overrides(self, section: str) -> None:
        """Accepts arguments that set keys of `section`; the configuration reads them."""
        self.epilog = FORMS.format(section)

    def parse(self, words: list[str]) -> argparse.Namespace:
        """Returns the options. The other arguments become `overrides`, in their order."""
        result, overrides = self.parse_known_args(words)
        if overrides and not self.epilog:
            self.error(f"unknown arguments: {' '.join(overrides)}")
        result.overrides = overrides
        return result


def configuration(args: argparse.Namespace) -> Config:
    """Returns the configuration of a fine-tuning run. Raises ConfigError with every problem."""
    return load_config(config_file(args), args.overrides)


def run_configuration(args: argparse.Namespace) -> RunConfig:
    """Returns the configuration of a run of any task. Raises ConfigError with every problem."""
    return load_run(config_file(args), args.overrides)


def config_file(args: argparse.Namespace) -> str:
    """Returns --config. Raises UserError if it is in configs/ but no such folder is here."""
    file = Path(args.config)
    if file.parts[:1] == ("configs",) and not Path("configs").is_dir():
        raise UserError(
            f"{file} is not here: configs/ comes with a checkout of the project, not with an "
            "installed package. Give --config FILE, or start in a checkout"
        )
    return args.config


def write_json(file: Path, values: object) -> None:
    """Writes the file that `--json` names. Raises UserError if it cannot be written."""
    from sft.runtime import console  # not before `run` has called die_with_parent

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        console.write_json(file, values, follow=True)
    except OSError as error:
        raise UserError(f"JSON: cannot write {file}: {error.strerror}") from None


def prepare_libraries() -> None:
    """Silences messages of libraries that need no action of the user; their errors stay.

    It also lets segments of GPU memory expand, as the plan assumes: that wastes less memory. From
    now on, output that cannot be written is lost without an error.
    """
    output.protect()
    output.cover_libraries()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # torchao logs kernels of other versions of CUDA that it could not load, and deprecations.
    for name in ("bitsandbytes", "DeepSpeed", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch|peft")
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def run(main: Callable[[], int | None]) -> NoReturn:
    """Runs `main` and exits with its code. A UserError is reported in one message."""
    parent = os.environ.pop(LAUNCHER, None)
    if "LOCAL_RANK" in os.environ:  # started by a launcher; a shell may end, as with nohup
        die_with_parent(int(parent or os.getppid()))
    prepare_libraries()
    sys.excepthook = _report_bug
    try:
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # of `python -m sft`
            signal.signal(signal.SIGINT, signal.default_int_handler)
        code = main() or 0
    except UserError as error:
        _report(error)
        sys.exit(error.exit_code)
    except UnicodeEncodeError as error:
        encoding = sys.getfilesystemencoding()
        if encoding == "utf-8":
            raise
        text = ascii(error.object[max(0, error.start - 40) : error.end + 40])
        message = f"{text}: a file cannot have this name in {encoding}, which this Python uses"
        _report(UserError(f"{message}; set PYTHONUTF8=1"))
        sys.exit(UserError.exit_code)
    except KeyboardInterrupt:
        if _is_first():
            output.show("interrupted", error=True)
        sys.exit(ExitCode.INTERRUPTED)
    sys.stdout.flush()
    code = code or int(output.is_lost())
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # All work is on disk, but gloo can abort in its destructors when the interpreter exits.
        from sft.runtime.processes import leave_process_group

        leave_process_group()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


# If several ranks fail, the first one reports the reason. The errors of the others are the same, or
# follow from it ("connection closed by peer"). Bugs are written into torchrun's file as well.


def _report_bug(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Prints an uncaught error once, as Python's `excepthook`."""
    text = redact("".join(traceback.format_exception(kind, error, trace)))
    message = redact(f"{kind.__name__}: {error}")
    if _is_first():
        rank = _rank()
        output.show(f"error: {rank}{message}\n" * bool(rank) + text, error=True)
    if file := _error_file():  # written as torch.distributed.elastic does, without importing torch
        extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
        try:
            file.write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))
        except OSError:
            output.show(text, error=True, end="")


def _report(error: UserError) -> None:
    if _is_first():
        message = redact(str(error))  # clusters keep the output of a console
        rank = "" if message.startswith("rank ") else _rank()
        output.show(f"error: {rank}{message}", error=True)


def _rank() -> str:
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return f"rank {os.environ.get('RANK', '0')}: " if several else ""


def _error_file() -> Path | None:
    name = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(name) if name else None


def _is_first() -> bool:
    """Returns whether no other rank of this machine has reported an error in this attempt."""
    from sft.runtime import slurm

    if file := _error_file():  # torchrun's: attempt/local_rank/error.json
        mark = file.parent.parent / "reported"
    elif step := slurm.step_id():
        mark = Path(tempfile.gettempdir()) / f"sft_reported_{step}"
    else:
        return True
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return mark.lstat().st_uid != os.getuid()  # nobody else may silence this run
    except OSError:
        pass  # reporting twice is better than never
    return True
