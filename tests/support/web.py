"""A web server on loopback for tests: with and without ranges, dying, refusing, changing."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


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


def _hub_handler(site: Site, repositories: dict[str, dict[str, bytes]]) -> type:
    """What huggingface_hub asks of the hub for datasets; `gated` is one that it refuses."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
            self.send_response(status)
            headers = {"Content-Length": str(len(body))} | headers
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            name = "/".join(path.removeprefix("/api").split("/")[2:4])
            if name not in repositories:
                is_gated = name.endswith("/gated")
                code = "GatedRepo" if is_gated else "RepoNotFound"
                return self.answer(b"{}", 403 if is_gated else 404, X_Error_Code=code)
            files = repositories[name]
            if path.startswith("/datasets/"):
                content = files[path.rpartition("/")[2]]
                first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
                body = content[first : last + 1]
                site.sent += len(body)
                place = f"bytes {first}-{last}/{len(content)}"
                return self.answer(body, 206, Content_Range=place)
            listed = [
                {"type": "file", "path": name, "size": len(content), "oid": _git_sha1(content)}
                for name, content in files.items()
            ]
            found = listed if "/tree/" in path else {"id": name, "sha": "a" * 40}
            return self.answer(json.dumps(found).encode(), Content_Type="application/json")

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


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


@contextmanager
def _running(site: Site, handler: type) -> Iterator[None]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    site.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
