"""Reads remote files: the web by its own protocol, all other addresses through fsspec.

A store finds the files of an address, and opens one of them at any place. The version of a file is
whatever the server says of it (etag, generation, time and size); "" if nothing would show a change.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import socket
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from email.message import Message
from email.utils import parsedate_to_datetime
from pathlib import PurePosixPath
from typing import Any, Literal, Protocol
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from sft.errors import FROM_ENVIRONMENT, hide_credentials

CHUNK = 1 << 20  # bytes read from a connection at a time
PART = 16 << 20  # bytes asked for at a time, where each needs a request of its own
SECONDS = 60  # without a byte, after which a connection counts as lost
Kind = Literal["missing", "denied", "unreachable", "transient", "unusable"]
PACKAGES = {  # what fsspec needs, and what installs it
    "s3": 'pip install "sft[remote]"',
    "s3a": 'pip install "sft[remote]"',
    "gs": 'pip install "sft[remote]"',
    "gcs": 'pip install "sft[remote]"',
}
CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or `gcloud auth application-default login`",
    "hf": "HF_TOKEN, or `hf auth login`",
}
CREDENTIALS |= {"s3a": CREDENTIALS["s3"], "gcs": CREDENTIALS["gs"]}


class FetchError(Exception):
    """A file cannot be fetched, with the reason and what to do."""

    def __init__(self, kind: Kind, reason: str, remedy: str = ""):
        super().__init__(reason)
        self.kind, self.reason, self.remedy = kind, reason, remedy


@dataclass
class Answer:
    """The bytes of a file from `start` on, and what the server says of it."""

    start: int
    size: int | None  # of the whole file
    version: str
    resumable: str  # the version, if the rest of this very version can be asked for; else ""
    name: str
    chunks: Iterator[bytes]
    digests: dict[str, str] = field(default_factory=dict)  # md5, sha256, git: hexadecimal
    connection: Any = None

    def close(self) -> None:
        """Ends the connection, if there is one."""
        if self.connection:
            self.connection.close()


class Store(Protocol):
    """The server of an address."""

    def find(self) -> tuple[dict[str, str], bool]:
        """Returns {name: address} of the files that the address gives, and if it is a folder."""

    def open(self, start: int, version: str) -> Answer:
        """Opens the file at `start`, or from 0 if `version` is not what the server has."""


def open_store(address: str) -> Store:
    """Returns the store of an address. Raises FetchError if there is none for its protocol."""
    full = FROM_ENVIRONMENT.sub(_from_environment, address)
    scheme = address.partition("://")[0].lower()
    if "::" in address:
        raise FetchError("unusable", "a chain of protocols (::)", "give the address of a file")
    is_web = scheme in ("http", "https")
    return Web(address, full) if is_web else FileSystem(address, full, scheme)


def _from_environment(match: re.Match[str]) -> str:
    value = os.environ.get(match[1])
    if value is None:
        raise FetchError("unusable", f"the environment has no variable {match[1]}", "set it")
    return value


# --- the web -------------------------------------------------------------------------------------


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects; credentials go to the host that they were given for, and to no other."""

    def redirect_request(self, req: Any, *args: Any) -> Any:
        new = super().redirect_request(req, *args)
        if new and urlsplit(new.full_url)[:2] == urlsplit(req.full_url)[:2]:
            for name, value in req.unredirected_hdrs.items():
                if name.lower() == "authorization":
                    new.add_unredirected_header(name, value)
        return new


def _make_opener() -> urllib.request.OpenerDirector:
    """Returns an opener that knows http and https alone, so that no redirect leads to a file."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(context=ssl.create_default_context()),
        urllib.request.HTTPDefaultErrorHandler(),
        _Redirects(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


class Web:
    """A file behind http or https."""

    def __init__(self, address: str, full: str):
        """Takes an address as it was given, and with the values of the environment in it."""
        parts = urlsplit(full)
        user, _, host = parts.netloc.rpartition("@")
        self.credentials = unquote(user)
        self.path = parts.path
        path = quote(parts.path, safe="/%:@!$&'()*+,;=~")
        self.url = urlunsplit(
            (parts.scheme, host, path or "/", quote(parts.query, safe="%&=/:+,;@!$'()*?~"), "")
        )
        self.address = address

    def find(self) -> tuple[dict[str, str], bool]:
        if "*" in self.path:
            raise FetchError(
                "unusable", "a pattern, and the web lists no files", "give a list of addresses"
            )
        return {hide_credentials(self.address): self.address}, False

    def open(self, start: int, version: str) -> Answer:
        request = urllib.request.Request(self.url, headers={"Accept-Encoding": "identity"})
        request.add_header("User-Agent", "sft")
        if self.credentials:
            encoded = base64.b64encode(self.credentials.encode()).decode()
            request.add_unredirected_header("Authorization", f"Basic {encoded}")
        if start:
            request.add_header("Range", f"bytes={start}-")
            request.add_header("If-Range", version.partition(" size ")[0])
        try:
            response = _make_opener().open(request, timeout=SECONDS)
        except urllib.error.HTTPError as error:
            with error:
                if error.code == 416 and start:  # the file is now shorter
                    return self.open(0, "")
                raise _web_error(error.code, error.reason, bool(self.credentials)) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _connection_error(error) from None
        return self._answer(response)

    def _answer(self, response: Any) -> Answer:
        headers = response.headers
        start, size = 0, _number(headers.get("Content-Length"))
        if response.status == 206:
            found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", headers.get("Content-Range", ""))
            if not found:
                response.close()
                raise FetchError("unusable", "the server answered with an unknown range")
            start, size = int(found[1]), int(found[2])
        kind = headers.get_content_type()
        name = headers.get_filename() or PurePosixPath(urlsplit(self.url).path).name
        name = name or PurePosixPath(urlsplit(response.url).path).name
        endings = {"text/csv": ".csv", "text/tab-separated-values": ".tsv"}
        if "." not in name and kind in endings:
            name += endings[kind]
        if kind == "text/html" and not re.search(r"(?i)\.html?$", name):
            response.close()
            raise FetchError(
                "unusable",
                "the server answered with a web page (HTML)",
                "give the address of the file itself, its raw link",
            )
        version, is_exact = _web_version(headers)
        whole = f"{version} size {size}" if version else ""
        return Answer(
            start,
            size,
            whole,
            whole if is_exact else "",
            name,
            _web_chunks(response),
            _web_digests(headers, response.status),
            response,
        )


def _web_version(headers: Message) -> tuple[str, bool]:
    """Returns the etag or the time of a file, and whether it stands for the very bytes."""
    if etag := headers.get("ETag"):
        return etag, not etag.startswith("W/")
    if not (changed := headers.get("Last-Modified")):
        return "", False
    with suppress(TypeError, ValueError):
        now = parsedate_to_datetime(headers.get("Date", ""))
        age = (now - parsedate_to_datetime(changed)).total_seconds()
        if age >= 2:  # else it may change again within the second that the time counts
            return changed, True
    return "", False


def _web_digests(headers: Message, status: int) -> dict[str, str]:
    """Returns the digests of the whole file that the server gives, in hexadecimal."""
    found: dict[str, str] = {}
    texts = {
        "sha256": [
            r"sha-256=:?([\w+/=]+?):?(?:,|$)",
            headers.get("Repr-Digest") or headers.get("Digest") or "",
        ],
        "md5": [r"md5=([\w+/=]+)", ",".join(headers.get_all("x-goog-hash") or [])],
    }
    for kind, (pattern, text) in texts.items():
        if match := re.search(pattern, text, re.IGNORECASE):
            found[kind] = match[1]
    if checksum := headers.get("x-amz-checksum-sha256"):
        found["sha256"] = checksum
    if status == 200 and (md5 := headers.get("Content-MD5")):
        found["md5"] = md5
    sizes = {"sha256": 32, "md5": 16}
    result = {}
    for kind, text in found.items():
        with suppress(ValueError):
            if len(raw := base64.b64decode(text, validate=True)) == sizes[kind]:
                result[kind] = raw.hex()
    return result


def _web_chunks(response: Any) -> Iterator[bytes]:
    try:
        while chunk := response.read(CHUNK):
            yield chunk
    except http.client.IncompleteRead as error:
        if error.partial:
            yield error.partial
        raise FetchError("transient", "the connection ended early") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise FetchError("transient", f"the connection failed ({_of(error)})") from None


def _web_error(code: int, reason: str, is_signed: bool) -> FetchError:
    text = f"the server answered {code} {reason}".strip()
    if code in (401, 403, 407):
        remedy = "give credentials, as https://${USER}:${PASSWORD}@host/file, or a signed address"
        if is_signed or code == 403:
            remedy = "check the credentials, or the time until which a signed address is valid"
        return FetchError("denied", text, remedy)
    if code in (404, 410):
        return FetchError("missing", text, "correct the address")
    if code in (408, 425, 429) or code >= 500:
        return FetchError("transient", text)
    return FetchError("unusable", text, "correct the address")


def _connection_error(error: Exception) -> FetchError:
    cause = getattr(error, "reason", error)
    if isinstance(cause, ssl.SSLCertVerificationError):
        return FetchError(
            "unusable",
            f"the certificate of the server is not valid ({cause.verify_message})",
            "correct the address, or set SSL_CERT_FILE",
        )
    if isinstance(cause, socket.gaierror):
        return FetchError("unreachable", "the host is unknown", "check the address and the network")
    if isinstance(error, http.client.HTTPException | ConnectionResetError | ConnectionAbortedError):
        return FetchError("transient", f"the connection failed ({_of(error)})")
    if isinstance(error, ValueError) and not isinstance(error, OSError):
        return FetchError("unusable", f"not a valid address ({type(error).__name__})", "correct it")
    reason = f"the server cannot be reached ({_of(cause)})"
    return FetchError("unreachable", reason, "check the address and the network")


def _of(error: object) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).splitlines()[0][:200]


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdecimal() else None


# --- fsspec --------------------------------------------------------------------------------------


class FileSystem:
    """Files behind any other protocol that fsspec knows."""

    def __init__(self, address: str, full: str, scheme: str):
        """Takes an address as it was given, and with the values of the environment in it."""
        self.address, self.full, self.scheme = address, full, scheme
        self._anonymous = False
        self.path = ""
        self.files = self._open_system()

    def _open_system(self) -> Any:
        import fsspec

        options: dict[str, Any] = {"use_listings_cache": False}
        if self._anonymous:
            options["anon"] = True
        try:
            files, self.path = fsspec.core.url_to_fs(self.full, **options)
        except ImportError as error:
            remedy = PACKAGES.get(self.scheme, "install what it needs")
            raise FetchError(
                "unusable", f"{self.scheme}:// needs a package: {error}", remedy
            ) from None
        except ValueError as error:
            if "Protocol not known" not in str(error):
                raise self._error(error) from None
            raise FetchError(
                "unusable",
                f"the protocol {self.scheme}:// is unknown",
                "use https://, s3://, gs://, hf:// or another of fsspec",
            ) from None
        except Exception as error:  # noqa: BLE001  # each library has errors of its own
            raise self._error(error) from None
        return files

    def _ask(self, question: str, *args: Any, **options: Any) -> Any:
        """Calls a method of the file system; without credentials, asks again as anyone."""
        try:
            self.files.invalidate_cache()
            return getattr(self.files, question)(*args, **options)
        except Exception as error:  # noqa: BLE001  # each library has errors of its own
            is_s3 = self.scheme in ("s3", "s3a")
            if not is_s3 or self._anonymous or type(error).__name__ != "NoCredentialsError":
                raise self._error(error) from None
        self._anonymous = True
        self.files = self._open_system()
        return self._ask(question, *args, **options)

    def find(self) -> tuple[dict[str, str], bool]:
        if re.search(r"[*?\[]", self.path):
            found = self._ask("glob", self.path, detail=True)
            names = sorted(name for name, about in found.items() if about["type"] != "directory")
            if not names:
                raise FetchError("missing", "no file fits the pattern", "correct it")
            return {self._public(name): self._full(name) for name in names}, False
        itself = {hide_credentials(self.address): self.address}
        try:
            about = self._ask("info", self.path)
        except FetchError as error:
            if error.kind == "unreachable":  # there may be a copy of it
                return itself, False
            raise
        if about["type"] == "directory":
            names = sorted(self._ask("find", self.path))
            return {self._public(name): self._full(name) for name in names}, True
        return itself, False

    def _full(self, name: str) -> str:
        """Returns the address of a file of the same file system."""
        host = urlsplit(self.address).netloc
        is_in_path = not name.startswith("/") or name.startswith(f"/{host}/")  # as a bucket is
        return (
            f"{self.scheme}://{name.lstrip('/')}" if is_in_path else f"{self.scheme}://{host}{name}"
        )

    def _public(self, name: str) -> str:
        return hide_credentials(self._full(name))

    def open(self, start: int, version: str) -> Answer:
        about = self._ask("info", self.path)
        if about["type"] == "directory":
            raise FetchError("missing", "a folder, where a file was expected", "correct the path")
        size = about.get("size")
        found = _version(about)
        if version != found:
            start = 0
        return Answer(
            start,
            size,
            found,
            found,
            PurePosixPath(self.path).name,
            self._chunks(start, size, found),
            _digests(about),
        )

    def _chunks(self, start: int, size: int | None, version: str) -> Iterator[bytes]:
        with self._ask("open", self.path, "rb", block_size=PART, cache_type="none") as file:
            while chunk := self._read(file, start, size):
                start += len(chunk)
                yield chunk
        if _version(self._ask("info", self.path)) != version:
            raise FetchError("transient", "the file changed on the server")

    def _read(self, file: Any, start: int, size: int | None) -> bytes:
        """Returns the next bytes of a file, with a request of its own where there is no stream."""
        most = PART if size is None else min(PART, size - start)
        try:
            file.seek(start)
            return bytes(file.read(most)) if most > 0 else b""
        except Exception as error:  # noqa: BLE001  # each library has errors of its own
            raise self._error(error) from None

    def _error(self, error: Exception) -> FetchError:
        """Returns what an error of a library means."""
        causes = [error, *([error.__cause__] if error.__cause__ else [])]
        names = {kind.__name__ for each in causes for kind in type(each).__mro__}
        response = getattr(error, "response", None)
        code = getattr(response, "status_code", None) or getattr(error, "code", None)
        text = f"{type(error).__name__}: {_of(error)}"
        sources = CREDENTIALS.get(self.scheme, "the credentials of this protocol")
        if names & {"NoCredentialsError", "DefaultCredentialsError", "PartialCredentialsError"}:
            return FetchError("denied", "no credentials were found", f"set {sources}")
        if "GatedRepoError" in names:
            return FetchError(
                "denied", "the repository is gated", f"ask for access, and set {sources}"
            )
        if "RepositoryNotFoundError" in names:
            return FetchError("missing", "no such repository, or a private one", f"check {sources}")
        if isinstance(error, PermissionError) or code in (401, 403):
            found = " without credentials, since none were found" if self._anonymous else ""
            return FetchError("denied", f"access is denied{found} ({text})", f"check {sources}")
        if isinstance(error, FileNotFoundError) or code == 404:
            return FetchError("missing", "no such file", "correct the address")
        if names & UNREACHABLE or isinstance(error, socket.gaierror | ConnectionRefusedError):
            reason = f"the server cannot be reached ({text})"
            return FetchError("unreachable", reason, "check the address and the network")
        if isinstance(error, ConnectionError | TimeoutError) or code in (429, 500, 502, 503, 504):
            return FetchError("transient", text)
        if isinstance(error, OSError):
            return FetchError("transient", text)
        return FetchError("unusable", text, "correct the address")


UNREACHABLE = {
    "EndpointConnectionError",
    "ConnectTimeoutError",
    "ClientConnectorError",
    "ConnectError",
    "ConnectTimeout",
    "OfflineModeIsEnabled",
    "ProxyError",
    "ProxyConnectionError",
}


CHANGING = (
    *("ETag", "etag", "md5Hash", "generation", "VersionId", "blob_id"),
    *("LastModified", "last_modified", "mtime", "modify", "created"),
)


def _version(about: dict[str, Any]) -> str:
    """Returns what a file system says that changes with a file."""
    known = {key: str(about[key]) for key in CHANGING if about.get(key)}
    return json.dumps(known | {"size": about.get("size")}, sort_keys=True) if known else ""


def _digests(about: dict[str, Any]) -> dict[str, str]:
    """Returns the digests of the file that a file system gives, in hexadecimal."""
    found = {}
    lfs = about.get("lfs")
    sha256 = lfs.get("sha256") if isinstance(lfs, dict) else getattr(lfs, "sha256", None)
    if isinstance(sha256, str):
        found["sha256"] = sha256
    elif isinstance(blob := about.get("blob_id"), str) and re.fullmatch("[0-9a-f]{40}", blob):
        found["git"] = blob
    with suppress(ValueError, TypeError):
        found["md5"] = base64.b64decode(about["md5Hash"]).hex() if "md5Hash" in about else ""
    return {kind: digest for kind, digest in found.items() if digest}
