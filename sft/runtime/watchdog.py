"""Ends a run in a known way: on signals, when ranks stall or die, and with a status.json.

Signals set flags; the engine shares them with all ranks, so that a run stops at one common step.
A thread in each rank, the watch, writes a heartbeat into the run folder. It ends the process when
nothing makes progress any more. Heartbeats are files, because a peer can read them when the rank is
stopped or dead; the store of the process group may be part of that very rank.
"""

from __future__ import annotations

import faulthandler
import math
import os
import re
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from sft import errors
from sft.errors import CheckpointError, PeerError, Preempted, UserError, oom_message, redact
from sft.runtime import output, plain
from sft.runtime.attempt import RANKS, TRACEBACK, Lock, Status
from sft.runtime.children import is_dead, is_stopped, machine_id
from sft.runtime.console import write_json
from sft.runtime.output import show
from sft.runtime.plain import read_json

TICK = 0.2  # seconds between two checks for signals and progress
BEAT = 1.0  # seconds between two heartbeats
GRACE = 5.0  # seconds in which a rank should end by itself, and report why
SAME_REQUEST = 2.0  # seconds in which a repeated signal counts once: launchers forward it as well
SILENT = 5.0  # seconds without a heartbeat after which a rank on another machine counts as gone
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # the last: a terminal was closed
PACKAGE = str(Path(__file__).parents[1])


@dataclass(frozen=True)
class Heartbeat:
    """A rank's message to its peers: who it is, where it is, and how far it has come."""

    rank: int
    pid: int
    host: str
    machine: str
    attempt: int | None
    beat: int  # number of this heartbeat
    ticks: int  # number of signs of progress so far
    arrived: int  # number of common points (`mark`) passed; the rank with the least is behind
    section: str
    step: int
    waits: bool  # for other processes
    where: str  # in the code

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"

    @property
    def place(self) -> str:
        return f"section {self.section}, step {self.step}, {self.where}"


@dataclass(frozen=True)
class PeerState:
    """A peer's last heartbeat, and the times (of this process) of its last beat and progress."""

    last: Heartbeat
    beat_at: float
    progress_at: float

    def update(self, new: Heartbeat, now: float) -> PeerState:
        beat_at = now if new.beat != self.last.beat else self.beat_at
        return PeerState(new, beat_at, now if new.ticks != self.last.ticks else self.progress_at)

    def is_dead(self) -> bool:
        return self.last.machine == machine_id() and is_dead(self.last.pid)

    def is_gone(self, now: float) -> bool:
        """Returns whether it is stopped or dead; on another machine, whether it is silent."""
        if self.last.machine == machine_id():
            return is_stopped(self.last.pid) or is_dead(self.last.pid)
        return now - self.beat_at > SILENT


def _locate(thread: int) -> tuple[str, bool]:
    """Returns a thread's innermost line in this package, and whether it waits for processes."""
    frame: FrameType | None = sys._current_frames().get(thread)
    place, waits = "", False
    while frame:
        name = frame.f_code.co_filename
        waits |= "/torch/distributed/" in name or "/filelock/" in name
        if not place and name.startswith(PACKAGE) and name != __file__:
            place = f"{Path(name).name}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return place or "outside of sft", waits


# Messages of a collective whose peers are gone; the cause is in what a peer reports.
PEER_GONE = re.compile(
    r"gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe|by peer|tcpstore|recvvalue"
    r"|sendbytes|timed? ?out waiting|barrier",
    re.IGNORECASE,
)


class Guard:
    """A context around a whole run, in every rank, that handles signals, stalls and the end.

    All ranks end after `stall_timeout` seconds in which none of them made progress (`tick`,
    `mark`). Without `folder` it does nothing. `trains`: it is a training, which has checkpoints.
    """

    def __init__(
        self, folder: Path | None = None, stall_timeout: float = math.inf, *, trains: bool = True
    ):
        self.rank = int(os.environ.get("RANK", "0"))
        self.is_first = self.rank == 0
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.folder, self.stall_timeout, self.trains = folder, stall_timeout, trains
        self.status = Status(folder or Path())
        self.accelerator: Accelerator | None = None  # set by `join`
        self.stopping = False  # all ranks have agreed to stop
        self._saving = False  # all ranks have agreed to save and go on
        self._stop: signal.Signals | None = None  # the stop signal that this rank received first
        self._stop_at = 0.0  # when the watch received it
        self._saves = self._saves_agreed = 0  # requests to save: received, and passed to `agree`
        self._interrupts = False  # a stop signal raises at once, as no rank waits for this one yet
        self._section, self._step = "start", 0
        self._beats = self._ticks = self._arrived = 0
        self._progress_at = self._peers_alive_at = time.monotonic()
        self._peers: dict[int, PeerState] = {}
        self._left = threading.Event()
        self._ending = threading.Lock()  # the main thread or the watch ends the run, not both

    # -- the run

    def __enter__(self) -> Guard:
        assert self.folder
        output.begin_run()
        self.lock = Lock(self.folder) if self.is_first else None
        self._interrupts = True
        self._catch_signals()
        self._main = threading.get_ident()
        self._watch = threading.Thread(target=self._keep_watch, name="guard", daemon=True)
        self._watch.start()
        return self

    def join(self, accelerator: Accelerator, value: Any) -> Any:
        """Makes this rank act with the others from now on; returns the first rank's `value`."""
        shared = [value, self.status.attempt]
        if accelerator.num_processes > 1:
            broadcast_object_list(shared)
        self._interrupts = False
        self.accelerator = accelerator
        value, self.status.attempt = shared
        self.status.pin()
        self._beat()  # so that a rank that dies right now is known to the others
        return value

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._interrupts = False
        if not self._ending.acquire(blocking=False):
            time.sleep(2 * GRACE)  # the watch is ending this process
        code = self._report_end(error)
        self._left.set()
        self._watch.join()
        for number, handler in self._former.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._former_fd)
        os.close(self._pipe)
        os.close(self._pipe_end)
        with suppress(OSError):
            self._file_of(self.rank).unlink()  # peers see that this rank left, not that it died
        if self.lock:
            self.lock.release()
        if error is None:
            return
        if self.world > 1:  # others may be in a collective, and a normal exit would wait for them
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        if not isinstance(error, UserError):  # which `cli.run` reports
            raise SystemExit(code) from None

    def _report_end(self, error: BaseException | None) -> int:
        """Reports how the run ended here, if no other rank has; returns the exit code."""
        if error is None:
            if self.is_first:
                self.status.end("finished", 0, None, 0, self._step)
            return 0
        error, culprit = self._cause_of(error)
        state, code, reason = "failed", 1, f"{type(error).__name__}: {error}"
        if isinstance(error, UserError):
            code, reason = error.exit_code, str(error)
            state = "preempted" if isinstance(error, Preempted) else state
        elif isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else code
        elif message := oom_message(error):  # not in a step: the engine handles those
            code = errors.OutOfMemory.exit_code
            reason = f"memory ran out: {message}. Lower train.max_tokens or evaluation.batch_size"
        code, is_ours = self._write_end(state, code, reason, culprit)
        if not is_ours or (self.world == 1 and isinstance(error, UserError)):
            return code
        is_own = not isinstance(error, UserError) or not (self.accelerator or culprit)
        self._print_error(reason, self._heartbeat() if is_own else None)
        if not isinstance(error, UserError | SystemExit):
            text = redact("".join(traceback.format_exception(error)))
            show(text, error=True, end="")
            with suppress(OSError):
                plain.write_text(self.status.folder / TRACEBACK, text)
        return code

    def _write_end(
        self, state: str, code: int, reason: str, culprit: Heartbeat | None = None
    ) -> tuple[int, bool]:
        """Writes the status if no rank has. Returns the exit code, and if this rank was first."""
        rank = culprit.rank if culprit else self.rank
        if self.status.end(state, code, redact(reason), rank, self._step):
            return code, True
        if self.status.attempt is None:
            # No attempt has begun: only the first rank reports a stop.
            return code, self.is_first or state != "preempted"
        return self.status.verdict().get("exit_code") or code, False

    def _print_error(self, reason: str, at: Heartbeat | None = None) -> None:
        place = f"rank {at.rank}, " if at and self.world > 1 else ""
        place += f"step {at.step}: " if at else ""
        show(f"error: {place}{redact(reason)}", error=True)

    def _cause_of(self, error: BaseException) -> tuple[BaseException, Heartbeat | None]:
        """Returns `error`, or if another rank's failure caused it, that failure and that rank."""
        by_peers = isinstance(error, RuntimeError) and PEER_GONE.search(str(error))
        by_launcher = isinstance(error, Preempted) and not self.accelerator
        if self.world == 1 or not (by_peers or by_launcher):
            return error, None
        deadline = time.monotonic() + (GRACE if by_peers else 2 * BEAT)
        while time.monotonic() < deadline and not self.status.has_ended():
            self._read_peers()
            if dead := self._dead_peer():
                return PeerError(_describe_death(dead)), dead
            time.sleep(TICK)
        if by_launcher or self.status.has_ended():
            return error, None
        gone = [peer.last for peer in self._peers.values() if peer.is_gone(time.monotonic())]
        named = ", ".join(f"{last}, last seen in {last.place}" for last in gone)
        reason = f"the connection to {named or 'another rank'} broke: {error}"
        return PeerError(reason), gone[0] if gone else None

    # -- progress

    def tick(self) -> None:
        """Records that this rank made progress."""
        self._ticks += 1
        self._progress_at = time.monotonic()

    def mark(self, step: int | None = None) -> None:
        """Records that this rank passed a point that every rank passes equally often."""
        self._step = self._step if step is None else step
        self._arrived += 1
        self.tick()

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Names what the run is doing, for messages; its start and end count as progress."""
        former, self._section = self._section, name
        self.mark()
        try:
            yield
            self.mark()
        finally:
            self._section = former

    # -- signals

    def flags(self) -> tuple[bool, bool]:
        """Returns the requests (stop, save) to this rank; `agree` takes their sums over ranks."""
        saves = self._saves
        save, self._saves_agreed = saves > self._saves_agreed, saves
        return self._stop is not None, save

    def agree(self, stop: float, save: float) -> None:
        self.stopping |= stop > 0
        self._saving |= save > 0

    def take_save_request(self) -> bool:
        """Returns whether all ranks have agreed to save, and clears the request."""
        saving, self._saving = self._saving, False
        return saving

    def stop_if_asked(self) -> None:
        """Raises Preempted on every rank if any received a stop signal. Collective."""
        self.mark()
        flags = self.flags()
        if self.accelerator and self.accelerator.num_processes > 1:
            local = torch.tensor(flags, dtype=torch.float32, device=self.accelerator.device)
            flags = self.accelerator.reduce(local, "sum").tolist()
        self.agree(*flags)
        self.stop_if_agreed()

    def stop_if_agreed(self) -> None:
        if self.stopping:
            raise self.preemption()

    def preemption(
        self, when: str = "before the first step; there was nothing to save"
    ) -> Preempted:
        name = self._stop.name if self._stop else "a signal"
        if not self.trains:
            return Preempted(f"stopped by {name}; the same command goes on with what is answered")
        return Preempted(
            f'stopped by {name} {when}. Continue with ARGS="train.resume_from_checkpoint=auto".'
        )

    def _catch_signals(self) -> None:
        """Turns signals into flags. A pipe passes them to the watch as well: no handler runs while
        the main thread waits in a collective."""

        def stop(number: int, _: Any) -> None:
            is_first, self._stop = self._stop is None, self._stop or signal.Signals(number)
            if is_first and self._interrupts:
                self.stop_if_asked()

        def save(*_: Any) -> None:
            self._saves += 1

        self._pipe, self._pipe_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._former_fd = signal.set_wakeup_fd(self._pipe_end, warn_on_full_buffer=False)
        handlers = dict.fromkeys(STOPS, stop) | {signal.SIGUSR1: save}
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # as nohup leaves it
            del handlers[signal.SIGHUP]
        self._former = {number: signal.signal(number, new) for number, new in handlers.items()}

    # -- the watch: a thread

    def _keep_watch(self) -> None:
        beat_at = -math.inf
        while not self._left.is_set():
            if select.select([self._pipe], [], [], TICK)[0]:
                self._receive(os.read(self._pipe, 64))
            if time.monotonic() - beat_at >= BEAT:
                beat_at = time.monotonic()
                self._check_folder()
                self._beat()
                self._watch_peers()
            self._watch_progress()

    def _receive(self, signals: bytes) -> None:
        """Announces the first stop signal, and ends this process at the second."""
        for number in signals:
            if number not in STOPS:
                continue
            name, now = signal.Signals(number).name, time.monotonic()
            if not self._stop_at:
                self._stop_at = now
                if self.is_first:
                    show(f"{name}: stopping after this step; again to stop at once", error=True)
            elif now - self._stop_at > SAME_REQUEST:
                self._exit_now("interrupted", 128 + number, f"a second signal, {name}", patience=0)

    def _check_folder(self) -> None:
        """Ends this rank if the run folder was moved, removed or taken by another run."""
        if reason := self.status.find_loss(self.lock):
            self._exit_now("failed", CheckpointError.exit_code, reason)

    def _beat(self) -> None:
        if not (self.is_first or self.accelerator):
            self.status.follow()
        if self.world > 1 and self.status.attempt is not None:
            self._beats += 1
            with suppress(OSError):  # the main thread reports a full disk
                self._file_of(self.rank).parent.mkdir(exist_ok=True)
                write_json(self._file_of(self.rank), asdict(self._heartbeat()))

    def _heartbeat(self) -> Heartbeat:
        where, waits = _locate(self._main)
        return Heartbeat(
            rank=self.rank,
            pid=os.getpid(),
            host=socket.gethostname(),
            machine=machine_id(),
            attempt=self.status.attempt,
            beat=self._beats,
            ticks=self._ticks,
            arrived=self._arrived,
            section=self._section,
            step=self._step,
            waits=waits,
            where=where,
        )

    def _file_of(self, rank: int) -> Path:
        return self.status.folder / RANKS / f"{rank}.json"

    def _read_peers(self) -> None:
        """Reads the heartbeats of all peers."""
        now = time.monotonic()
        for rank in range(self.world):
            found = read_json(self._file_of(rank)) if rank != self.rank else {}
            if not found or found.get("attempt") != self.status.attempt:
                self._peers.pop(rank, None)  # not there yet, or ended normally
                continue
            new = Heartbeat(**found)
            peer = self._peers.get(rank, PeerState(new, now, now))
            self._peers[rank] = peer.update(new, now)

    def _dead_peer(self) -> Heartbeat | None:
        return next((peer.last for peer in self._peers.values() if peer.is_dead()), None)

    def _watch_peers(self) -> None:
        """Ends this rank if another has ended or died and this one does not end by itself."""
        if self.world == 1:
            return
        if len(self._peers) < self.world - 1 or self._dead_peer():
            self._read_peers()
        now, dead = time.monotonic(), self._dead_peer()
        if not dead and not self.status.has_ended():
            self._peers_alive_at = now
        elif now - self._peers_alive_at > GRACE:
            reason = _describe_death(dead) if dead else "another rank has ended the run"
            self._exit_now("failed", PeerError.exit_code, reason, *([dead] if dead else []))

    def _watch_progress(self) -> None:
        """Ends this rank if no rank has made progress for `stall_timeout`."""
        now = time.monotonic()
        if self._interrupts and self._stop and now - self._stop_at > GRACE:
            error = self.preemption()
            self._exit_now("preempted", error.exit_code, str(error))
        idle, limit = now - self._progress_at, self.stall_timeout
        if idle > limit / 2:
            self._read_peers()
        if idle > limit and all(now - p.progress_at > limit / 2 for p in self._peers.values()):
            culprits, reason = self._find_stalled()
            self._exit_now("failed", PeerError.exit_code, reason, *culprits)

    def _find_stalled(self) -> tuple[list[Heartbeat], str]:
        """Returns the ranks for which all others wait (none if no rank is behind), and why."""
        now, own = time.monotonic(), self._heartbeat()
        absent = [rank for rank in range(self.world) if rank not in (self.rank, *self._peers)]
        if absent:  # they have ended normally, or were stopped before they could report anything
            silent = Heartbeat(absent[0], 0, "", "", own.attempt, 0, 0, 0, "start", 0, False, "")
            named = f"no sign of rank {', '.join(map(str, absent))}, stopped or never started,"
            return [silent], f"{named} for {self.stall_timeout:g} s (train.stall_timeout)"
        ranks = [((True, own.arrived, own.waits), own)]
        for peer in self._peers.values():
            ranks.append(((not peer.is_gone(now), peer.last.arrived, peer.last.waits), peer.last))
        least = min(progress for progress, _ in ranks)
        behind = [rank for progress, rank in ranks if progress == least]
        gone = "" if least[0] else "stopped or dead, "
        places = "; ".join(f"{rank}, {gone}{rank.place}" for rank in behind)
        is_clear = len(behind) < len(ranks) or len(ranks) == 1
        named = "no progress of" if is_clear else "no progress, and no rank is behind:"
        reason = f"{named} {places}, for {self.stall_timeout:g} s (train.stall_timeout)"
        return behind if is_clear else [], reason

    def _exit_now(
        self, state: str, code: int, reason: str, *culprits: Heartbeat, patience: float = GRACE
    ) -> None:
        """Ends this process; if the main thread is ending it already, after `patience` seconds."""
        if not self._ending.acquire(timeout=patience):
            if not self._left.is_set():
                os._exit(code)
            return
        code, is_ours = self._write_end(state, code, reason, culprits[0] if culprits else None)
        if is_ours:
            self._print_error(reason)
        if code == PeerError.exit_code:
            stacks = self._file_of(self.rank).with_suffix(".stacks")
            with suppress(OSError), plain.open_file(stacks, "w") as file:
                faulthandler.dump_traceback(file)
        for rank in culprits:
            if rank.rank != self.rank and rank.machine == machine_id():
                _kill_stuck(rank.pid)
        os._exit(code)


def _kill_stuck(pid: int) -> None:
    """Kills a process that does not end itself: it is stopped, or its watch cannot run."""
    deadline = time.monotonic() + 2 * GRACE
    while not is_dead(pid):
        if is_stopped(pid) or time.monotonic() > deadline:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
            return
        time.sleep(TICK)


def _describe_death(last: Heartbeat) -> str:
    return (
        f"{last} exited unexpectedly in {last.place}; crashed or killed, possibly out of memory "
        "(see dmesg)"
    )
