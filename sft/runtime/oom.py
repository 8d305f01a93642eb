"""Recognises an error of memory that ran out, and frees what the attempt held."""

from __future__ import annotations

import gc

import torch


def shortage(error: BaseException) -> str | None:
    """What an allocator said, if this error is one of memory: of the host, of torch, of a GPU."""
    said = (str(error).strip() or type(error).__name__).split("\n")[0].rstrip(".")
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return said
    phrases = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
    return said if isinstance(error, RuntimeError) and any(p in said for p in phrases) else None


def release() -> None:
    """Gives back what the failed attempt held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
