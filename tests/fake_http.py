"""A web server of one's own on 127.0.0.1 that gives pictures and takes messages, and that can be slow, moody, closed,
or torn off.

What a path answers stands in `pages`: bytes, or a list of what is answered in turn (its last one for good): bytes,
a `Moody` answer, or a status code.
"""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass, field
from email.message import Message
from email.parser import BytesParser
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Moody:
    """An answer with a mood. cut: bytes after which the connection breaks. late_s: before anything is sent.

    length: whether it says how long it is. ranges: whether it can go on in the middle. to: where it redirects to.
    wrong_range: answers 206 with the bytes from 0.
    """

    body: bytes = b""
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    cut: int | None = None
    late_s: float = 0.0
    length: bool = True
    ranges: bool = True
    to: str | None = None
    wrong_range: bool = False


@dataclass(frozen=True)
class Post:
    """What was sent: path, headers and body."""

    path: str
    headers: Message
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    def form(self) -> dict[str, bytes]:
        """The parts of a multipart body by name."""
        head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
        parts = BytesParser().parsebytes(head + self.body).get_payload()
        return {
            str(part.get_param("name", header="content-disposition")): bytes(part.get_payload(decode=True))
            for part in parts  # type: ignore[union-attr]
        }  # fmt: skip


@dataclass
class FakeHttp:
    """Use as a context manager. requests: (path with query, Range). posts: what was sent, answered or not.

    most: of the requests that waited for an answer at once. One whose answer has begun waits no more: who asked may
    have all of it, and ask again, before its thread here gets to say so.
    """

    pages: dict[str, Any] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    logins: list[str] = field(default_factory=list)
    posts: list[Post] = field(default_factory=list)
    most: int = 0

    def __enter__(self) -> FakeHttp:
        handler = type("Handler", (_Handler,), {"fake": self})
        self.waiting, self.lock = 0, threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Close the door: connections are refused from now on."""
        self.server.shutdown()
        self.server.server_close()

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server.server_port}"

    @property
    def url(self) -> str:
        return f"http://{self.host}"

    def asked(self) -> list[str]:
        """The paths that were asked for, in order."""
        return [path for path, _ in self.requests]

    def next_answer(self, path: str) -> Any:
        with self.lock:
            page = self.pages.get(path, 404)
            if not isinstance(page, list):
                return page
            return page.pop(0) if len(page) > 1 else page[0]


class _Handler(BaseHTTPRequestHandler):
    fake: FakeHttp

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        fake = self.fake
        with fake.lock:
            fake.waiting += 1
            fake.most = max(fake.most, fake.waiting)
            fake.requests.append((self.path, self.headers.get("Range", "")))
            if login := self.headers.get("Authorization"):
                fake.logins.append(login)
        page = fake.next_answer(self.path)
        page = Moody(page) if isinstance(page, bytes) else Moody(status=page) if isinstance(page, int) else page
        time.sleep(page.late_s)
        with fake.lock:
            fake.waiting -= 1
        try:
            self._answer(page)
        except ConnectionError:
            pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.fake.lock:
            self.fake.posts.append(Post(self.path, self.headers, body))
        page = self.fake.next_answer(self.path)
        page = Moody(status=page) if isinstance(page, int) else page
        time.sleep(page.late_s)
        try:
            self._answer(page)
        except ConnectionError:
            pass

    def _answer(self, page: Moody) -> None:
        wanted = self.headers.get("Range", "").removeprefix("bytes=").rstrip("-")
        begin = int(wanted) if wanted and page.ranges and page.status == 200 else 0
        self.send_response(206 if begin else 302 if page.to else page.status)
        body = page.body[0 if page.wrong_range else begin :]
        if begin:
            first = 0 if page.wrong_range else begin
            self.send_header("Content-Range", f"bytes {first}-{len(page.body) - 1}/{len(page.body)}")
        if page.to:
            self.send_header("Location", page.to)
        if page.length:
            self.send_header("Content-Length", str(len(body)))
        if page.ranges and page.body:
            self.send_header("Last-Modified", formatdate(1e9, usegmt=True))
        for name, value in page.headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body if page.cut is None else body[: page.cut])
        self.close_connection = True
