"""Converts a merged model for llama.cpp."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from sft.errors import MergeError
from sft.runtime.checkpoint import STAGING

CONVERTER = "convert_hf_to_gguf.py"
OUTTYPES = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}


def find_converter(llama_cpp: Path) -> Path:
    """Returns llama.cpp's script that makes GGUF files. Raises MergeError if it is missing."""
    path = llama_cpp / CONVERTER
    if not path.is_file():
        raise MergeError(
            f"GGUF: expected llama.cpp's {CONVERTER} in {llama_cpp}, found "
            f"{'a folder without it' if llama_cpp.is_dir() else 'no such folder'}; `git clone "
            "https://github.com/ggml-org/llama.cpp`, and give GGUF=path/to/llama.cpp, or set "
            "LLAMA_CPP to it"
        )
    return path


def convert(folder: Path, dtype: str, llama_cpp: Path) -> Path:
    """Makes a GGUF file in the merged `folder`; returns its path. Raises MergeError on failure."""
    kind = OUTTYPES[dtype]
    final = folder / f"{folder.resolve().name}-{kind}.gguf"
    staged = final.with_suffix(STAGING)
    command = [sys.executable, str(find_converter(llama_cpp)), str(folder)]
    command += ["--outfile", str(staged), "--outtype", kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not staged.exists():
        staged.unlink(missing_ok=True)
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise MergeError(
            f"{CONVERTER} of {llama_cpp} ended with {done.returncode} and no GGUF file: "
            f"{lines[-1] if lines else 'no output'}; the merged model in {folder} is whole"
        )
    staged.replace(final)
    return final
