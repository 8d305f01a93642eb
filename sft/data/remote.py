"""Fetches the files of addresses (s3://, gs://, hf://, https:// ...) into the cache.

    <cache_dir>/remote/<sha256>/<name>         the bytes of a file, under their digest
    <cache_dir>/remote/addresses/<key>.json    what an address gave last
    <cache_dir>/remote/addresses/<key>.part    what has arrived of a file, and its version (.json)

Each process asks the server once whether a copy is still what it has. One process of a machine
fetches, and the others wait for its lock. What was interrupted is resumed if the server still has
the same version. A file becomes a copy only if its size, and every digest that the server gave, are
right. Credentials stay in memory: names, messages and files have addresses without them.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import psutil
from filelock import FileLock, Timeout

from sft.data.stores import Answer, FetchError, open_store
from sft.errors import HIDDEN, DataError, hide_credentials
from sft.runtime.console import bar, duration, make_console, read_json, size, write_json

ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
PAUSES = (1, 2, 4, 8, 16)  # seconds before each new attempt without progress
MIB = 1 << 20
SIGNATURES = re.compile(  # parts of a query that change while the file is the same
    r"(?i)(x-(amz|goog)-[\w-]+|sig|signature|s[eptvrk]|sk\w+|expires|policy|key-pair-id|token"
    r"|access_token|auth|awsaccesskeyid|googleaccessid)(=|$)"
)
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
    """Returns the name of an address, {name: address} of the files that it gives, and whether it is
    a folder, from which the caller chooses.

    Raises DataError if it gives none.
    """
    name = hide_credentials(address)
    if HIDDEN in address:
        return name, {name: address}, False
    with _errors_of(name, address):
        store = open_store(address)
        return name, *store.find()


def fetch(address: str, name: str, cache_dir: str, tick: Tick = lambda: None) -> Copy:
    """Returns the copy of a file, fetched if the server has another one. Raises DataError.

    `tick` is called whenever there is progress.
    """
    folder = Path(cache_dir, "remote")
    addresses = folder / "addresses"
    try:
        addresses.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _disk_error(folder, error) from None
    if HIDDEN in address:
        return _copy_of_name(folder, name)
    record = addresses / f"{_identity(address)}.json"
    with _lock(record.with_suffix(".lock"), name, tick):
        known = _read_record(folder, record)
        if (
            known
            and known["asked"] == _digest(_without_user(address))
            and _is_of_this_launch(known["checked"])
        ):
            return _copy(folder, known)
        with _errors_of(name, address, _hint(folder, known)):
            try:
                transfer = _Transfer(address, name, folder, record, known, tick)
                found = transfer.run()
            except FetchError as error:
                if known is None or error.kind != "unreachable":
                    raise
                made = time.strftime("%Y-%m-%d %H:%M", time.localtime(known["fetched"]))
                print_note(f"warning: {name}: {error.reason}; using the copy of {made}")
                return _verified_copy(folder, known)
    return _copy(folder, found)


def print_note(text: str) -> None:
    """Prints a line, on the first process only."""
    if os.environ.get("RANK", "0") == "0":
        make_console().print(text)


# --- records -------------------------------------------------------------------------------------


def _identity(address: str) -> str:
    """Returns the key of an address: the same whoever asks, and with any signature."""
    place, mark, query = _without_user(address).partition("?")
    kept = [part for part in query.split("&") if not SIGNATURES.match(part)]
    return _digest(f"{place}{mark}{'&'.join(kept)}")[:32]


def _without_user(address: str) -> str:
    scheme, mark, rest = address.partition("#")[0].partition("://")
    host = re.split(r"[/?]", rest, maxsplit=1)[0]
    return scheme + mark + rest[host.rfind("@") + 1 :]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _read_record(folder: Path, record: Path) -> dict[str, Any] | None:
    """Returns what an address gave last, if its copy is whole."""
    known = read_json(record)
    try:
        is_whole = Path(_copy(folder, known).path).stat().st_size == known["size"]
        times = [known["fetched"], known["checked"]]
        is_known = all(isinstance(each, float) for each in times) and isinstance(
            known["asked"], str
        )
        return known if is_whole and is_known else None
    except (OSError, KeyError, ValueError):
        return None


def _copy(folder: Path, known: dict[str, Any]) -> Copy:
    digest, file = str(known["sha256"]), str(known["file"])
    if not re.fullmatch(r"[0-9a-f]{64}", digest) or "/" in file or file.startswith("."):
        raise ValueError("not a record of this module")
    return Copy(str(known["name"]), str(folder / digest / file), digest)


def _verified_copy(folder: Path, known: dict[str, Any]) -> Copy:
    """Returns a copy that the server cannot replace, if its bytes are still those that arrived."""
    copy = _copy(folder, known)
    if not _is_sound(copy):
        raise DataError(f"{copy.name}: its copy in {copy.path} is damaged; fetch it again")
    return copy


def _is_sound(copy: Copy) -> bool:
    with Path(copy.path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == copy.sha256


def _copy_of_name(folder: Path, name: str) -> Copy:
    """Returns the copy of an address whose credentials were left out, as in a run folder."""
    records = (_read_record(folder, path) for path in sorted(folder.glob("addresses/*.json")))
    found = [known for known in records if known and known["name"] == name]
    if len({known["sha256"] for known in found}) == 1:
        copy = _verified_copy(folder, found[0])
        print_note(f"{name}: no credentials are stored; using the copy in {copy.path}")
        return copy
    why = "has several copies" if found else "has no copy in the cache"
    raise DataError(
        f"{name}: its credentials are not stored, and it {why}; give the address again, as "
        "data.train_path or data.eval_path"
    )


def _is_of_this_launch(checked: float) -> bool:
    """Returns whether a sibling has asked the server, so that all ranks of a machine agree.

    Siblings have one parent, and start within two minutes of each other.
    """
    if "LOCAL_RANK" not in os.environ:
        return False
    with suppress(psutil.Error):
        launched = psutil.Process(os.getppid()).create_time()
        return checked >= max(launched, psutil.Process().create_time() - 120)
    return False


def _hint(folder: Path, known: dict[str, Any] | None) -> str:
    return f"; an earlier copy is {_copy(folder, known).path}" if known else ""


@contextmanager
def _lock(file: Path, name: str, tick: Tick) -> Iterator[None]:
    lock, is_noted = FileLock(file), False
    while True:
        try:
            lock.acquire(timeout=1)
            break
        except Timeout:
            tick()
            if not is_noted:
                print_note(f"another process is fetching {name}; waiting for it")
            is_noted = True
        except OSError as error:
            raise _disk_error(file.parent, error) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _errors_of(name: str, address: str, hint: str = "") -> Iterator[None]:
    """Turns FetchError into a DataError without credentials."""
    try:
        yield
    except FetchError as error:
        text = f"{error.reason}; {error.remedy}{hint}" if error.remedy else f"{error.reason}{hint}"
        raise DataError(f"{name}: cannot be fetched: {_clean(text, address)}") from None


def _clean(text: str, address: str) -> str:
    """Removes the credentials of an address from a text of a library."""
    parts = urlsplit(address)
    user, _, password = parts.netloc.rpartition("@")[0].partition(":")
    values = [part.partition("=")[2] or part for part in parts.query.split("&")]
    for secret in (password, user if not password else "", *values):
        for form in {secret, unquote(secret)}:
            if len(form) >= 4 and form not in hide_credentials(address):
                text = text.replace(form, HIDDEN)
    return text


def _disk_error(folder: Path, error: OSError) -> DataError:
    return DataError(
        f"cannot keep remote data in {folder}: {error.strerror or error}; make room, or set "
        "data.cache_dir to another folder"
    )


# --- transfer ------------------------------------------------------------------------------------


class _Transfer:
    """Fetches one file into its `.part`, over as many attempts as it takes, and makes it a copy."""

    def __init__(
        self,
        address: str,
        name: str,
        folder: Path,
        record: Path,
        known: dict[str, Any] | None,
        tick: Tick,
    ):
        self.store, self.asked = open_store(address), _digest(_without_user(address))
        self.name, self.folder, self.tick = name, folder, tick
        self.record, self.known = record, known
        self.part = record.with_suffix(".part")
        self.about = record.with_suffix(".part.json")
        self.started = time.time()
        self.has_begun = False  # some bytes have arrived in this process

    def run(self) -> dict[str, Any]:
        """Returns the record of the copy."""
        failures, best = 0, 0
        while True:
            try:
                return self._attempt()
            except FetchError as error:
                arrived = self._arrived()
                failures = 0 if arrived > best else failures + 1
                best = max(best, arrived)
                may_retry = error.kind == "transient" or (
                    error.kind == "unreachable" and self.has_begun
                )
                if not may_retry or failures > len(PAUSES):
                    raise self._with_progress(error, arrived) from None
                print_note(f"{self.name}: {error.reason}; trying again")
                self.tick()
                time.sleep(PAUSES[max(0, failures - 1)])

    def _with_progress(self, error: FetchError, arrived: int) -> FetchError:
        if not arrived or error.kind not in ("transient", "unreachable"):
            return error
        total = read_json(self.about).get("size")
        of = f" of {size(total)}" if isinstance(total, int) else ""
        remedy = f"{size(arrived)}{of} are kept: run again to resume"
        return FetchError(error.kind, error.reason, remedy)

    def _arrived(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _attempt(self) -> dict[str, Any]:
        about = read_json(self.about)
        version = about.get("version") if isinstance(about.get("version"), str) else ""
        start = self._arrived() if version else 0
        answer = self.store.open(start, str(version or ""))
        try:
            if self._is_known(answer):
                return self._keep(self.known or {})
            if answer.start != start or (start and answer.version != version):
                if answer.start:  # the rest of another version
                    self._drop_part()
                    raise FetchError("transient", "the file changed on the server")
                start = 0
            if not start:
                self._drop_part()
            self._check_room(answer, start)
            self._write(self.about, {"version": answer.resumable, "size": answer.size})
            digests = self._receive(answer, start)
        finally:
            answer.close()
        self._verify(answer, digests)
        return self._publish(answer, digests["sha256"])

    def _is_known(self, answer: Answer) -> bool:
        known = self.known
        return bool(
            known
            and answer.version
            and known.get("version") == answer.version
            and known["size"] == (answer.size if answer.size is not None else known["size"])
        )

    def _keep(self, known: dict[str, Any]) -> dict[str, Any]:
        copy = _copy(self.folder, known)
        if not _is_sound(copy):
            self.known = None
            Path(copy.path).unlink()
            raise FetchError("transient", "the copy in the cache was damaged")
        known = known | {"checked": time.time(), "asked": self.asked}
        self._write(self.record, known)
        return known

    def _check_room(self, answer: Answer, start: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if answer.size is not None and answer.size - start > free:
            raise DataError(
                f"{self.name} has {size(answer.size)}, and {self.folder} has room for {size(free)};"
                " make room, or set data.cache_dir to another folder"
            )

    def _receive(self, answer: Answer, start: int) -> dict[str, str]:
        """Appends what arrives to the part, and returns the digests of the whole."""
        hashes = {"sha256": hashlib.sha256()}
        for kind in answer.digests:
            hashes[kind] = hashlib.new("sha1" if kind == "git" else kind)
        if "git" in hashes:
            hashes["git"].update(b"blob %d\0" % (answer.size or 0))
        total = None if answer.size is None else -(-answer.size // MIB)
        with (
            bar(make_console(), f"fetch {self.name} (MiB)", total) as advance,
            self._open_part() as file,
        ):
            arrived = shown = 0
            for chunk in self._chunks(file, start, answer):
                for each in hashes.values():
                    each.update(chunk)
                arrived += len(chunk)
                if arrived // MIB > shown:
                    advance(arrived // MIB - shown)
                    shown = arrived // MIB
                self.tick()
        if answer.size is not None and arrived < answer.size:
            raise FetchError("transient", f"the connection ended at {arrived:,} bytes")
        if answer.size is None:
            print_note(
                f"warning: {self.name}: the server gave no size, so a file that was cut off would "
                "not be noticed"
            )
        return {kind: each.hexdigest() for kind, each in hashes.items()}

    def _chunks(self, file: Any, start: int, answer: Answer) -> Iterator[bytes]:
        """Yields what had arrived before, and then what arrives, once it is written."""
        for at in range(0, start, MIB):
            yield file.read(min(MIB, start - at))
        for chunk in answer.chunks:
            self.has_begun = True
            try:
                file.write(chunk)
                file.flush()
            except OSError as error:
                file.truncate(start)
                raise _disk_error(self.folder, error) from None
            yield chunk

    def _open_part(self) -> Any:
        try:
            self.part.touch()
            return self.part.open("r+b")
        except OSError as error:
            raise _disk_error(self.folder, error) from None

    def _verify(self, answer: Answer, digests: dict[str, str]) -> None:
        arrived = self._arrived()
        wrong = answer.size is not None and arrived != answer.size
        reason = f"expected {answer.size} bytes, found {arrived}" if wrong else ""
        for kind, expected in answer.digests.items():
            if digests[kind] != expected:
                reason = f"its {kind} digest is not the one that the server gives"
        if reason:
            self._drop_part()
            raise FetchError("transient", f"the file arrived damaged: {reason}")

    def _publish(self, answer: Answer, digest: str) -> dict[str, Any]:
        now = time.time()
        file = file_name(answer.name)
        place = self.folder / digest
        arrived = self._arrived()
        values = {
            "name": self.name,
            "file": file,
            "sha256": digest,
            "size": arrived,
            "version": answer.version,
            "fetched": now,
            "checked": now,
            "asked": self.asked,
        }
        try:
            with self.part.open("rb") as part:
                os.fsync(part.fileno())
            place.mkdir(exist_ok=True)
            self.part.replace(place / file)
        except OSError as error:
            raise _disk_error(self.folder, error) from None
        self._write(self.record, values)
        self.about.unlink(missing_ok=True)
        took = duration(now - self.started)
        print_note(f"fetched {self.name}: {size(arrived)} in {took}")
        return values

    def _write(self, file: Path, values: dict[str, Any]) -> None:
        try:
            write_json(file, values)
        except OSError as error:
            raise _disk_error(self.folder, error) from None

    def _drop_part(self) -> None:
        self.part.unlink(missing_ok=True)
        self.about.unlink(missing_ok=True)


def file_name(name: str) -> str:
    """Returns a name for a copy that is safe in any file system and keeps its ending."""
    cleaned = re.sub(r"[^\w.-]+", "_", unquote(name).rpartition("/")[2]).lstrip(".")
    return cleaned[-100:].lstrip(".") or "file"
