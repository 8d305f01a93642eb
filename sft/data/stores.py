"""Reads remote files: the web with httpx2, all other addresses with fsspec.

A store finds the files of an address, and opens one of them at any place. The version of a file is
what the server says of it (etag, generation, time); "" if nothing would show a change.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from email.message import Message
from email.utils import parsedate_to_datetime
from pathlib import PurePosixPath
from typing import Any, Literal, NamedTuple
from urllib.parse import quote, urlsplit

import httpx2

from sft.errors import FROM_ENVIRONMENT, hide_credentials

PART = 16 << 20  # bytes of a request, where a file system has no stream
TIMEOUT = 60  # seconds without a byte, after which a connection is lost
Kind = Literal["missing", "denied", "unreachable", "transient", "unusable"]
USER = re.compile(r"https?://[^/?#]*@")  # whose variables may have any character
EXTRA = 'pip install "sft[remote]"'
PACKAGES = {"s3": EXTRA, "s3a": EXTRA, "gs": EXTRA, "gcs": EXTRA}
AWS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
GOOGLE = "GOOGLE_APPLICATION_CREDENTIALS, or `gcloud auth application-default login`"
WEB = "the credentials, https://${USER}:${PASSWORD}@host/file, or if a signed address has expired"
CREDENTIALS = {
    **{"s3": AWS, "s3a": AWS, "gs": GOOGLE, "gcs": GOOGLE, "http": WEB, "https": WEB},
    "hf": "HF_TOKEN, or `hf auth login`",
}
for name in ("httpx2", "httpcore2"):  # which log addresses with their signatures
    logging.getLogger(name).setLevel(logging.WARNING)
logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # which logs what it raises


class FetchError(Exception):
    """A file cannot be fetched, with the reason and what to do."""

    def __init__(self, kind: Kind, reason: str, remedy: str = ""):
        super().__init__(f"{reason}; {remedy}" if remedy else reason)
        self.kind, self.reason = kind, reason


@dataclass
class Answer:
    """The bytes of a file from `start` on, and what the server says of it."""

    start: int
    size: int | None  # of the whole file
    version: str
    name: str
    chunks: Iterator[bytes]
    digests: dict[str, str]  # md5, sha256: hexadecimal
    close: Callable[[], None] = field(default=lambda: None)


def open_store(address: str) -> Web | FileSystem:
    """Returns the store of an address. Raises FetchError if there is none for its protocol."""
    if re.search(r"::[A-Za-z][\w+.-]*://", address):
        raise FetchError("unusable", "a chain of protocols (::)", "give the address of a file")
    try:
        _ = urlsplit(address).port
    except ValueError:  # whose text may have a password
        raise FetchError(
            "unusable",
            "its host or port is not valid",
            "correct it (in a user or a password, write [ and ] as %5B and %5D)",
        ) from None
    scheme = address.partition("://")[0].lower()
    if scheme not in ("http", "https"):
        return FileSystem(address, FROM_ENVIRONMENT.sub(_from_environment, address), scheme)
    user = USER.match(address)
    at = user.end() if user else 0
    quoted = FROM_ENVIRONMENT.sub(lambda m: quote(_from_environment(m), safe="%"), address[:at])
    return Web(address, quoted + FROM_ENVIRONMENT.sub(_from_environment, address[at:]))


def _from_environment(match: re.Match[str]) -> str:
    value = os.environ.get(match[1])
    if value is None:
        raise FetchError("unusable", f"the environment has no variable {match[1]}", "set it")
    return value


# --- errors --------------------------------------------------------------------------------------


class Explanation(NamedTuple):
    """What an error means that has, or whose cause has, one of these classes or HTTP statuses."""

    kind: Kind
    causes: set[str]  # names of classes, since each library has errors of its own; statuses
    reason: str  # {text} is that of the error, {sources} where credentials come from
    remedy: str


# In each entry: the kind, its causes, the reason and what to do. The first that fits is used.
EXPLANATIONS = [
    Explanation(first.split()[0], {*first.split()[1:]}, *second.partition("; ")[::2])
    for first, second in re.findall(
        r"(.+)\n(.+)\n",
        """\
unusable ImportError
{scheme}:// needs a package: {text}; {package}
denied NoCredentialsError DefaultCredentialsError PartialCredentialsError
no credentials were found; set {sources}
denied GatedRepoError
the repository is gated; ask for access, and set {sources}
missing RepositoryNotFoundError
no such repository, or a private one; check {sources}
denied PermissionError 401 403 407
access is denied{how} ({text}); check {sources}
missing FileNotFoundError 404 410
no such file ({text}); correct the address
unusable SSLCertVerificationError
the certificate of the server is not valid ({text}); correct the address, or set SSL_CERT_FILE
unreachable gaierror
the host is unknown; check the address and the network
unreachable ConnectError ConnectTimeout ConnectionRefusedError ClientConnectorError ProxyError \
EndpointConnectionError ConnectTimeoutError OfflineModeIsEnabled ProxyConnectionError
the server cannot be reached ({text}); check the address and the network
unusable UnsupportedProtocol
{text}; correct the address
transient OSError TransportError 408 425 429 5xx
the connection failed ({text})
unusable BaseException
{text}; correct the address
""",
    )
]


def explain(error: BaseException, scheme: str, *, is_anonymous: bool = False) -> FetchError:
    """Returns what an error of a library means, and what to do.

    `is_anonymous`: the server was asked without credentials, because there are none.
    """
    if isinstance(error, FetchError):
        return error
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None) or getattr(error, "code", None)
    text = str(getattr(error, "strerror", None) or str(error) or type(error).__name__)
    status = 403 if text.startswith("Forbidden: ") else status  # as gcsfs says it
    text = f"{type(error).__name__}: {text.splitlines()[0][:200]}"
    if isinstance(response, httpx2.Response):  # whose error has the address in its text
        text = f"the server answered {status} {response.reason_phrase}".strip()
    words = {
        "text": text,
        "scheme": scheme,
        "how": " without credentials, since none were found" if is_anonymous else "",
        "package": PACKAGES.get(scheme, "install what it needs"),
        "sources": CREDENTIALS.get(scheme, "the credentials of this protocol"),
    }
    found_in = {str(status), f"{status}"[:1] + "xx"}
    cause: BaseException | None = error
    while cause:
        found_in |= {kind.__name__ for kind in type(cause).__mro__}
        cause = cause.__cause__ or cause.__context__
    found = next(each for each in EXPLANATIONS if each.causes & found_in)
    return FetchError(found.kind, found.reason.format(**words), found.remedy.format(**words))


@contextmanager
def _explained(scheme: str) -> Iterator[None]:
    """Turns every error of a library into a FetchError."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  # each library has errors of its own
        raise explain(error, scheme) from None


# --- the web -------------------------------------------------------------------------------------


class Web:
    """A file behind http or https."""

    def __init__(self, address: str, full: str):
        """Takes an address; in `full`, values replace the variables of the environment."""
        self.address, self.full = address, full
        self.path = PurePosixPath(urlsplit(full).path)

    def find(self) -> tuple[dict[str, str], bool]:
        """Returns {name: address} of the files that the address gives, and if it is a folder."""
        if "*" in str(self.path):
            raise FetchError(
                "unusable", "a pattern, and the web lists no files", "give a list of addresses"
            )
        return {hide_credentials(self.address): self.address}, False

    def open(self, start: int, version: str) -> Answer:
        """Opens the file at `start`, or from 0 if `version` is not what the server has."""
        headers = {"Accept-Encoding": "identity", "User-Agent": "sft"}
        if start:
            headers |= {"Range": f"bytes={start}-", "If-Range": version}
        with ExitStack() as stack, _explained("https"):
            # Credentials in the address go to its host. A redirect to another host drops them.
            client = stack.enter_context(httpx2.Client(follow_redirects=True, timeout=TIMEOUT))
            response = stack.enter_context(client.stream("GET", self.full, headers=headers))
            if response.status_code != 416 or not start:
                response.raise_for_status()
                answer = self._answer(response)
                answer.close = stack.pop_all().close
                return answer
        return self.open(0, "")  # the file is shorter than `start`

    def _answer(self, response: httpx2.Response) -> Answer:
        headers = Message()  # which can read their parameters
        for key, value in response.headers.multi_items():
            headers[key] = value
        kind, length = headers.get_content_type(), headers.get("Content-Length", "")
        start, size = 0, int(length) if length.isdecimal() else None
        if response.status_code == 206:
            found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", headers.get("Content-Range", ""))
            if not found:
                raise FetchError("unusable", "the server answered with an unknown range")
            start, size = int(found[1]), int(found[2])
        name = headers.get_filename() or self.path.name or PurePosixPath(response.url.path).name
        if "." not in name:
            name += {"text/csv": ".csv", "text/tab-separated-values": ".tsv"}.get(kind, "")
        if kind == "text/html" and not name.lower().endswith((".html", ".htm")):
            raise FetchError(
                "unusable",
                "the server answered with a web page (HTML)",
                "give the address of the file itself, its raw link",
            )
        digests = _web_digests(headers) if response.status_code == 200 else {}
        return Answer(start, size, _web_version(headers), name, _web_chunks(response), digests)


def _web_version(headers: Message) -> str:
    """Returns the etag of a file, or the time of its last change."""
    if etag := headers["ETag"]:
        return str(etag)
    with suppress(TypeError, ValueError):
        changed, now = (parsedate_to_datetime(headers[key]) for key in ("Last-Modified", "Date"))
        if (now - changed).total_seconds() >= 2:  # else it may change again within this second
            return str(headers["Last-Modified"])
    return ""


def _web_digests(headers: Message) -> dict[str, str]:
    """Returns the md5 of a file, in hexadecimal, if the server gives it: Azure's, or Google's."""
    google = re.search(r"md5=([\w+/=]+)", ",".join(headers.get_all("x-goog-hash", [])))
    with suppress(ValueError):
        given = google[1] if google else headers.get("Content-MD5", "")
        if len(md5 := base64.b64decode(given, validate=True)) == 16:
            return {"md5": md5.hex()}
    return {}


def _web_chunks(response: httpx2.Response) -> Iterator[bytes]:
    with _explained("https"):
        yield from response.iter_raw()


# --- fsspec --------------------------------------------------------------------------------------


class FileSystem:
    """Files behind any other protocol that fsspec knows."""

    def __init__(self, address: str, full: str, scheme: str):
        """Takes an address; in `full`, values replace the variables of the environment."""
        self.address, self.full, self.scheme = address, full, scheme
        self.is_anonymous = False
        self._connect()

    def _connect(self, **options: bool) -> None:
        import fsspec

        if self.scheme not in fsspec.available_protocols():
            raise FetchError(
                "unusable",
                f"the protocol {self.scheme}:// is unknown",
                "use https://, s3://, gs://, hf:// or another of fsspec",
            )
        with _explained(self.scheme):
            found = fsspec.core.url_to_fs(self.full, use_listings_cache=False, **options)
            self.files, self.path = found

    def _ask(self, question: str, *args: Any, **options: Any) -> Any:
        """Calls a method of the file system. If there are no credentials, asks again without."""
        try:
            self.files.invalidate_cache()
            return getattr(self.files, question)(*args, **options)
        except Exception as error:  # noqa: BLE001  # each library has errors of its own
            if type(error).__name__ != "NoCredentialsError" or self.is_anonymous:
                raise explain(error, self.scheme, is_anonymous=self.is_anonymous) from None
        self._connect(anon=True)
        self.is_anonymous = True
        return self._ask(question, *args, **options)

    def find(self) -> tuple[dict[str, str], bool]:
        as_given = {hide_credentials(self.address): self.address}
        is_pattern = re.search(r"[*?\[]", self.path) is not None
        try:
            is_folder = not is_pattern and self._ask("info", self.path)["type"] == "directory"
        except FetchError as error:
            if error.kind == "unreachable":  # there may be a copy of it
                return as_given, False
            raise
        if not is_pattern and not is_folder:
            return as_given, False
        found = self._ask("find" if is_folder else "glob", self.path, detail=True)
        names = sorted(name for name, about in found.items() if about["type"] != "directory")
        if not names and is_pattern:
            raise FetchError("missing", "no file fits the pattern", "correct it")
        addresses = [self._address_of(name) for name in names]
        return {hide_credentials(each): each for each in addresses}, is_folder

    def _address_of(self, name: str) -> str:
        """Returns the address of a file of the same file system."""
        host = urlsplit(self.address).netloc
        is_in_path = not name.startswith("/") or name.startswith(f"/{host}/")  # as a bucket is
        return f"{self.scheme}://{name.lstrip('/') if is_in_path else host + name}"

    def open(self, start: int, version: str) -> Answer:
        about = self._ask("info", self.path)
        if about["type"] == "directory":
            raise FetchError("missing", "a folder, where a file was expected", "correct the path")
        size, found = about.get("size"), _version(about)
        start = start if version == found else 0
        chunks = self._chunks(start, size, found)
        return Answer(start, size, found, PurePosixPath(self.path).name, chunks, _digests(about))

    def _chunks(self, start: int, size: int | None, version: str) -> Iterator[bytes]:
        with self._ask("open", self.path, "rb", block_size=PART, cache_type="none") as file:
            while chunk := self._read(file, start, size):
                start += len(chunk)
                yield chunk
        if _version(self._ask("info", self.path)) != version:
            raise FetchError("transient", "the file changed on the server")

    def _read(self, file: Any, start: int, size: int | None) -> bytes:
        """Returns the next bytes of a file, at most PART of them."""
        most = PART if size is None else min(PART, size - start)
        with _explained(self.scheme):
            file.seek(start)
            return bytes(file.read(most)) if most > 0 else b""


VERSION_KEYS = (
    *("ETag", "etag", "md5Hash", "generation", "VersionId", "blob_id"),
    *("LastModified", "last_modified", "mtime", "modify", "created"),
)


def _version(about: dict[str, Any]) -> str:
    """Returns the values of a file system that change when the file does."""
    known = {key: str(about[key]) for key in VERSION_KEYS if about.get(key)}
    return json.dumps(known | {"size": about.get("size")}, sort_keys=True) if known else ""


def _digests(about: dict[str, Any]) -> dict[str, str]:
    """Returns the digests of the file that a file system gives, in hexadecimal: the hub's sha256 of
    large files, Google's md5."""
    lfs = about.get("lfs")
    sha256 = lfs.get("sha256") if isinstance(lfs, dict) else getattr(lfs, "sha256", None)
    md5 = base64.b64decode(about.get("md5Hash", "")).hex()
    return {kind: digest for kind, digest in (("sha256", sha256), ("md5", md5)) if digest}
