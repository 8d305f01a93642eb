"""Fetches the files of addresses (s3://, gs://, hf://, https:// ...) into the cache.

    <cache_dir>/remote/<sha256>/<name>         the bytes of a file, under their digest
    <cache_dir>/remote/addresses/<key>.json    the record of an address: its last copy
    <cache_dir>/remote/addresses/<key>.part    the bytes fetched so far, and their version (.json)

Each process asks the server once whether the copy is current. One process of a machine fetches,
and the others wait for its lock. An interrupted fetch is resumed if the server still has the same
version. A file becomes a copy only if its size, and every digest that the server gave, are
right. Credentials stay in memory: names, messages and files have addresses without them.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import unquote, urlsplit, urlunsplit

import psutil
from filelock import FileLock, Timeout

from sft.data.stores import Answer, FetchError, FileSystem, Web, open_store
from sft.errors import HIDDEN, DataError, hide_credentials
from sft.runtime import plain
from sft.runtime.console import bar, duration, make_console, size, write_json
from sft.runtime.plain import read_json

ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
KEPT_DAYS = 7  # without use, after which a copy is removed
SHA256 = "[0-9a-f]{64}"
PAUSES = (1, 2, 4, 8, 16)  # seconds before each new attempt without progress
MIB = 1 << 20
SIGNATURES = re.compile(  # parts of a query that change while the file is the same
    r"(?i)(x-(amz|goog)-[\w-]+|sig|signature|s[eptvrk]|sk\w+|expires|policy|key-pair-id|token"
    r"|access_token|auth|awsaccesskeyid|googleaccessid)(=|$)"
)
RECORD = {  # keys of a record, and the types of their values
    **dict.fromkeys(("name", "file", "sha256", "version", "asked"), str),
    "size": int,
    **dict.fromkeys(("fetched", "checked"), float),
}
Tick = Callable[[], None]


class Copy(NamedTuple):
    """A remote file on this machine."""

    name: str  # its address without credentials
    path: str
    sha256: str


def is_remote(text: str) -> bool:
    """Returns whether a path is an address, such as s3://bucket/rows.jsonl."""
    return bool(ADDRESS.match(text)) and not text.startswith("file://")


def find(address: str) -> tuple[str, dict[str, str], bool]:
    """Returns the name of an address, {name: address} of its files, and whether it is a folder.

    Raises DataError if it has no file.
    """
    name = hide_credentials(address)
    if HIDDEN in address:
        return name, {name: address}, False
    with _reported(name, address):
        store = open_store(address)
        return name, *store.find()


def fetch(address: str, name: str, cache_dir: str, tick: Tick = lambda: None) -> Copy:
    """Returns the copy of a file, fetched unless it is current. Raises DataError.

    `tick` is called whenever there is progress.
    """
    folder = Path(cache_dir, "remote")
    with _reported(name, address, folder):
        (folder / "addresses").mkdir(parents=True, exist_ok=True)
        if HIDDEN in address:
            return _copy_of_name(folder, name)
        record = folder / "addresses" / f"{_identity(address)}.json"
        with _lock(record.with_suffix(".lock"), name, tick):
            copy = _Transfer(address, name, folder, record, tick).run()
        os.utime(Path(copy.path).parent)  # used now
        return copy


def prune(cache: Path, find_used: Callable[[], set[str]]) -> None:
    """Removes copies and parts that were not used for KEPT_DAYS days.

    Copies whose digest `find_used` returns stay: prepared data were made of them.
    """
    oldest, addresses = time.time() - KEPT_DAYS * 86_400, cache / "remote" / "addresses"
    folders = [path for path in cache.glob("remote/*") if re.fullmatch(SHA256, path.name)]
    old = [path for path in folders if path.stat().st_mtime < oldest]
    used = find_used() if old else set()
    for folder in old:
        if folder.name not in used:
            shutil.rmtree(folder, ignore_errors=True)
    for file in addresses.glob(f"{'[0-9a-f]' * 32}.*"):
        is_part = file.stem.endswith(".part") or file.suffix == ".part"
        sha256 = "" if is_part else read_json(file).get("sha256", "")
        is_lost = (
            not is_part and file.suffix == ".json" and not (cache / "remote" / sha256).is_dir()
        )
        if is_lost or (is_part and file.stat().st_mtime < oldest):
            file.unlink(missing_ok=True)


def print_note(text: str) -> None:
    """Prints a line, on the first process only."""
    if os.environ.get("RANK", "0") == "0":
        make_console().print(text)


# --- records -------------------------------------------------------------------------------------


def _identity(address: str) -> str:
    """Returns the key of an address, which does not depend on its user and signature."""
    place, mark, query = _without_user(address).partition("?")
    kept = [part for part in query.split("&") if not SIGNATURES.match(part)]
    return _digest(f"{place}{mark}{'&'.join(kept)}")[:32]


def _without_user(address: str) -> str:
    parts = urlsplit(address)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], fragment=""))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _read_record(folder: Path, record: Path) -> dict[str, Any] | None:
    """Returns the record of an address, or None if it or its copy is incomplete."""
    known = read_json(record)
    is_complete = known.keys() == RECORD.keys() and all(
        isinstance(known[key], kind) for key, kind in RECORD.items()
    )
    if not is_complete or not re.fullmatch(SHA256, known["sha256"]):
        return None
    file = Path(_copy(folder, known).path)
    is_whole = file.is_file() and file.stat().st_size == known["size"]
    return known if is_whole and known["file"] == file_name(known["file"]) else None


def _copy(folder: Path, known: dict[str, Any]) -> Copy:
    return Copy(known["name"], str(folder / known["sha256"] / known["file"]), known["sha256"])


def _is_sound(copy: Copy) -> bool:
    with Path(copy.path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == copy.sha256


def _verified(copy: Copy) -> Copy:
    """Returns the copy. Raises DataError if its bytes are not those that were fetched."""
    if not _is_sound(copy):
        raise DataError(f"{copy.name}: its copy in {copy.path} is damaged; fetch it again")
    return copy


def _copy_of_name(folder: Path, name: str) -> Copy:
    """Returns the copy of an address whose credentials were left out, as in a run folder."""
    records = (_read_record(folder, path) for path in sorted(folder.glob("addresses/*.json")))
    found = {_copy(folder, known) for known in records if known and known["name"] == name}
    if len({copy.sha256 for copy in found}) == 1:
        copy = _verified(min(found))
        print_note(f"{name}: no credentials are stored; using the copy in {copy.path}")
        return copy
    why = "has several copies" if found else "has no copy in the cache"
    raise DataError(
        f"{name}: its credentials are not stored, and it {why}; give the address again, as "
        "data.train_path or data.eval_path"
    )


def _is_of_this_launch(checked: float) -> bool:
    """Returns whether another rank of this launch has asked the server; all ranks then agree.

    Ranks of a machine have one parent, and start within two minutes of each other.
    """
    if "LOCAL_RANK" not in os.environ:
        return False
    with suppress(psutil.Error):
        launched = psutil.Process(os.getppid()).create_time()
        return checked >= max(launched, psutil.Process().create_time() - 120)
    return False


@contextmanager
def _lock(file: Path, name: str, tick: Tick) -> Iterator[None]:
    lock, is_noted = FileLock(file), False
    while not lock.is_locked:
        try:
            lock.acquire(timeout=1)
        except Timeout:
            tick()
            if not is_noted:
                print_note(f"another process is fetching {name}; waiting for it")
            is_noted = True
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _reported(name: str, address: str, folder: Path | None = None) -> Iterator[None]:
    """Turns the errors of a server, and of `folder`, into a DataError without credentials."""
    try:
        yield
    except FetchError as error:
        raise DataError(f"{name}: cannot be fetched: {_clean(str(error), address)}") from None
    except OSError as error:
        raise DataError(
            f"cannot keep remote data in {folder}: {error.strerror or error}; make room, or set "
            "data.cache_dir to another folder"
        ) from None


def _clean(text: str, address: str) -> str:
    """Removes the credentials of an address from a text of a library."""
    try:
        parts = urlsplit(address)
    except ValueError:  # it is no address, so no library was asked
        return text
    user, _, password = parts.netloc.rpartition("@")[0].partition(":")
    values = [part.partition("=")[2] or part for part in parts.query.split("&")]
    for secret in (password, user if not password else "", *values):
        for form in {secret, unquote(secret)}:
            if len(form) >= 4 and form not in hide_credentials(address):
                text = text.replace(form, HIDDEN)
    return text


# --- transfer ------------------------------------------------------------------------------------


class _Transfer:
    """Fetches one file into its `.part`, over as many attempts as it takes, and makes it a copy."""

    def __init__(self, address: str, name: str, folder: Path, record: Path, tick: Tick):
        self.address, self.name, self.folder, self.tick = address, name, folder, tick
        self.record, self.known = record, _read_record(folder, record)
        self.part = record.with_suffix(".part")
        self.about = record.with_suffix(".part.json")  # {version, size} of the file
        self.asked = _digest(_without_user(address))
        self.started = time.time()

    def run(self) -> Copy:
        """Returns the copy, or an earlier one if the server cannot be reached."""
        known = self.known
        if known and known["asked"] == self.asked and _is_of_this_launch(known["checked"]):
            return _copy(self.folder, known)
        try:
            return self._fetch()
        except FetchError as error:
            known = self.known  # None if its copy was found damaged
            if not known:
                raise
            copy = _copy(self.folder, known)
            if error.kind != "unreachable":
                raise FetchError(
                    error.kind, str(error), f"an earlier copy is {copy.path}"
                ) from None
            made = time.strftime("%Y-%m-%d %H:%M", time.localtime(known["fetched"]))
            print_note(f"warning: {self.name}: {error.reason}; using the copy of {made}")
            return _verified(copy)

    def _fetch(self) -> Copy:
        """Tries again until the copy is whole, or several attempts in a row brought no new byte."""
        store, failures = open_store(self.address), 0
        first = most = self._num_arrived()
        while True:
            try:
                return self._attempt(store)
            except FetchError as error:
                if error.kind not in ("transient", "unreachable"):
                    raise
                arrived = self._num_arrived()
                failures = 0 if arrived > most else failures + 1
                most = max(most, arrived)
                was_reached = error.kind == "transient" or most > first
                if failures > len(PAUSES) or not was_reached:
                    raise self._with_progress(error, arrived) from None
                print_note(f"{self.name}: {error.reason}; trying again")
                self.tick()
                time.sleep(PAUSES[max(0, failures - 1)])

    def _with_progress(self, error: FetchError, arrived: int) -> FetchError:
        if not arrived:
            return error
        total = read_json(self.about).get("size")
        of = f" of {size(total)}" if total else ""
        remedy = f"{size(arrived)}{of} are kept: run again to resume"
        return FetchError(error.kind, error.reason, remedy)

    def _num_arrived(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _attempt(self, store: Web | FileSystem) -> Copy:
        version = read_json(self.about).get("version")
        start = self._num_arrived() if version else 0
        answer = store.open(start, version or "")
        with closing(answer):
            if self._is_unchanged(answer):
                return self._keep()
            if answer.start and (answer.start != start or answer.version != version):
                self._drop_part()
                raise FetchError("transient", "the file changed on the server")
            if not answer.start:
                self._drop_part()
            self._check_room(answer)
            # The rest of a weak version (W/) may be that of other bytes.
            resumable = "" if answer.version.startswith("W/") else answer.version
            write_json(self.about, {"version": resumable, "size": answer.size})
            digests = self._receive(answer)
        return self._publish(answer, digests)

    def _is_unchanged(self, answer: Answer) -> bool:
        known = self.known
        is_same = known and answer.version and known["version"] == answer.version
        return bool(known and is_same and answer.size in (None, known["size"]))

    def _keep(self) -> Copy:
        """Returns the earlier copy, which is current, and notes that the server was asked."""
        assert self.known
        copy = _copy(self.folder, self.known)
        if not _is_sound(copy):
            self.known = None
            Path(copy.path).unlink()
            raise FetchError("transient", "the copy in the cache was damaged")
        write_json(self.record, self.known | {"checked": time.time(), "asked": self.asked})
        return copy

    def _check_room(self, answer: Answer) -> None:
        free = shutil.disk_usage(self.folder).free
        if (answer.size or 0) - answer.start > free:
            raise DataError(
                f"{self.name} has {size(answer.size or 0)}, and {self.folder} has room for "
                f"{size(free)}; make room, or set data.cache_dir to another folder"
            )

    def _receive(self, answer: Answer) -> dict[str, str]:
        """Appends what arrives to the part, and returns the digests of the whole."""
        hashes = {kind: hashlib.new(kind) for kind in ("sha256", *answer.digests)}
        total = None if answer.size is None else -(-answer.size // MIB)
        arrived = 0
        with (
            bar(make_console(), f"fetch {self.name} (MiB)", total) as advance,
            plain.open_file(self.part, "a+b") as file,
        ):
            file.seek(0)
            for chunk in chain(iter(lambda: file.read(MIB), b""), self._write(file, answer)):
                for each in hashes.values():
                    each.update(chunk)
                arrived += len(chunk)
                advance(arrived // MIB - (arrived - len(chunk)) // MIB)
                self.tick()
        return {kind: each.hexdigest() for kind, each in hashes.items()}

    @staticmethod
    def _write(file: IO[bytes], answer: Answer) -> Iterator[bytes]:
        for chunk in answer.chunks:
            file.write(chunk)
            file.flush()  # kept if this process is killed
            yield chunk

    def _publish(self, answer: Answer, digests: dict[str, str]) -> Copy:
        """Makes the part a copy, if its size and digests are those that the server gave."""
        arrived, file = self._num_arrived(), file_name(answer.name)
        wrong = [f"its {kind} digest" for kind, d in answer.digests.items() if digests[kind] != d]
        wrong += ["its size"] * (answer.size not in (None, arrived))
        if wrong:
            self._drop_part()
            reason = f"the file arrived damaged: {wrong[0]} is not the one that the server gives"
            raise FetchError("transient", reason)
        if answer.size is None:
            print_note(
                f"warning: {self.name}: the server gave no size, so a file that was cut off would "
                "not be noticed"
            )
        now, sha256 = time.time(), digests["sha256"]
        known = {"name": self.name, "file": file, "sha256": sha256, "size": arrived}
        known |= {"version": answer.version, "asked": self.asked, "fetched": now, "checked": now}
        with self.part.open("rb") as part:
            os.fsync(part.fileno())
        (self.folder / sha256).mkdir(exist_ok=True)
        self.part.replace(self.folder / sha256 / file)
        write_json(self.record, known)
        self._drop_part()
        print_note(f"fetched {self.name}: {size(arrived)} in {duration(now - self.started)}")
        return _copy(self.folder, known)

    def _drop_part(self) -> None:
        self.part.unlink(missing_ok=True)
        self.about.unlink(missing_ok=True)


def file_name(name: str) -> str:
    """Returns a name for a copy that is safe in any file system and keeps its ending."""
    cleaned = re.sub(r"[^\w.-]+", "_", unquote(name).rpartition("/")[2]).lstrip(".")
    return cleaned[-100:].lstrip(".") or "file"
