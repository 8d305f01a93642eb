"""A conversation at a terminal, with a model that repeats: chat_worker.py TERMINAL.

An answer is the list of all contents that the model has seen. "slow" is answered without an end.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import termios
import time
from types import SimpleNamespace

from sft.serve import chat


class Repeater:
    def complete(self, messages, on_text, **_):
        text = json.dumps([message["content"] for message in messages])
        on_text(text)
        while "slow" in messages[-1]["content"]:
            on_text(".")
            time.sleep(0.02)
        answer = SimpleNamespace(message=SimpleNamespace(content=text))
        return SimpleNamespace(finish_reason="stop", choices=[answer])


if __name__ == "__main__":
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored
    terminal = os.open(sys.argv[1], os.O_RDWR)
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
    for fd in range(3):
        os.dup2(terminal, fd)
    sys.stdin, sys.stdout = open(0), open(1, "w")  # noqa: SIM115
    os.environ |= {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
    print("begin", flush=True)
    chat.converse(chat.Conversation(Repeater(), lambda text: print(text, end="", flush=True)))
    print("end", flush=True)
