"""A run knows how it ends: one run in a folder, signals, stalled and dead ranks, and status.json.

    Status  how the attempt ended; of several ranks the first to tell wins
    Lock    one run at a time in a folder; a dead owner's lock is free
    Guard   around a whole run: hears signals, watches over this rank and its peers, tells the end

Signals set flags; `Engine` and `Task` carry them to all ranks, so that a run stops at one common
step. A thread per rank writes what the rank is doing into the run folder, where a peer finds it
also when the rank is stopped or dead, and ends the process when nothing moves any more. Files and
not the store of the process group, since that may live in the very process that is stopped.
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
from sft.errors import PeerError, Preempted, UserError, redact
from sft.runtime import oom
from sft.runtime.children import is_dead, machine_id, process_state
from sft.runtime.console import read_json, write_json
from sft.runtime.lock import Lock
from sft.runtime.status import RANKS, TRACEBACK, Status

TICK = 0.2  # seconds between two looks at signals
BEAT = 1.0  # seconds between two words of a rank to its peers
GRACE = 5.0  # seconds that a rank has to end by itself, and that others wait for its reason
SAME_REQUEST = 2.0  # seconds in which a signal is the same one: launchers pass on what all got
SILENT = 5.0  # seconds after which a rank on another machine seems to be gone
PACKAGE = str(Path(__file__).parents[1])


# --- ranks that watch each other ---------------------------------------------------------------


@dataclass(frozen=True)
class Word:
    """What a rank tells its peers."""

    rank: int
    pid: int
    host: str
    machine: str
    attempt: int | None
    beat: int  # counts words
    ticks: int  # counts signs of progress
    arrived: int  # counts points that all ranks pass: who has passed fewer is behind
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
class Seen:
    """A peer's last word, and since when, by the clock of this process, it says the same."""

    word: Word
    spoke_at: float
    moved_at: float

    def renewed(self, word: Word, now: float) -> Seen:
        spoke_at = now if word.beat != self.word.beat else self.spoke_at
        return Seen(word, spoke_at, now if word.ticks != self.word.ticks else self.moved_at)

    def is_dead(self) -> bool:
        return self.word.machine == machine_id() and is_dead(self.word.pid)

    def is_silent(self, now: float) -> bool:
        """Stopped or dead. On another machine that shows in its silence."""
        if self.word.machine == machine_id():
            return process_state(self.word.pid) in ("T", "t") or is_dead(self.word.pid)
        return now - self.spoke_at > SILENT


def _where(thread: int) -> tuple[str, bool]:
    """(innermost place in this package, whether it waits for other processes) of a thread."""
    frame: FrameType | None = sys._current_frames().get(thread)
    place, waits = "", False
    while frame:
        name = frame.f_code.co_filename
        waits |= "/torch/distributed/" in name or "/filelock/" in name
        if not place and name.startswith(PACKAGE) and name != __file__:
            place = f"{Path(name).name}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return place or "outside of sft", waits


# What a collective says when others are gone; the cause is theirs to tell.
OF_PEERS = re.compile(
    r"gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe|by peer|tcpstore|recvvalue"
    r"|sendbytes|timed? ?out waiting|barrier",
    re.IGNORECASE,
)


class Guard:
    """Around a run, in every rank. Without `folder` it does nothing and catches no signal.

    `stall_timeout`: seconds without progress (`tick`, `mark`) of any rank, after which all end.
    """

    def __init__(self, folder: Path | None = None, stall_timeout: float = math.inf):
        self.rank = int(os.environ.get("RANK", "0"))
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.folder, self.stall_timeout = folder, stall_timeout
        self.status = Status(folder or Path())
        self.accelerator: Accelerator | None = None  # of the group, once joined
        self.stopping = False  # all ranks have agreed to stop
        self._saving = False  # all ranks have agreed to save and go on
        self._stop: signal.Signals | None = None  # asked of this rank
        self._stop_heard_at = 0.0  # by the watch
        self._saves = self._saves_told = 0
        self._interrupts = False  # a first signal raises at once: no rank waits for this one yet
        self._section, self._step = "start", 0
        self._beats = self._ticks = self._arrived = 0
        self._moved_at = self._others_ended_at = time.monotonic()
        self._peers: dict[int, Seen] = {}
        self._left = threading.Event()
        self._ending = threading.Lock()  # main thread or watch: one of them tells the end

    # -- the run

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def __enter__(self) -> Guard:
        assert self.folder
        self.lock = Lock(self.folder) if self.is_first else None
        self._interrupts = True
        self._catch_signals()
        self._main = threading.get_ident()
        self._watch = threading.Thread(target=self._keep_watch, name="guard", daemon=True)
        self._watch.start()
        return self

    def move_folder(self, aside: Path) -> None:
        assert self.lock
        self.lock.move_folder(aside)

    def begin(self) -> None:
        """The folder is ours: from here on its status tells of this run. By the first rank."""
        self.status.begin()

    def join(self, accelerator: Accelerator, of_first: Any) -> Any:
        """From here on this rank moves with the others. Every rank gets what the first one has."""
        shared = [of_first, self.status.attempt]
        if accelerator.num_processes > 1:
            broadcast_object_list(shared)
        self._interrupts = False
        self.accelerator = accelerator
        of_first, self.status.attempt = shared
        return of_first

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._interrupts = False
        if not self._ending.acquire(blocking=False):
            time.sleep(2 * GRACE)  # the watch is ending this process
        code = self._end(error)
        self._left.set()
        self._watch.join()
        self._release_signals()
        with suppress(OSError):
            self._file_of(self.rank).unlink()  # gone, but not dead
        if self.lock:
            self.lock.release()
        if error is None:
            return
        if self.world > 1:  # others may be in a collective, which this one's shutdown waits for
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        if not isinstance(error, UserError):  # which `cli.run` tells
            raise SystemExit(code) from None

    def _end(self, error: BaseException | None) -> int:
        """Tells how the run ended here, if no other rank has; returns the exit code."""
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
        elif said := oom.oom_message(error):  # outside of a step, which knows what to do
            code = errors.OutOfMemory.exit_code
            reason = f"memory ran out: {said}. Lower train.max_tokens or evaluation.batch_size"
        code, is_ours = self._tell(state, code, reason, culprit)
        if not is_ours or (self.world == 1 and isinstance(error, UserError)):
            return code
        is_own = not isinstance(error, UserError) or not (self.accelerator or culprit)
        self._say(reason, of=self._word() if is_own else None)
        if not isinstance(error, UserError | SystemExit):
            text = redact("".join(traceback.format_exception(error)))
            print(text, file=sys.stderr, end="", flush=True)
            with suppress(OSError):
                (self.status.folder / TRACEBACK).write_text(text, "utf-8")
        return code

    def _tell(
        self, state: str, code: int, reason: str, culprit: Word | None = None
    ) -> tuple[int, bool]:
        """Writes the status, if no other rank has; (exit code of the run, whether it is ours)."""
        rank = culprit.rank if culprit else self.rank
        if self.status.end(state, code, redact(reason), rank, self._step):
            return code, True
        if self.status.attempt is None:  # of what is not begun, all but the first end quietly
            return code, self.is_first or state != "preempted"
        return self.status.verdict().get("exit_code") or code, False

    def _say(self, reason: str, of: Word | None) -> None:
        place = f"rank {of.rank}, " if of and self.world > 1 else ""
        place += f"step {of.step}: " if of else ""
        print(f"error: {place}{redact(reason)}", file=sys.stderr, flush=True)

    def _cause_of(self, error: BaseException) -> tuple[BaseException, Word | None]:
        """`error`, or what befell another rank and only shows here; and that rank."""
        by_peers = isinstance(error, RuntimeError) and OF_PEERS.search(str(error))
        by_launcher = isinstance(error, Preempted) and not self.accelerator
        if self.world == 1 or not (by_peers or by_launcher):
            return error, None
        deadline = time.monotonic() + (GRACE if by_peers else 2 * BEAT)
        while time.monotonic() < deadline and not self.status.has_ended():
            self._look()
            if dead := self._dead():
                return PeerError(_died(dead)), dead
            time.sleep(TICK)
        if by_launcher or self.status.has_ended():
            return error, None
        silent = [seen.word for seen in self._peers.values() if seen.is_silent(time.monotonic())]
        named = ", ".join(f"{word}, last heard of in {word.place}" for word in silent)
        told = f"the connection to {named or 'another rank'} broke: {error}"
        return PeerError(told), silent[0] if silent else None

    # -- progress

    def tick(self) -> None:
        """A sign of progress of this rank alone."""
        self._ticks += 1
        self._moved_at = time.monotonic()

    def mark(self, step: int | None = None) -> None:
        """A point that every rank passes equally often."""
        self._step = self._step if step is None else step
        self._arrived += 1
        self.tick()

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """What the run is in, for messages; each has the whole time limit."""
        former, self._section = self._section, name
        self.mark()
        try:
            yield
            self.mark()
        finally:
            self._section = former

    # -- signals

    def flags(self) -> tuple[bool, bool]:
        """(stop, save) as asked of this rank; their sums over all ranks are for `agree`."""
        saves = self._saves
        save, self._saves_told = saves > self._saves_told, saves
        return self._stop is not None, save

    def agree(self, stop: float, save: float) -> None:
        self.stopping |= stop > 0
        self._saving |= save > 0

    def take_saving(self) -> bool:
        """Whether all ranks have agreed to save; asked once, it is done."""
        saving, self._saving = self._saving, False
        return saving

    def stop_if_asked(self) -> None:
        """Raises Preempted on every rank if any was asked to stop. Collective."""
        self.mark()
        flags = self.flags()
        if self.accelerator and self.accelerator.num_processes > 1:
            asked = torch.tensor(flags, dtype=torch.float32, device=self.accelerator.device)
            flags = self.accelerator.reduce(asked, "sum").tolist()
        self.agree(*flags)
        self.stop_if_agreed()

    def stop_if_agreed(self) -> None:
        if self.stopping:
            raise self.preempted("before the first step; there was nothing to save")

    def preempted(self, when: str) -> Preempted:
        asked = self._stop.name if self._stop else "a signal"
        return Preempted(
            f'stopped by {asked} {when}. Continue with ARGS="train.resume_from_checkpoint=auto".'
        )

    def _catch_signals(self) -> None:
        """From here on signals are flags. The watch hears them by a pipe, also while the main
        thread waits in a collective, where handlers do not run."""

        def stop(number: int, _: Any) -> None:
            is_first, self._stop = self._stop is None, self._stop or signal.Signals(number)
            if is_first and self._interrupts:
                self.stop_if_asked()

        def save(*_: Any) -> None:
            self._saves += 1

        self._pipe, self._pipe_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._kept_fd = signal.set_wakeup_fd(self._pipe_end, warn_on_full_buffer=False)
        handlers = {signal.SIGINT: stop, signal.SIGTERM: stop, signal.SIGUSR1: save}
        self._kept = {number: signal.signal(number, new) for number, new in handlers.items()}

    def _release_signals(self) -> None:
        for number, handler in self._kept.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._kept_fd)
        os.close(self._pipe)
        os.close(self._pipe_end)

    # -- the watch: a thread

    def _keep_watch(self) -> None:
        spoke_at = -math.inf
        while not self._left.is_set():
            if select.select([self._pipe], [], [], TICK)[0]:
                self._hear(os.read(self._pipe, 64))
            if time.monotonic() - spoke_at >= BEAT:
                spoke_at = time.monotonic()
                self._speak()
                self._watch_peers()
            self._watch_progress()

    def _hear(self, signals: bytes) -> None:
        """Tells of the first signal, ends at the second."""
        for number in signals:
            if number not in (signal.SIGINT, signal.SIGTERM):
                continue
            name, now = signal.Signals(number).name, time.monotonic()
            if not self._stop_heard_at:
                self._stop_heard_at = now
                if self.is_first:
                    print(
                        f"{name}: stopping after this step; again to stop at once", file=sys.stderr
                    )
            elif now - self._stop_heard_at > SAME_REQUEST:
                self._leave("interrupted", 128 + number, f"a second signal, {name}", patience=0)

    def _speak(self) -> None:
        if not (self.is_first or self.accelerator):
            self.status.follow()
        if self.world > 1 and self.status.attempt is not None:
            self._beats += 1
            with suppress(OSError):  # a full disk is not this thread's to tell
                self._file_of(self.rank).parent.mkdir(parents=True, exist_ok=True)
                write_json(self._file_of(self.rank), asdict(self._word()))

    def _word(self) -> Word:
        where, waits = _where(self._main)
        return Word(
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

    def _look(self) -> None:
        """Reads the words of all peers."""
        now = time.monotonic()
        for rank in range(self.world):
            told = read_json(self._file_of(rank)) if rank != self.rank else {}
            if not told or told.get("attempt") != self.status.attempt:
                self._peers.pop(rank, None)  # not there yet, or has left in peace
                continue
            word = Word(**told)
            seen = self._peers.get(rank)
            self._peers[rank] = seen.renewed(word, now) if seen else Seen(word, now, now)

    def _dead(self) -> Word | None:
        return next((seen.word for seen in self._peers.values() if seen.is_dead()), None)

    def _watch_peers(self) -> None:
        """Ends this rank some time after another has ended or died, should it not do so itself."""
        if self.world == 1:
            return
        if len(self._peers) < self.world - 1 or self._dead():
            self._look()
        now, dead = time.monotonic(), self._dead()
        if not dead and not self.status.has_ended():
            self._others_ended_at = now
        elif now - self._others_ended_at > GRACE:
            told = _died(dead) if dead else "another rank has ended the run"
            self._leave("failed", PeerError.exit_code, told, *([dead] if dead else []))

    def _watch_progress(self) -> None:
        """Ends this rank when it has stood still for too long, and so have all others."""
        now = time.monotonic()
        if self._interrupts and self._stop and now - self._stop_heard_at > GRACE:
            asked = self.preempted("before the first step; there was nothing to save")
            self._leave("preempted", asked.exit_code, str(asked))
        idle, limit = now - self._moved_at, self.stall_timeout
        if idle > limit / 2:
            self._look()
        if idle > limit and all(now - s.moved_at > limit / 2 for s in self._peers.values()):
            culprits, told = self._behind()
            self._leave("failed", PeerError.exit_code, told, *culprits)

    def _behind(self) -> tuple[list[Word], str]:
        """The ranks for which all others wait, if some stand out; and the message."""
        now, own = time.monotonic(), self._word()
        words = [((True, own.arrived, own.waits), own)]
        for seen in self._peers.values():
            key = (not seen.is_silent(now), seen.word.arrived, seen.word.waits)
            words.append((key, seen.word))
        (least, _) = min(words, key=lambda each: each[0])
        last = [word for key, word in words if key == least]
        gone = "" if least[0] else "stopped or dead, "
        places = "; ".join(f"{word}, {gone}{word.place}" for word in last)
        is_told_apart = len(last) < len(words) or len(words) == 1
        named = "no progress of" if is_told_apart else "no progress, and no rank is behind:"
        told = f"{named} {places}, for {self.stall_timeout:g} s (train.stall_timeout)"
        return last if is_told_apart else [], told

    def _leave(
        self, state: str, code: int, reason: str, *culprits: Word, patience: float = GRACE
    ) -> None:
        """Ends this process, whatever its main thread is in, unless that is ending it already."""
        if not self._ending.acquire(timeout=patience):
            if not self._left.is_set():
                os._exit(code)
            return
        code, is_ours = self._tell(state, code, reason, culprits[0] if culprits else None)
        if is_ours:
            self._say(reason, of=None)
        if code == PeerError.exit_code:
            stacks = self._file_of(self.rank).with_suffix(".stacks")
            with suppress(OSError), stacks.open("w") as file:
                faulthandler.dump_traceback(file)
        for word in culprits:
            if word.rank != self.rank and word.machine == machine_id():
                _end_stuck(word.pid)
        os._exit(code)


def _end_stuck(pid: int) -> None:
    """A process that is stopped, or whose watch never gets a turn, cannot end by itself."""
    deadline = time.monotonic() + 2 * GRACE
    while not is_dead(pid):
        if process_state(pid) in ("T", "t") or time.monotonic() > deadline:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
            return
        time.sleep(TICK)


def _died(word: Word) -> str:
    return (
        f"{word} died without a word, last heard of in {word.place}: it crashed, or was killed, "
        "perhaps for want of memory (see dmesg)"
    )
