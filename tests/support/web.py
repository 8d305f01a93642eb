"""A web server on loopback for tests: with and without ranges, dying, refusing, changing."""

from __future__ import annotations

import base64
import threading
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
            site.sent += len(rest)
            self.wfile.write(rest)
            self.close_connection = True
            return None

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


@contextmanager
def serve(**options: object) -> Iterator[Site]:
    """Runs a server, whose site may be changed while it runs."""
    site = Site(**options)  # type: ignore[arg-type]
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(site))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    site.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
