"""`sft train` with a console that takes nothing: console_worker.py CASE [override ...].

The streams are as the interpreter makes them: None where the shell has closed the descriptor.
"""

from __future__ import annotations

import os
import sys

from sft.commands import main


def dead_reader() -> int:
    read, write = os.pipe()
    os.close(read)
    return write


def full_later() -> int:
    """Returns a console that takes the first lines only: its reader goes after one of them."""
    read, write = os.pipe()
    if os.fork() == 0:
        os.close(write)
        os.read(read, 1)
        os._exit(0)
    os.close(read)
    return write


def stopped_reader() -> int:
    """Returns a pipe that is full, and whose reader is there and reads nothing."""
    from sft.runtime import output

    output.PATIENCE = 0.2
    read, write = os.pipe()
    os.set_inheritable(read, True)
    os.set_blocking(write, False)
    try:
        while True:
            os.write(write, b"x" * 4096)
    except BlockingIOError:
        return write


def put(maker, *streams: int) -> None:
    made = maker()
    for stream in streams:
        os.dup2(made, stream)


def close(*streams: int) -> None:
    for stream in streams:
        os.close(stream)
        setattr(sys, ("stdin", "stdout", "stderr")[stream], None)


CASES = {
    "stdout on a full disk": lambda: put(lambda: os.open("/dev/full", os.O_WRONLY), 1),
    "both on a full disk": lambda: put(lambda: os.open("/dev/full", os.O_WRONLY), 1, 2),
    "a reader that is gone": lambda: put(dead_reader, 1, 2),
    "a reader that goes": lambda: put(full_later, 1, 2),
    "a reader that reads nothing": lambda: put(stopped_reader, 1),
    "stderr closed": lambda: close(2),
    "stdout closed": lambda: close(1),
    "all closed": lambda: close(0, 1, 2),
}

if __name__ == "__main__":
    case, *words = sys.argv[1:]
    CASES[case]()
    sys.argv[1:] = words
    main("train")
