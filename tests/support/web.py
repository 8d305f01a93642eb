"""A web server on loopback for tests: with and without ranges, dying, refusing, changing."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, unquote, urlsplit


@dataclass
class Site:
    """What a server has, and what it was asked."""

    files: dict[str, bytes] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)  # of every file
    ranges: bool = True
    etags: bool = True
    sizes: bool = True
    dies_after: list[int] = field(default_factory=list)  # bytes, for each of the next answers
    statuses: list[int] = field(default_factory=list)  # in place of the next answers
    password: str = ""
    redirects: dict[str, str] = field(default_factory=dict)
    asked: list[tuple[str, str, str]] = field(default_factory=list)  # path, Range, Authorization
    delay: float = 0  # seconds between the parts of an answer
    sent: int = 0  # bytes of contents
    url: str = ""


def _handler(site: Site) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers.get("Range", ""), self.headers.get("Authorization", "")
            site.asked.append((self.path, *asked))
            path = urlsplit(self.path).path
            if site.statuses:
                return self.send_error(site.statuses.pop(0))
            if target := site.redirects.get(path):
                self.send_response(302)
                self.send_header("Location", target)
                return self.end_headers()
            expected = base64.b64encode(site.password.encode()).decode()
            if site.password and asked[1] != f"Basic {expected}":
                return self.send_error(401)
            if path not in site.files:
                return self.send_error(404)
            self.send_file(site.files[path])
            return None

        def send_file(self, content: bytes) -> None:
            etag, start = f'"{hash(content)}"', 0
            wanted = self.headers.get("Range", "")
            is_same = self.headers.get("If-Range", etag) == etag
            if wanted and site.ranges and is_same:
                start = int(wanted.removeprefix("bytes=").rstrip("-"))
                if start >= len(content):
                    return self.send_error(416)
            self.send_response(206 if start else 200)
            if start:
                whole = f"bytes {start}-{len(content) - 1}/{len(content)}"
                self.send_header("Content-Range", whole)
            if site.etags:
                self.send_header("ETag", etag)
            if site.sizes:
                self.send_header("Content-Length", str(len(content) - start))
            for name, value in site.headers.items():
                self.send_header(name, value)
            self.end_headers()
            rest = content[start:]
            rest = rest[: site.dies_after.pop(0)] if site.dies_after else rest
            for at in range(0, len(rest), 2**18):
                part = rest[at : at + 2**18]
                try:
                    self.wfile.write(part)
                except OSError:
                    break  # nobody listens any more
                site.sent += len(part)
                time.sleep(site.delay)
            self.close_connection = True
            return None

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


class _Answering(BaseHTTPRequestHandler):
    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        headers = {"Content-Length": str(len(body))} | headers
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def answer_range(self, content: bytes, site: Site) -> None:
        """Sends the part that the request asks for."""
        asked = self.headers.get("Range", f"bytes=0-{len(content) - 1}")
        first, last = map(int, asked.removeprefix("bytes=").split("-"))
        body = content[first : last + 1]
        site.sent += len(body)
        self.answer(body, 206, Content_Range=f"bytes {first}-{last}/{len(content)}")

    def log_message(self, format: str, *args: object) -> None:
        pass


def _hub_handler(site: Site, repositories: dict[str, dict[str, bytes]]) -> type:
    """What huggingface_hub asks of the hub for datasets; `gated` is one that it refuses."""

    class Handler(_Answering):
        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            name = "/".join(path.removeprefix("/api").split("/")[2:4])
            if name not in repositories:
                is_gated = name.endswith("/gated")
                code = "GatedRepo" if is_gated else "RepoNotFound"
                return self.answer(b"{}", 403 if is_gated else 404, X_Error_Code=code)
            files = repositories[name]
            if path.startswith("/datasets/"):
                return self.answer_range(files[path.rpartition("/")[2]], site)
            listed = [
                {"type": "file", "path": name, "size": len(content), "oid": _git_sha1(content)}
                for name, content in files.items()
            ]
            found = listed if "/tree/" in path else {"id": name, "sha": "a" * 40}
            return self.answer(json.dumps(found).encode(), Content_Type="application/json")

    return Handler


def _gcs_handler(site: Site) -> type:
    """What gcsfs asks of Google Cloud Storage (its JSON API): `site.files` has bucket/name."""

    class Handler(_Answering):
        def do_GET(self) -> None:
            site.asked.append((self.path, self.headers.get("Range", ""), ""))
            parts = urlsplit(self.path)
            found = re.fullmatch(r"(/download)?/storage/v1/b/([^/]+)(/o)?(?:/(.+))?", parts.path)
            assert found, self.path
            bucket, name = found[2], unquote(found[4] or "")
            content = site.files.get(f"{bucket}/{name}")
            if site.statuses:
                return self.refuse(site.statuses.pop(0))
            if found[1] and content is not None:
                return self.answer_range(content, site)
            if name:
                return (
                    self.tell(_gcs_object(bucket, name, content)) if content else self.refuse(404)
                )
            if bucket not in {file.partition("/")[0] for file in site.files}:
                return self.refuse(404)
            if not found[3]:
                return self.tell({"kind": "storage#bucket", "name": bucket})
            return self.tell(self.listed(bucket, dict(parse_qsl(parts.query))))

        def listed(self, bucket: str, asked: dict[str, str]) -> dict[str, object]:
            prefix, mark = asked.get("prefix", ""), asked.get("delimiter")
            names = [file.partition("/")[2] for file in sorted(site.files)]
            names = [name for name in names if name.startswith(prefix)]
            inner = [name for name in names if not mark or mark not in name[len(prefix) :]]
            folders = {
                prefix + n[len(prefix) :].partition("/")[0] + "/" for n in {*names} - {*inner}
            }
            items = [_gcs_object(bucket, name, site.files[f"{bucket}/{name}"]) for name in inner]
            return {"kind": "storage#objects", "items": items, "prefixes": sorted(folders)}

        def tell(self, value: dict[str, object]) -> None:
            self.answer(json.dumps(value).encode(), Content_Type="application/json")

        def refuse(self, status: int) -> None:
            error = {"error": {"code": status, "message": f"refused with {status}"}}
            self.answer(json.dumps(error).encode(), status, Content_Type="application/json")

    return Handler


def _gcs_object(bucket: str, name: str, content: bytes) -> dict[str, object]:
    digest = hashlib.md5(content).digest()
    return {
        "kind": "storage#object",
        "bucket": bucket,
        "name": name,
        "size": str(len(content)),
        "md5Hash": base64.b64encode(digest).decode(),
        "generation": str(int.from_bytes(digest[:6])),
        "etag": digest.hex(),
        "updated": "2026-01-01T00:00:00.000Z",
        "timeCreated": "2026-01-01T00:00:00.000Z",
        "storageClass": "STANDARD",
    }


@contextmanager
def serve_gcs(**options: object) -> Iterator[Site]:
    """Runs a stand-in for Google Cloud Storage."""
    site = Site(**options)  # type: ignore[arg-type]
    with _running(site, _gcs_handler(site)):
        yield site


def _git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def serve_hub(repositories: dict[str, dict[str, bytes]]) -> Iterator[Site]:
    """Runs a stand-in for the hub with these datasets."""
    site = Site()
    with _running(site, _hub_handler(site, repositories)):
        yield site


@contextmanager
def serve(**options: object) -> Iterator[Site]:
    """Runs a server, whose site may be changed while it runs."""
    site = Site(**options)  # type: ignore[arg-type]
    with _running(site, _handler(site)):
        yield site


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """Says nothing of a client that went away, which the cases of a lost connection do."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(*_)


@contextmanager
def _running(site: Site, handler: type) -> Iterator[None]:
    server = _Server(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    site.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
