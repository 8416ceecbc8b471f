"""Pictures behind addresses that a table lists: each is downloaded once, looked at, and kept in a folder. No torch.

Few requests at once to one server, waits where it asks for them, and a download that broke off goes on where it
stopped. A picture is kept only when its server said all is well, every byte came, and it can be decoded.
"""

from __future__ import annotations

import base64
import io
import os
import ssl
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cached_property
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from posixpath import basename, splitext
from typing import BinaryIO
from urllib.error import HTTPError, URLError
from urllib.parse import parse_qsl, quote, unquote, urlsplit, urlunsplit
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
)

from sana_tune import __version__
from sana_tune.config.secrets import MASK, is_secret
from sana_tune.data.records import digest
from sana_tune.data.remote import PATIENCE, GaveUp, Passing, Patience, Rest, persist
from sana_tune.data.sources import PICTURE_ENDINGS
from sana_tune.data.tables import TableCaptions, read_table, texts_of
from sana_tune.errors import Problem, UserError
from sana_tune.store import Entry, StoreLost, write_atomically

AT_ONCE = 4  # requests to one server
LARGEST_BYTES = 1 << 29
LONGEST_S = 600.0  # of one try, however steadily its bytes drip
_ENOUGH = 3  # downloads in a row that a server fails before no more are asked of it
_BLOCK = 1 << 16
# Status codes that may be another one in a while. RFC 9110; 425: RFC 8470; 429: RFC 6585.
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
_SAFE = "/%:@!$&'()*+,;=~-._?"


class AddressStore:
    """The pictures of a table, by keys such as "example.com/cats/1.jpg". Rows of one address are one picture.

    table: its file. folder: where the downloads are kept. caption_column: of `captions`.
    A picture that was not downloaded yet has an entry of size -1; `read` and `open` download it.
    """

    all_pictures = True
    far_away = True

    def __init__(
        self, table: str, folder: str, url_column: str, caption_column: str, patience: Patience = PATIENCE
    ) -> None:
        self.table, self.folder = table, Path(folder).expanduser()
        self._url_column, self._caption_column = url_column, caption_column
        self._patience = patience
        self.rest = Rest()
        self._lock = threading.Lock()
        self._servers: dict[str, _Server] = {}
        self._opener = _opener()

    def check(self) -> None:
        """UserError when the table cannot be read, or lacks the column of addresses. Nothing is asked of servers."""
        _ = self._rows

    def list(self) -> Iterator[Entry]:
        """A picture for each address, and one for each row without a usable one; sorted by key."""
        return iter([self.entry(key) for key in sorted(self._rows)])

    def entry(self, key: str) -> Entry:
        """Size and time of the download; size -1 before there is one."""
        try:
            status = os.stat(self._kept(self._row(key)))
        except OSError:
            return Entry(key, -1, 0)
        return Entry(key, status.st_size, status.st_mtime_ns)

    def exists(self, key: str) -> bool:
        """Whether the table has it."""
        return key in self._rows

    def open(self, key: str) -> BinaryIO:
        """The download, made first if need be."""
        try:
            return open(self._kept(self._row(key)), "rb")
        except OSError:
            return io.BytesIO(self.read(key))

    def read(self, key: str) -> bytes:
        """The picture's bytes, downloaded if need be. UserError when it cannot be had."""
        row = self._row(key)
        path = self._kept(row)
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:
            what = f"its download cannot be read: {error.strerror or error}"
            raise UserError(Problem(str(path), what, "delete this file: it is downloaded again")) from error
        data = self._download(key, row)
        try:
            write_atomically(path, data)
        except UserError as error:  # no picture's fault, and the next would fare no better
            raise StoreLost(*error.problems) from error
        return data

    def locate(self, key: str) -> str:
        """The address, less its secrets."""
        row = self._row(key)
        return f"{self.table}: row {row.number}" if row.wrong else shown(row.url)

    def captions(self) -> TableCaptions:
        """The captions of every picture. UserError when the table has no such column."""
        rows = read_table(self.table, [self._url_column, self._caption_column])
        by_url = {row.url: key for key, row in self._rows.items() if not row.wrong}
        texts: dict[str, tuple[str, ...]] = {}
        for address, value in rows:
            key = by_url.get(_stripped(address))
            if key is not None:
                texts[key] = tuple(dict.fromkeys((*texts.get(key, ()), *texts_of(value))))
        return TableCaptions(basename(self.table), texts)

    @cached_property
    def _rows(self) -> Mapping[str, _Row]:
        """Key → row."""
        rows: dict[str, _Row] = {}
        urls: dict[str, int] = {}
        for number, (address,) in enumerate(read_table(self.table, [self._url_column]), start=1):
            url = _stripped(address)
            if wrong := _wrong(url):
                rows[f"row {number}"] = _Row(url, number, wrong)
            else:
                urls.setdefault(url, number)
        names = {url: key_of(url) for url in urls}
        several = Counter(names.values())
        for url, number in urls.items():
            rows[names[url] if several[names[url]] == 1 else key_of(url, marked=True)] = _Row(url, number)
        return rows

    def _row(self, key: str) -> _Row:
        row = self._rows.get(key)
        if row is None:
            raise UserError(Problem(f"{self.table}: {key}", "is no address of the table", "was a row taken out?"))
        return row

    def _kept(self, row: _Row) -> Path:
        """Where its download is, or will be."""
        name = digest("address", row.url)
        ending = "" if row.wrong else splitext(urlsplit(row.url).path)[1].lower()
        return self.folder / name[:2] / (name + (ending if ending in PICTURE_ENDINGS else ""))

    def _download(self, key: str, row: _Row) -> bytes:
        """All bytes of a sound picture."""
        if row.wrong:
            raise UserError(Problem(self.locate(key), row.wrong, "mend the row, or take it out"))
        server = self._server(row.url)
        if server.dead is not None:
            raise self._failed(key, server.dead)
        download = _Download(row.url, self._opener, self._patience)
        try:
            with server.places:
                data = persist(lambda: server.asked(download, self.rest), self._patience, self.rest)
        except _Refused as error:
            server.answers()
            raise self._failed(key, str(error)) from error
        except GaveUp as error:
            if server.fails(str(error)):
                raise StoreLost(self._lost(server, str(error))) from error
            raise self._failed(key, str(error)) from error
        server.answers()
        return data

    def _server(self, url: str) -> _Server:
        name = _server_of(url)
        with self._lock:
            if name not in self._servers:
                self._servers[name] = _Server(name, answered=name in self._known)
            return self._servers[name]

    @cached_property
    def _known(self) -> frozenset[str]:
        """The servers that something was downloaded from."""
        return frozenset(
            _server_of(row.url) for row in self._rows.values() if not row.wrong and self._kept(row).is_file()
        )

    def _failed(self, key: str, reason: str) -> UserError:
        fix = "mend the address, or take the row out; it is tried again at each start"
        return UserError(Problem(self.locate(key), f"cannot be downloaded: {reason}", fix))

    def _lost(self, server: _Server, reason: str) -> Problem:
        what = f"the server {server.name} gave pictures before and does not any more: {reason}"
        fix = f"check the network; what was downloaded is kept in {self.folder}, and the next start goes on from there"
        return Problem(self.table, what, fix)


@dataclass(frozen=True)
class _Row:
    """An address. number: of its first row, from 1. wrong: why it is no address."""

    url: str
    number: int
    wrong: str = ""


def key_of(url: str, *, marked: bool = False) -> str:
    """The key of an address: its server and path, and a mark of the rest where that tells addresses apart."""
    parts = urlsplit(url)
    names = [_readable(unquote(part)) for part in parts.path.split("/")]
    *folders, name = [name for name in names if name not in ("", ".", "..")] or ["picture"]
    mark = [digest("address", url)[:16]] if marked or parts.query else []
    return "/".join([_readable(parts.hostname or ""), *folders, *mark, name])


def _server_of(url: str) -> str:
    """Name and port."""
    return urlsplit(url).netloc.rpartition("@")[2].lower()


def _readable(text: str) -> str:
    return "".join(letter if letter.isprintable() and letter not in "/\\" else "_" for letter in text)


def shown(url: str) -> str:
    """An address without what must not be shown: a password, signatures and keys of its query."""
    parts = urlsplit(url)
    query = "&".join(
        f"{name}={MASK if is_secret(name) or _signs(name) else value}" if value else name
        for name, value in parse_qsl(parts.query, keep_blank_values=True)
    )
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, query, ""))


def _signs(name: str) -> bool:
    """Whether a parameter of a query is the signature, or the key, of a signed address."""
    return name.lower() in ("sig", "key", "auth", "hmac", "policy") or any(
        word in name.lower() for word in ("signature", "credential", "security-token", "key-pair")
    )


def _stripped(address: object) -> str:
    return str(address).strip() if address is not None else ""


def _wrong(url: str) -> str:
    """Why a text is no address; empty when it is one."""
    if not url:
        return "has no address"
    try:
        parts = urlsplit(url)
        sound = parts.scheme.lower() in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        sound = False
    return "" if sound else f"has no address that begins with http:// or https:// (found {url[:60]!r})"


class _Server:
    """What is known of a server, by all threads. answered: it gave something, now or at an earlier start."""

    def __init__(self, name: str, *, answered: bool):
        self.name = name
        self.dead: str | None = None
        self._answered = answered
        self._failures = 0
        self._rest_until_s = 0.0
        self.places = threading.Semaphore(AT_ONCE)

    def asked(self, download: _Download, rest: Rest) -> bytes:
        """One try, after the rest that the server asked for."""
        rest(self._rest_until_s - time.monotonic())
        try:
            return download.attempt()
        except Passing as error:
            if error.wait_s is not None:
                self._rest_until_s = time.monotonic() + error.wait_s
            raise

    def answers(self) -> None:
        """It answered, be it with a refusal."""
        self._answered, self._failures = True, 0

    def fails(self, reason: str) -> bool:
        """It failed to the last try. Answers whether that means that all is lost: it has answered before.

        One that never answered is dead: nothing more is asked of it.
        """
        self._failures += 1
        if self._failures < _ENOUGH:
            return False
        if not self._answered:
            self.dead = reason
        return self._answered


class _Refused(Exception):
    """An answer that will not change, in words that complete "cannot be downloaded: …"."""


@dataclass
class _Download:
    """One address on its way; what came is kept from one try to the next, if the server can go on from there."""

    url: str
    opener: OpenerDirector
    patience: Patience
    got: bytearray = field(default_factory=bytearray)
    mark: str = ""  # ETag or time of change: what came and what is to come are of one picture

    def attempt(self) -> bytes:
        """All bytes. Raises Passing or _Refused."""
        if not self.mark:
            self.got.clear()
        try:
            with self.opener.open(self._request(), timeout=self.patience.read_s) as answer:
                told = self._receive(answer)
        except HTTPError as error:
            raise self._judged(error) from error
        except URLError as error:
            raise _of_network(error.reason) from error
        except (HTTPException, OSError) as error:
            raise _of_network(error) from error
        except ValueError as error:  # an address that Python's client cannot ask for
            raise _Refused(f"it is no usable address: {error}") from error
        return _looked_at(bytes(self.got), told)

    def _request(self) -> Request:
        parts = urlsplit(self.url)
        netloc = parts.netloc.rpartition("@")[2]
        if not netloc.isascii():
            netloc = netloc.encode("idna").decode("ascii")
        address = urlunsplit((parts.scheme, netloc, quote(parts.path, _SAFE), quote(parts.query, _SAFE), ""))
        headers = {"User-Agent": f"sana_tune/{__version__}", "Accept": "image/*,*/*;q=0.5"}
        if self.got:
            headers |= {"Range": f"bytes={len(self.got)}-", "If-Range": self.mark}
        request = Request(address, headers=headers)
        if parts.username is not None:
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            request.add_unredirected_header("Authorization", f"Basic {base64.b64encode(pair.encode()).decode()}")
        return request

    def _receive(self, answer: HTTPResponse) -> bool:
        """Take what comes. Answers whether its length was told, so that nothing can be missing."""
        begun = time.monotonic()
        if answer.status != 206:
            self.got.clear()
        elif not (answer.headers.get("Content-Range") or "").startswith(f"bytes {len(self.got)}-"):
            self.got.clear()
            self.mark = ""
            raise Passing("it sent another part than was asked for")
        etag = answer.headers.get("ETag", "")
        self.mark = etag if etag and not etag.startswith("W/") else answer.headers.get("Last-Modified", "")
        length = answer.headers.get("Content-Length", "")
        wanted = len(self.got) + int(length) if length.isdecimal() else None
        while block := answer.read(_BLOCK):
            self.got += block
            if len(self.got) > LARGEST_BYTES:
                raise _Refused(f"it has more than {LARGEST_BYTES >> 20} MB")
            if time.monotonic() - begun > LONGEST_S:
                raise Passing(f"it took more than {LONGEST_S:.0f} s")
        if wanted is not None and len(self.got) < wanted:
            raise Passing(f"it broke off at {len(self.got)} of {wanted} bytes")
        return wanted is not None

    def _judged(self, error: HTTPError) -> Exception:
        """What the server's status means."""
        told = f"the server says {error.code}" + (f" ({error.reason})" if error.reason else "")
        if error.code == 416 and self.got:
            self.got.clear()
            self.mark = ""
            return Passing(told)
        if error.code in _PASSING:
            return Passing(told, _wait_s(error.headers.get("Retry-After")))
        return _Refused(told)


def _of_network(error: object) -> Exception:
    """What an error of the network means."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return _Refused(f"the server's certificate cannot be trusted: {error.verify_message}")
    if isinstance(error, TimeoutError):
        return Passing("no answer in time")
    if isinstance(error, HTTPException):
        return Passing(f"its answer broke off ({type(error).__name__})")
    if isinstance(error, OSError):
        return Passing(f"no connection ({error.strerror or error})")
    return _Refused(str(error))


def _wait_s(value: str | None) -> float | None:
    """Retry-After: seconds, or a time."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        until = parsedate_to_datetime(value)
    except ValueError:
        return None
    if until.tzinfo is None:
        until = until.replace(tzinfo=UTC)
    return max(0.0, (until - datetime.now(UTC)).total_seconds())


def _looked_at(data: bytes, told: bool) -> bytes:
    """The bytes, if they are a sound picture. told: the server said how many there are."""
    from sana_tune.data.images import BrokenImage, decode, read_header

    if not data:
        raise _Refused("the server sent nothing")
    try:
        read_header(data)
    except BrokenImage as error:
        raise _Refused(f"what the server sent {error.reason}") from error
    try:
        decode(data)
    except BrokenImage as error:
        if not told:
            raise Passing(f"what the server sent {error.reason}") from error
        raise _Refused(f"what the server sent {error.reason}") from error
    return data


def _opener() -> OpenerDirector:
    """http and https alone, through the environment's proxies; no files, no FTP, whatever a server redirects to."""
    opener = OpenerDirector()
    for handler in (
        *(ProxyHandler(), HTTPHandler(), HTTPSHandler()),
        *(HTTPRedirectHandler(), HTTPDefaultErrorHandler(), HTTPErrorProcessor()),
    ):
        opener.add_handler(handler)
    return opener
