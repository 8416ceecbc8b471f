"""A Hugging Face Hub of one's own on 127.0.0.1: enough of its HTTP for the real huggingface_hub client, both ways.

Serves folders, as models and as datasets: repository info with file sizes, the file tree, and `resolve` with the hub's
headers; weights are redirected to a "CDN" address as the real hub does. It records every request, and can refuse
(gated, unknown, wrong revision, wrong token), fail, break a download off, or stop answering in the middle of a file.

It takes uploads as well: whoami, new repositories, preupload, large files by LFS, commits; what is committed is served.
"""

from __future__ import annotations

import hashlib
import json
import threading
from base64 import b64decode
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


@dataclass(frozen=True)
class User:
    """Whom a token belongs to. role: of the token, write or read."""

    name: str
    role: str = "write"
    orgs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Commit:
    """One commit: repository, first line of the message, and the paths it added."""

    repository: str
    message: str
    paths: tuple[str, ...]


@dataclass
class FakeHub:
    """models: hub id → folder. Use as a context manager; `url` is the HF_ENDPOINT.

    gated: ids that answer as to someone who has not accepted the terms. bad_token: ids that refuse the token.
    private: id → the token that may see it; to all others it does not exist.
    broken: every request is answered 503. cuts: file name → bytes after which the connection is cut, once.
    stalls: file names of which half is sent and then nothing, until the hub is closed.
    users: token → whose it is. root: where new repositories go. made: id → visibility, of those that clients made.
    trouble: request (whoami, create, preupload, batch, put, commit) → status codes to answer first, one each.
    objects: hash → content of the large files that were sent, committed or not. puts: hashes in the order they came.
    """

    models: dict[str, Path]
    gated: set[str] = field(default_factory=set)
    bad_token: set[str] = field(default_factory=set)
    private: dict[str, str] = field(default_factory=dict)
    broken: bool = False
    cuts: dict[str, int] = field(default_factory=dict)
    stalls: set[str] = field(default_factory=set)
    users: dict[str, User] = field(default_factory=dict)
    root: Path | None = None
    made: dict[str, str] = field(default_factory=dict)
    trouble: dict[str, list[int]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    puts: list[str] = field(default_factory=list)
    commits: list[Commit] = field(default_factory=list)
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

    # ---- uploads ----

    def do_POST(self) -> None:
        self._take()

    def do_PUT(self) -> None:
        self._take()

    def _take(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(Request(self.command, path))
        body = self._body()
        parts = path.strip("/").split("/")
        kind = self._kind(parts)
        if pending := self.hub.trouble.get(kind):
            return self._refuse(pending.pop(0), "", f"trouble with {kind}")
        if kind == "put":
            return self._put(parts[1], body)
        if kind == "validate":
            return self._json({"warnings": [], "errors": []})
        user = self._user()
        if user is None or user.role == "read":
            return self._refuse(401 if user is None else 403, "", "you may not write")
        if kind == "create":
            return self._create(json.loads(body), user)
        name = f"{parts[0]}/{parts[1].removesuffix('.git')}" if kind == "batch" else "/".join(parts[2:4])
        if name not in self.hub.models:
            return self._refuse(404, "RepoNotFound", "Repository not found")
        return {"preupload": self._preupload, "batch": self._batch, "commit": self._commit}[kind](name, body)

    @staticmethod
    def _kind(parts: list[str]) -> str:
        if parts[0] == "lfs":
            return "put"
        if parts[:2] == ["api", "validate-yaml"]:
            return "validate"
        if parts[:3] == ["api", "repos", "create"]:
            return "create"
        return parts[4] if parts[:2] == ["api", "models"] else "batch"

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def _user(self) -> User | None:
        return self.hub.users.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def _create(self, asked: dict, user: User) -> None:
        owner, root = asked.get("organization") or user.name, self.hub.root
        name = f"{owner}/{asked['name']}"
        if owner not in (user.name, *user.orgs):
            return self._refuse(403, "", f"you may not create repositories of {owner}")
        if name in self.hub.models:
            return self._json({"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, 409)
        assert root is not None, "a hub that takes uploads has a root"
        folder = root / name
        folder.mkdir(parents=True)
        self.hub.models[name] = folder
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.hub.made[name] = "private" if private else "public"
        return self._json({"url": f"{self.hub.url}/{name}", "name": name})

    def _preupload(self, name: str, body: bytes) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".pt", ".png")) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self._json({"files": files})

    def _batch(self, name: str, body: bytes) -> None:
        objects = []
        for asked in json.loads(body)["objects"]:
            entry = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.objects:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{asked['oid']}"}}
            objects.append(entry)
        self._json({"transfer": "basic", "objects": objects})

    def _put(self, oid: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self._refuse(400, "", "the content is not what the hash says")
        self.hub.puts.append(oid)
        self.hub.objects[oid] = body
        return self._head(200, {}, 0)

    def _commit(self, name: str, body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        files: dict[str, bytes] = {}
        for line in lines[1:]:
            value = line["value"]
            is_large = line["key"] == "lfsFile"
            if is_large and value["oid"] not in self.hub.objects:
                return self._refuse(422, "", f"{value['path']} was never sent")
            content = self.hub.objects[value["oid"]] if is_large else b64decode(value["content"])
            files[value["path"]] = content
        for path, content in files.items():
            place = self.hub.models[name] / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
        self.hub.commits.append(Commit(name, lines[0]["value"]["summary"], tuple(sorted(files))))
        oid = self.hub.commit(name)
        return self._json(
            {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "hookOutput": ""}
        )

    def _whoami(self) -> None:
        user = self._user()
        if pending := self.hub.trouble.get("whoami"):
            return self._refuse(pending.pop(0), "", "trouble with whoami")
        if user is None:
            return self._refuse(401, "", "Invalid credentials in Authorization header")
        token = {"displayName": "test", "role": user.role}
        orgs = [{"name": org} for org in user.orgs]
        return self._json({"type": "user", "name": user.name, "orgs": orgs, "auth": {"accessToken": token}})

    # ---- downloads ----

    def _answer(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        wanted = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0]
        self.hub.requests.append(Request(self.command, path, int(wanted)))
        if self.hub.broken:
            return self._refuse(503, "", "the hub is broken")
        parts = path.strip("/").split("/")
        if parts == ["api", "whoami-v2"]:
            return self._whoami()
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

    def _json(self, value: object, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self._head(status, {"Content-Type": "application/json"}, len(body))
        if self.command != "HEAD":
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
