"""A Hugging Face Hub of one's own on 127.0.0.1: enough of its HTTP for the real huggingface_hub client.

Serves folders, as models and as datasets: repository info with file sizes, the file tree, and `resolve` with the hub's
headers; weights are redirected to a "CDN" address as the real hub does. It records every request, and can refuse
(gated, unknown, wrong revision, wrong token), fail, break a download off, or stop answering in the middle of a file.
"""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass(frozen=True)
class Request:
    """What a client asked: method, path without query, and the first byte wanted of a file."""

    method: str
    path: str
    start: int = 0


@dataclass
class FakeHub:
    """models: hub id → folder. Use as a context manager; `url` is the HF_ENDPOINT.

    gated: ids that answer as to someone who has not accepted the terms. bad_token: ids that refuse the token.
    private: id → the token that may see it; to all others it does not exist.
    broken: every request is answered 503. cuts: file name → bytes after which the connection is cut, once.
    stalls: file names of which half is sent and then nothing, until the hub is closed.
    """

    models: dict[str, Path]
    gated: set[str] = field(default_factory=set)
    bad_token: set[str] = field(default_factory=set)
    private: dict[str, str] = field(default_factory=dict)
    broken: bool = False
    cuts: dict[str, int] = field(default_factory=dict)
    stalls: set[str] = field(default_factory=set)
    requests: list[Request] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)  # file → bytes of its content that went out
    stalled: threading.Event = field(default_factory=threading.Event)
    closing: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> FakeHub:
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def downloaded(self) -> set[str]:
        """Paths inside the repositories of all files whose content was asked for."""
        return set(self.sent)

    def commit(self, name: str) -> str:
        """A commit hash that stands for a folder's content by name."""
        return hashlib.sha1(name.encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        wanted = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0]
        self.hub.requests.append(Request(self.command, path, int(wanted)))
        if self.hub.broken:
            return self._refuse(503, "", "the hub is broken")
        parts = path.strip("/").split("/")
        if parts[0] == "datasets":
            parts = parts[1:]
        if parts[:2] in (["api", "models"], ["api", "datasets"]):
            return self._api("/".join(parts[2:4]), parts[4:], parse_qs(url.query))
        if parts[0] == "cdn":
            name = "/".join(parts[1:3])
            return self._file(self.hub.models[name] / "/".join(parts[3:]), "/".join(parts[3:]), int(wanted), {})
        if len(parts) > 4 and parts[2] == "resolve":
            return self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]), int(wanted))
        return self._refuse(404, "", "no such page")

    def _api(self, name: str, rest: list[str], query: dict[str, list[str]]) -> None:
        revision = rest[1] if len(rest) > 1 else "main"
        if self._refused(name, revision, api=True):
            return None
        folder = self.hub.models[name]
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        if rest[:1] == ["tree"]:
            folder_asked = folder.joinpath(*rest[2:])
            if not folder_asked.is_dir():
                return self._refuse(404, "EntryNotFound", "no such folder")
            files = [path for path in files if path.is_relative_to(folder_asked)]
            return self._json([self._entry(path, folder) for path in files])
        siblings = [{"rfilename": path.relative_to(folder).as_posix()} for path in files]
        if query.get("blobs"):
            for entry, path in zip(siblings, files, strict=True):
                entry["size"] = path.stat().st_size
        return self._json(
            {"id": name, "modelId": name, "sha": self.hub.commit(name), "private": False, "siblings": siblings}
        )

    def _resolve(self, name: str, revision: str, file: str, start: int) -> None:
        if self._refused(name, revision, api=False):
            return None
        path = self.hub.models[name] / file
        if not path.is_file():
            return self._refuse(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": self.hub.commit(name), "ETag": f'"{_etag(path)}"'}
        if path.suffix != ".safetensors":
            return self._file(path, file, start, headers)
        size = str(path.stat().st_size)
        location = f"http://localhost:{self.hub.server.server_port}/cdn/{name}/{file}"  # another host, as a CDN is
        linked = {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": size, "Location": location}
        return self._head(302, {**headers, **linked}, 0)

    def _refused(self, name: str, revision: str, *, api: bool) -> bool:
        if name in self.hub.bad_token and "Authorization" in self.headers:
            self._refuse(401, "", "Invalid credentials in Authorization header")
        elif name not in self.hub.models or not self._may_see(name):
            # The real hub does not tell strangers what does not exist from what is private.
            signed_in = "Authorization" in self.headers
            self._refuse(404 if signed_in else 401, "RepoNotFound" if signed_in else "", "Repository not found")
        elif revision not in ("main", self.hub.commit(name)):
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif name in self.hub.gated and not api:
            self._refuse(403 if "Authorization" in self.headers else 401, "GatedRepo", "Access is restricted")
        else:
            return False
        return True

    def _may_see(self, name: str) -> bool:
        token = self.hub.private.get(name)
        return token is None or self.headers.get("Authorization") == f"Bearer {token}"

    def _file(self, path: Path, file: str, start: int, headers: dict[str, str]) -> None:
        content = path.read_bytes()
        body = content[start:]
        extra = {"Accept-Ranges": "bytes"}
        if start:
            extra["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._head(206 if start else 200, {**headers, **extra}, len(body))
        if self.command == "HEAD":
            return
        stop = self.hub.cuts.pop(file, None)
        if file in self.hub.stalls:
            self._send(file, body[: len(body) // 2])
            self.hub.stalled.set()
            self.hub.closing.wait()
            self.close_connection = True
        elif stop is not None:
            self._send(file, body[:stop])
            self.close_connection = True
        else:
            self._send(file, body)

    def _send(self, file: str, body: bytes) -> None:
        self.hub.sent[file] = self.hub.sent.get(file, 0) + len(body)
        try:
            self.wfile.write(body)
            self.wfile.flush()
        except ConnectionError:
            self.close_connection = True

    def _entry(self, path: Path, folder: Path) -> dict:
        size, name = path.stat().st_size, path.relative_to(folder).as_posix()
        entry = {"type": "file", "path": name, "size": size, "oid": _etag(path)[:40]}
        if path.suffix == ".safetensors":
            entry["lfs"] = {"oid": _etag(path), "size": size, "pointerSize": 130}
        return entry

    def _json(self, value: object) -> None:
        body = json.dumps(value).encode()
        self._head(200, {"Content-Type": "application/json"}, len(body))
        if self.command == "GET":
            self.wfile.write(body)

    def _refuse(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self._head(status, headers, 0)

    def _head(self, status: int, headers: dict[str, str], length: int) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(key, value)
        self.end_headers()


def _etag(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
