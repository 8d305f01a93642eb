"""`make tensorboard`, `make tb-stop`: one server per folder of runs, only on this machine.

`start` detaches a server, waits until it answers for *this* folder and records {pid, port, logdir,
create_time} in `<logdir>/.tensorboard.json`. `stop` ends the recorded process and no other: its
creation time and its command line must agree, because process ids are reused.

The file is not called tensorboard.py: Python puts the folder of the running script first on its
path, so that name would hide the tensorboard package from every script here that writes events.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from sft import cli
from sft.errors import UserError

HOST = "127.0.0.1"
FIRST_PORT = 6006  # TensorBoard's own; `auto` takes it or the next free one
NUM_PORTS = 100
START_SECONDS = 60  # a cold start on a network file system is slow
STOP_SECONDS = 10
CLOCK_SECONDS = 1.0  # creation times are rounded to clock ticks
STATE_NAME = ".tensorboard.json"
LOG_NAME = ".tensorboard.log"


@dataclass(frozen=True)
class Server:
    """What the state file says."""

    pid: int
    port: int
    logdir: str
    create_time: float

    @property
    def url(self) -> str:
        return f"http://localhost:{self.port}"


def main() -> None:
    args = arguments()
    logdir = args.logdir.resolve()
    if args.verb == "start":
        start(logdir, args.port)
    else:
        stop(logdir)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("start", "stop"):
        sub = verbs.add_parser(verb)
        sub.add_argument("--logdir", type=Path, default=Path("outputs"), help="the folder of runs")
    verbs.choices["start"].add_argument(
        "--port", type=port_number, help=f"default: auto, the first free one from {FIRST_PORT}"
    )
    return parser.parse_args()


def port_number(text: str) -> int | None:
    if text == "auto":
        return None
    if text.isdigit() and 1 <= int(text) <= 65535:
        return int(text)
    raise argparse.ArgumentTypeError(f"expected auto or 1 to 65535, found {text!r}")


# ---- start


def start(logdir: Path, port: int | None) -> None:
    running = find(logdir)
    if running:
        moved = port not in (None, running.port)
        note = f" (not on {port}: stop it first to move it)" if moved else ""
        print(f"TensorBoard already runs for {logdir}{note}: {running.url}")
        return
    port = free_port() if port is None else claim(port)
    try:
        logdir.mkdir(parents=True, exist_ok=True)
        server = launch(logdir, port)
    except OSError as error:
        raise UserError(f"TensorBoard needs to write in {logdir}: {error.strerror}") from error
    print(f"TensorBoard for {logdir}: {server.url}")


def claim(port: int) -> int:
    reason = why_taken(port)
    if reason:
        raise UserError(
            f"port {port} cannot be used: {reason}. "
            "Name another, or leave --port out for a free one."
        )
    return port


def free_port() -> int:
    for port in range(FIRST_PORT, FIRST_PORT + NUM_PORTS):
        if not why_taken(port):
            return port
    last = FIRST_PORT + NUM_PORTS - 1
    raise UserError(f"no free port between {FIRST_PORT} and {last}: name one with --port")


def why_taken(port: int) -> str | None:
    """Why nobody can listen on `port` now; None when it is free.

    IPv6 too: a browser may take localhost to be ::1 and would find another server there.
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


def launch(logdir: Path, port: int) -> Server:
    """Starts a detached server and returns once it answers; else ends it and tells why."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir)]
    with (logdir / LOG_NAME).open("w") as sink:
        process = subprocess.Popen(
            [*command, "--host", HOST, "--port", str(port)],
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in this terminal, or its end, is not for the server
        )
    server = Server(process.pid, port, str(logdir), psutil.Process(process.pid).create_time())
    write_state(logdir, server)  # before waiting: interrupted now, `stop` still finds it
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if serves(server):
            return server
        time.sleep(0.1)
    raise failure(server, process)


def failure(server: Server, process: subprocess.Popen[bytes]) -> UserError:
    """Ends what is left of a server that did not start; its log says why."""
    status = process.poll()
    if status is None:
        end(psutil.Process(process.pid))
    state_path(Path(server.logdir)).unlink(missing_ok=True)
    how = f"no answer in {START_SECONDS} s" if status is None else f"ended with exit code {status}"
    log = Path(server.logdir) / LOG_NAME
    last = "\n".join(log.read_text(errors="replace").strip().splitlines()[-8:])
    return UserError(
        f"TensorBoard did not start on port {server.port}: {how}. The end of {log}:\n{last}"
    )


def serves(server: Server) -> bool:
    """Whether a TensorBoard for this very folder answers: another server may hold the port."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through a proxy
    try:
        with direct.open(f"http://{HOST}:{server.port}/data/environment", timeout=5) as answer:
            location = json.load(answer).get("data_location")
    except (OSError, ValueError, AttributeError):  # not listening yet, or no TensorBoard
        return False
    return location == server.logdir


# ---- stop


def stop(logdir: Path) -> None:
    recorded = read_state(logdir)
    if recorded is None:
        print(f"no TensorBoard was started for {logdir}: nothing to stop")
        return
    process = process_of(recorded)
    if process is None:
        print(f"TensorBoard of {logdir} (pid {recorded.pid}) has ended already: nothing to stop")
    else:
        end(process)
        print(f"stopped TensorBoard (pid {recorded.pid}) of {logdir}")
    state_path(logdir).unlink(missing_ok=True)


def end(process: psutil.Process) -> None:
    """Asks, waits, then insists; its children (TensorBoard's data server) go with it."""
    family = [process]
    with contextlib.suppress(psutil.NoSuchProcess):
        family += process.children(recursive=True)
    for ask in (psutil.Process.terminate, psutil.Process.kill):
        for member in filter(alive, family):
            try:
                ask(member)
            except psutil.NoSuchProcess:
                continue
            except psutil.AccessDenied as error:
                raise UserError(f"process {member.pid} belongs to another user") from error
        deadline = time.monotonic() + STOP_SECONDS
        while time.monotonic() < deadline:
            if not any(map(alive, family)):
                return
            time.sleep(0.05)
    raise UserError(f"TensorBoard (pid {process.pid}) does not end")


def alive(process: psutil.Process) -> bool:
    """A zombie is not: it only waits for its parent, which in a container may never ask."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# ---- the state file


def find(logdir: Path) -> Server | None:
    """The recorded server if it still runs; a user error if it runs and does not answer."""
    recorded = read_state(logdir)
    if recorded is None or process_of(recorded) is None:
        return None
    if not serves(recorded):
        raise UserError(
            f"TensorBoard (pid {recorded.pid}) runs for {logdir} but does not answer at "
            f"{recorded.url}: stop it with `make tb-stop` and start again"
        )
    return recorded


def process_of(server: Server) -> psutil.Process | None:
    """The process that the record means; None if it ended or its id now belongs to another."""
    try:
        process = psutil.Process(server.pid)
        words = process.cmdline()
        same_time = abs(process.create_time() - server.create_time) <= CLOCK_SECONDS
    except psutil.Error:
        return None
    ours = {"tensorboard.main", server.logdir, str(server.port)} <= set(words)
    return process if ours and same_time and alive(process) else None


def state_path(logdir: Path) -> Path:
    return logdir / STATE_NAME


def read_state(logdir: Path) -> Server | None:
    path = state_path(logdir)
    try:
        return Server(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}): remove it and start again") from error


def write_state(logdir: Path, server: Server) -> None:
    staged = logdir / f"{STATE_NAME}.{os.getpid()}"
    staged.write_text(json.dumps(asdict(server), indent=2) + "\n")
    staged.replace(state_path(logdir))


if __name__ == "__main__":
    cli.run(main)
