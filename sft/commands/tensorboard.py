"""Starts and stops TensorBoard: one server for each folder of runs, only on this machine.

A server is recognised by an environment variable that it was started with, so that no other process
is ever stopped, whatever its command line says.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from sft import cli
from sft.errors import UserError
from sft.runtime import plain
from sft.runtime.children import is_dead
from sft.runtime.output import show

HOST = "127.0.0.1"
PROGRAM = (sys.executable, "-m", "tensorboard.main")
FIRST_PORT = 6006  # TensorBoard's own; `auto` takes it or the next free one
NUM_PORTS = 100
START_SECONDS = 60  # a cold start on a network file system is slow
STOP_SECONDS = 10
MARK = "SFT_TENSORBOARD"  # the variable of a server; its value is the folder
LOG_NAME = ".tensorboard.log"


def tensorboard_options(parser: cli.Parser) -> None:
    parser.add_argument("--logdir", type=Path, default=Path("outputs"), help="the folder of runs")
    parser.add_argument("--stop", action="store_true", help="stop the server of that folder")
    parser.add_argument(
        "--port", type=_port, help=f"default: auto, the first free one from {FIRST_PORT}"
    )


def tensorboard(args: argparse.Namespace) -> None:
    """Starts or stops the server of a folder."""
    folder = args.logdir.resolve()
    if args.stop:
        stop(folder)
    else:
        start(folder, args.port)


def _port(text: str) -> int | None:
    if text == "auto":
        return None
    if text.isdigit() and 1 <= int(text) <= 65535:
        return int(text)
    raise argparse.ArgumentTypeError(f"expected auto or 1 to 65535, found {text!r}")


def start(folder: Path, port: int | None) -> None:
    """Starts a detached server and prints its address. Raises UserError if it does not answer."""
    for process in servers(folder):
        running = int(process.cmdline()[-1])
        if not _answers(running, folder):
            raise UserError(
                f"TensorBoard (pid {process.pid}) runs for {folder} but does not answer on port "
                f"{running}: stop it with `make tb-stop` and start again"
            )
        moved = port not in (None, running)
        note = f" (not on {port}: stop it first to move it)" if moved else ""
        show(f"TensorBoard already runs for {folder}{note}: http://localhost:{running}")
        return
    port = choose_port(port)
    try:
        is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        _launch(folder, port)
    except OSError as error:
        raise UserError(f"TensorBoard needs to write in {folder}: {error.strerror}") from error
    note = " (a new folder, without runs as yet)" if is_new else ""
    show(f"TensorBoard for {folder}{note}: http://localhost:{port}")


def choose_port(port: int | None) -> int:
    """Returns `port`, or the first free one for None. Raises UserError if it cannot be used."""
    end = FIRST_PORT + NUM_PORTS
    for each in range(FIRST_PORT, end) if port is None else (port,):
        if not (reason := _why_taken(each)):
            return each
    if port is None:
        raise UserError(f"no free port between {FIRST_PORT} and {end - 1}: give one with --port")
    advice = "Give another, or no --port for a free one."
    raise UserError(f"port {port} cannot be used: {reason}. {advice}")


def _why_taken(port: int) -> str | None:
    """Returns why nobody can listen on `port` now; None if it is free.

    IPv6 counts: a browser may take localhost to be ::1 and would find another server there.
    """
    for family, host in ((socket.AF_INET, HOST), (socket.AF_INET6, "::1")):
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do
                probe.bind((host, port))
        except OSError as error:
            if family == socket.AF_INET or error.errno == errno.EADDRINUSE:
                return error.strerror or str(error)  # otherwise a machine without IPv6
    return None


def _launch(folder: Path, port: int) -> None:
    """Starts a server and waits until it answers. Raises UserError with its log if it does not."""
    log = folder / LOG_NAME
    with plain.open_file(log, "w") as sink:
        process = subprocess.Popen(
            [*PROGRAM, "--logdir", str(folder), "--host", HOST, "--port", str(port)],
            env=os.environ | {MARK: str(folder)},
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in this terminal, or its end, is not for the server
        )
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if _answers(port, folder):
            return
        time.sleep(0.1)
    code = process.poll()
    _end(list(servers(folder)))
    how = f"no answer in {START_SECONDS} s" if code is None else f"ended with exit code {code}"
    last = "\n".join(log.read_text(errors="replace").strip().splitlines()[-8:])
    raise UserError(f"TensorBoard did not start on port {port}: {how}. The end of {log}:\n{last}")


def _answers(port: int, folder: Path) -> bool:
    """Returns whether a TensorBoard for this folder answers: another server may hold the port."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through a proxy
    try:
        with direct.open(f"http://{HOST}:{port}/data/environment", timeout=5) as answer:
            return json.load(answer).get("data_location") == str(folder)
    except (OSError, ValueError, AttributeError):  # not listening yet, or no TensorBoard
        return False


def servers(folder: Path) -> Iterator[psutil.Process]:
    """Yields the server that was started for `folder`, if it still runs."""
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):  # it ended, or belongs to another user
            is_ours = process.environ().get(MARK) == str(folder)
            if is_ours and process.cmdline()[1:3] == [*PROGRAM[1:]]:
                yield process


def stop(folder: Path) -> None:
    """Ends the server of `folder` and its children, and prints which."""
    running = list(servers(folder))
    if not running:
        show(f"no TensorBoard runs for {folder}: nothing to stop")
    _end(running)
    for process in running:
        show(f"stopped TensorBoard (pid {process.pid}) of {folder}")


def _end(processes: list[psutil.Process]) -> None:
    """Asks the processes and their children to end, waits, then kills."""
    family = [*processes, *(child for each in processes for child in each.children(True))]
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        deadline = time.monotonic() + STOP_SECONDS
        while time.monotonic() < deadline:
            if all(is_dead(process.pid) for process in family):
                return
            time.sleep(0.05)
