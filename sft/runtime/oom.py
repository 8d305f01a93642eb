"""Recognises an error of memory that ran out, and frees what the attempt held."""

from __future__ import annotations

import gc

import torch


def oom_message(error: BaseException) -> str | None:
    """Returns the allocator's message (host, torch or GPU), or None for any other error."""
    message = (str(error).strip() or type(error).__name__).split("\n")[0].rstrip(".")
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return message
    phrases = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
    is_oom = isinstance(error, RuntimeError) and any(phrase in message for phrase in phrases)
    return message if is_oom else None


def release_memory() -> None:
    """Gives back the memory that a failed attempt held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
