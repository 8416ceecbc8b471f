"""Messages to Discord, or as JSON to a server of one's own: sent aside, retried, and given up with one line.

Nothing here waits on the thread that trains, and no message of an error shows an address: a Discord webhook's holds its
secret. Formats: https://discord.com/developers/docs/resources/webhook, and docs/tracking.md for `raw`.
"""

from __future__ import annotations

import json
import math
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from mimetypes import guess_type
from typing import Any

from sana_tune import __version__
from sana_tune.config.watching import Webhook
from sana_tune.log import log
from sana_tune.watch.background import Worker
from sana_tune.watch.events import Event, Stepped
from sana_tune.watch.messages import Attachment, Message, Teller

LONGEST_TEXT = 2000  # characters of a Discord message
MOST_PICTURES = 10  # attachments of a Discord message
WAITING = 64  # messages that may wait
# Answers that another try may change. RFC 9110; 425: RFC 8470; 429: RFC 6585.
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True)
class Pace:
    """How long is waited, s.

    connect_s, read_s: for a server to take a connection and to answer. waits_s: between the tries of a message.
    longest_s: a server that asks for a longer wait is given up. rest_s: how long nothing is sent after that.
    flush_s: for what still waits when the run ends. status_s: between two messages of how far the run is.
    """

    connect_s: float = 5.0
    read_s: float = 10.0
    waits_s: tuple[float, ...] = (1.0, 4.0, 15.0)
    longest_s: float = 120.0
    rest_s: float = 60.0
    flush_s: float = 5.0
    status_s: float = 1.0


PACE = Pace()


class Undelivered(Exception):
    """A server did not take a message; the text says why, without its address.

    is_final: no later message will be taken either. again: another try may do. wait_s: what the server asks to wait.
    """

    def __init__(self, reason: str, *, is_final: bool = False, again: bool = True, wait_s: float | None = None):
        super().__init__(reason)
        self.is_final, self.again, self.wait_s = is_final, again and not is_final, wait_s


class WebhookSink:
    """Sends a run's messages to one webhook, beginning with a greeting. job: an id of the run."""

    def __init__(self, hook: Webhook, run: str, job: str, pace: Pace = PACE, now: Callable[[], float] = time.monotonic):
        self._hook, self._job, self._pace, self._now = hook, job, pace, now
        self._teller = Teller(run)
        self._status_s: dict[str, float] = {}
        self._worker = Worker(f"webhook {hook.kind}", WAITING, self._broke)
        self._told = self._over = False
        self._rests_until_s = 0.0
        self._session: Any = None
        self._queue(self._teller.greeting())

    def emit(self, event: Event) -> None:
        """Queue what is to be said of the event; takes microseconds."""
        if isinstance(event, Stepped) and not event.skipped and not self._has_turn("step"):
            self._teller.count(event)
            return
        for message in self._teller.messages(event):
            if self._over or not self._hook.hears(message.severity) or not self._is_due(message):
                continue
            self._queue(message)

    def close(self) -> None:
        """Send what waits, each message with one try, for a short while."""
        self.hurry()
        self.finish(self._pace.flush_s)

    def hurry(self) -> None:
        """From now on each message gets one try, and nothing is waited for."""
        self._worker.hurry.set()

    def finish(self, limit_s: float) -> None:
        """Wait for what is still to be sent, and end."""
        if not self._worker.finish(limit_s):
            log.debug("%s: the last messages were not taken in time", self._hook.name)

    def _is_due(self, message: Message) -> bool:
        """Whether a message is sent: of a status one a while, and none to people; its end always."""
        if not message.status:
            return True
        is_end = message.fields.get("stage", {}).get("status") in ("completed", "failed")
        if not self._has_turn(message.key) and not (is_end and self._hook.kind == "raw"):
            return False
        self._status_s[message.key] = self._now()
        return True

    def _has_turn(self, key: str) -> bool:
        """Whether a status of this key may be sent again."""
        if self._hook.kind == "discord":
            return False
        return self._now() - self._status_s.get(key, -math.inf) >= self._pace.status_s

    def _queue(self, message: Message) -> None:
        stamp = datetime.now(UTC).isoformat(timespec="milliseconds")
        key = message.key or None if message.status else None
        passing = message.status or message.passing
        self._worker.put(lambda: self._deliver(message, stamp), key=key, passing=passing)

    # ---- on the worker's thread ----

    def _deliver(self, message: Message, stamp: str) -> None:
        """Send one message with all its tries; say once that it cannot be done."""
        if self._over or self._now() < self._rests_until_s:
            return
        try:
            for part in self._parts(message):
                self._persist(part, stamp)
        except Undelivered as error:
            self._give_up(error)
        else:
            if self._told:
                log.info("%s: it takes messages again", self._hook.name)
                self._told = False

    def _parts(self, message: Message) -> Iterator[Message]:
        """A message in as many as Discord wants of one with many pictures."""
        if self._hook.kind == "raw" or len(message.pictures) <= MOST_PICTURES:
            yield message
            return
        for start in range(0, len(message.pictures), MOST_PICTURES):
            text = message.text if start == 0 else ""
            yield replace(message, text=text, pictures=message.pictures[start : start + MOST_PICTURES])

    def _persist(self, message: Message, stamp: str) -> None:
        """Try, and try again after waits. One try when the server was given up before, or the run ends."""
        waits = () if self._told else self._pace.waits_s
        for wait_s in waits:
            try:
                return self._send(message, stamp)
            except Undelivered as error:
                asked = error.wait_s or 0.0
                if not error.again or asked > self._pace.longest_s or self._worker.hurry.is_set():
                    raise
                self._worker.hurry.wait(max(wait_s, asked))
        return self._send(message, stamp)

    def _give_up(self, error: Undelivered) -> None:
        self._over = error.is_final
        if error.again:
            self._rests_until_s = self._now() + max(self._pace.rest_s, error.wait_s or 0.0)
        if not self._told:
            then = "no more is sent" if error.is_final else "messages are lost until it takes them again"
            log.warning("%s gets no messages: %s; %s", self._hook.name, error, then)
        self._told = True

    def _broke(self, error: Exception) -> None:
        """Something that nobody thought of: the sink says so and ends. The text could hold the address."""
        self._over = True
        log.warning("%s failed and is switched off: %s", self._hook.name, type(error).__name__)

    def _send(self, message: Message, stamp: str) -> None:
        """One request. Raises Undelivered."""
        import requests

        if self._session is None:
            self._session = requests.Session()
            self._session.headers["User-Agent"] = f"sana_tune/{__version__}"
        hook = self._hook
        body = discord_body(hook, message) if hook.kind == "discord" else raw_body(hook, message, stamp, self._job)
        headers = {"X-API-Key": hook.auth_token} if hook.auth_token else {}
        try:
            answer = self._session.post(
                hook.url,
                **body,
                headers=headers,
                timeout=(self._pace.connect_s, self._pace.read_s),
                verify=not hook.ssl_no_verify,
                allow_redirects=False,  # the token is for this server alone
                stream=True,  # nobody reads the body
            )
            answer.close()
        except requests.exceptions.RequestException as error:
            raise Undelivered(_reason(error, self._pace)) from None
        _judge(answer.status_code, answer.headers)


def discord_body(hook: Webhook, message: Message) -> dict[str, Any]:
    """A message as Discord takes it: the text, pictures as attachments, and nobody pinged by what a prompt says."""
    text = " ".join(filter(None, (hook.message_prefix, message.text)))
    text = text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1] + "…"
    payload = {"content": text, "allowed_mentions": {"parse": []}}
    files = {
        f"files[{number}]": (picture.name, content, guess_type(picture.name)[0] or "image/png")
        for number, (picture, content) in enumerate(_read(message))
    }
    return {"data": {"payload_json": json.dumps(payload)}, "files": files} if files else {"json": payload}


def raw_body(hook: Webhook, message: Message, stamp: str, job: str) -> dict[str, Any]:
    """A message as one JSON object: what every message has, and what its type has. Pictures in base64."""
    shown = " ".join(filter(None, (hook.message_prefix, message.text)))
    content: dict[str, Any] = {
        "type": message.kind,
        "severity": message.severity,
        "job_id": job,
        "timestamp": stamp,
        "title": message.title,
        "message": shown,
        **message.fields,
    }
    pictures = list(_read(message))
    if pictures:
        content["images"] = [b64encode(data).decode("ascii") for _, data in pictures]
        content["image_names"] = [picture.name for picture, _ in pictures]
    return {"json": content}


def _read(message: Message) -> Iterator[tuple[Attachment, bytes]]:
    """The pictures that are still there."""
    for picture in message.pictures:
        try:
            yield picture, picture.read()
        except OSError as error:
            log.debug("%s is not attached: %s", picture.name, error)


def _reason(error: Exception, pace: Pace) -> str:
    """Why a request failed, without its address."""
    import requests.exceptions as kinds

    if isinstance(error, kinds.SSLError):
        return "its certificate does not hold (ssl_no_verify takes any)"
    if isinstance(error, kinds.ConnectTimeout):
        return f"it took no connection for {pace.connect_s:g} s"
    if isinstance(error, kinds.Timeout):
        return f"it gave no answer for {pace.read_s:g} s"
    if isinstance(error, kinds.ProxyError):
        return "the proxy does not reach it"
    if isinstance(error, kinds.ConnectionError):
        return "it cannot be reached, or hung up"
    return type(error).__name__


def _judge(status: int, headers: Mapping[str, str]) -> None:
    """Raise Undelivered unless the answer says that all is well."""
    if 200 <= status < 300:
        return
    if status in _PASSING:
        raise Undelivered(f"it answered {status}", wait_s=asked_wait_s(headers.get("Retry-After")))
    if 300 <= status < 400:
        raise Undelivered(f"it answered {status}, that it has moved: name the new address", is_final=True)
    # Others, such as 413 for pictures that are too large, may be the fault of one message.
    raise Undelivered(f"it answered {status}", is_final=status in (401, 403, 404, 405, 410), again=False)


def asked_wait_s(header: str | None) -> float | None:
    """Seconds that a Retry-After header asks for: a number, or a date. None when it asks for nothing."""
    if not header:
        return None
    try:
        return max(0.0, float(header)) if math.isfinite(float(header)) else None
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):  # a date without a zone, or none at all
        return None


class Webhooks:
    """All webhooks of a run, each with a thread of its own; at the end they share one short while."""

    def __init__(self, hooks: Sequence[Webhook], run: str, job: str, pace: Pace = PACE):
        self._pace, self._sinks = pace, [WebhookSink(hook, run, job, pace) for hook in hooks]

    def emit(self, event: Event) -> None:
        """Queue it for each."""
        for sink in self._sinks:
            sink.emit(event)

    def close(self) -> None:
        """Send what waits everywhere, for a short while in all."""
        end_s = time.monotonic() + self._pace.flush_s
        for sink in self._sinks:
            sink.hurry()
        for sink in self._sinks:
            sink.finish(max(0.0, end_s - time.monotonic()))
