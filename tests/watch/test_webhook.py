"""Webhooks against a real server: what arrives, and that slow, broken and absent ones cost a run nothing."""

from __future__ import annotations

import json
import time
import warnings
from base64 import b64decode
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest

from sana_tune.config.watching import Webhook
from sana_tune.progress import Progress
from sana_tune.watch.events import (
    Event,
    Failed,
    Finished,
    Noticed,
    Previewed,
    Saved,
    Started,
    Stepped,
    Validated,
)
from sana_tune.watch.webhook import Pace, Webhooks, WebhookSink, asked_wait_s
from tests.fake_http import FakeHttp, Moody

FAST = Pace(connect_s=3.0, read_s=3.0, waits_s=(0.01, 0.02), longest_s=1.0, rest_s=0.05, flush_s=9.0, status_s=0.0)
SECRET = "s3cr3t-t0k3n"
OK = Moody(b"{}")


def raw(server: FakeHttp, **more: object) -> Webhook:
    return Webhook("raw", f"{server.url}/hook/{SECRET}", **more)  # type: ignore[arg-type]


def discord(server: FakeHttp, **more: object) -> Webhook:
    return Webhook("discord", f"{server.url}/hook/{SECRET}", **more)  # type: ignore[arg-type]


def stepped(step: int) -> Stepped:
    return Stepped(Progress(step, step / 10, 4 * step), 0.5, 1e-5, 0.25, 0.5, 0.0, 4)


def send(hook: Webhook, *events: Event, pace: Pace = FAST) -> float:
    """A whole run of these events. The seconds that they took on this thread, the close left out."""
    sink = WebhookSink(hook, "dog", "job-1", pace)
    begin = time.perf_counter()
    for event in events:
        sink.emit(event)
    took_s = time.perf_counter() - begin
    sink.close()
    return took_s


def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture
def server():
    with FakeHttp({f"/hook/{SECRET}": OK}) as found:
        yield found


START, DONE = Started(Progress(), 20, 10.0), Progress(20, 2.0, 80)


def test_raw_messages_are_json_with_the_token_in_a_header(server: FakeHttp, tmp_path: Path):
    picture = tmp_path / "step_20_zib_0_64x64.png"
    picture.write_bytes(b"\x89PNG picture")
    events = (START, stepped(1), Saved(DONE, "o/checkpoint-20", 1.0), Validated(DONE, (str(picture),)), Finished(DONE))
    send(raw(server, message_prefix="[dog]", auth_token="k3y"), *events)
    bodies = [post.json() for post in server.posts]
    assert [body["type"] for body in bodies] == [
        *("notification", "training.status", "training.status", "training.checkpoint"),
        *("lifecycle.stage", "training.status", "lifecycle.stage"),
    ]
    assert {post.headers["X-API-Key"] for post in server.posts} == {"k3y"}
    assert {post.headers["Content-Type"] for post in server.posts} == {"application/json"}
    for body in bodies:
        assert {"type", "severity", "job_id", "timestamp", "title", "message"} <= set(body)
        assert body["job_id"] == "job-1" and body["message"].startswith("[dog] ")
        assert abs(datetime.fromisoformat(body["timestamp"]) - datetime.now(UTC)) < timedelta(minutes=1)
    assert "Messages of the run dog come here" in bodies[0]["message"], "a test message comes first"
    drawn = bodies[4]
    assert [b64decode(image) for image in drawn["images"]] == [b"\x89PNG picture"]
    assert drawn["image_names"] == [picture.name]


def test_discord_gets_words_and_pictures_in_tens_and_nobody_is_pinged(server: FakeHttp, tmp_path: Path):
    files = []
    for number in range(12):
        path = tmp_path / f"step_20_p{number}_0_64x64.png"
        path.write_bytes(b"picture %d" % number)
        files.append(str(path))
    (tmp_path / "step_20_p11_0_64x64.png").unlink()
    preview = Previewed(DONE, "zib", 5, 20, b"half done")
    send(discord(server, message_prefix="@everyone"), START, stepped(1), Validated(DONE, tuple(files)), preview)
    greeting, started, first, second, shown = server.posts
    assert greeting.json()["content"].startswith("@everyone Messages of the run dog")
    assert started.json() == {
        "content": "@everyone Training: starting, to step 20 (2 epochs)",
        "allowed_mentions": {"parse": []},
    }
    parts = first.form()
    assert json.loads(parts.pop("payload_json"))["content"].startswith("@everyone Drew 12 pictures at step 20")
    assert parts == {f"files[{number}]": b"picture %d" % number for number in range(10)}
    assert set(second.form()) == {"payload_json", "files[0]"}, "the last one is gone, and the others arrive"
    assert shown.form()["files[0]"] == b"half done"


def test_a_long_text_is_cut_to_what_discord_takes(server: FakeHttp):
    send(discord(server), Noticed(DONE, "x" * 5000))
    assert len(server.posts[-1].json()["content"]) == 2000


@pytest.mark.parametrize(("level", "count"), [("debug", 4), ("info", 4), ("warning", 2), ("error", 1), ("critical", 0)])
def test_the_log_level_chooses(server: FakeHttp, level: str, count: int):
    send(discord(server, log_level=level), START, Noticed(DONE, "hm"), Failed("no room"))
    # The greeting comes whatever the level is: it is the test that messages arrive.
    assert len(server.posts) == count + (level not in ("debug", "info"))


def test_a_slow_server_costs_the_run_nothing(server: FakeHttp):
    server.pages[f"/hook/{SECRET}"] = Moody(b"{}", late_s=0.2)
    pace = Pace(read_s=5.0, status_s=0.0)
    took_s = send(raw(server), START, *(stepped(step) for step in range(1, 201)), Finished(DONE), pace=pace)
    assert took_s < 0.5, "200 steps, while the server takes 0.2 s for each message"
    kinds = [post.json()["type"] for post in server.posts]
    assert kinds.count("training.status") <= 20, "of those that wait only the newest is sent"
    assert kinds[-1] == "lifecycle.stage" and server.posts[-2].json()["data"]["status"] == "completed"


def test_the_wait_that_a_server_asks_for_is_kept(server: FakeHttp, caplog):
    busy = Moody(status=429, headers=(("Retry-After", "0.3"),))
    server.pages[f"/hook/{SECRET}"] = [busy, OK]
    begin = time.monotonic()
    sink = WebhookSink(discord(server), "dog", "job", FAST)
    until(lambda: len(server.posts) == 2)
    assert time.monotonic() - begin >= 0.3
    sink.close()
    assert server.posts[0].body == server.posts[1].body and not caplog.records


def test_errors_of_a_server_are_tried_again_then_told_once_and_then_it_is_silent(server: FakeHttp, caplog):
    server.pages[f"/hook/{SECRET}"] = 500
    sink = WebhookSink(raw(server), "dog", "job", FAST)
    until(lambda: len(caplog.records) == 1)
    assert len(server.posts) == 3, "the greeting, tried three times"
    for _ in range(5):
        sink.emit(Noticed(DONE, "hm"))
        time.sleep(0.03)
    sink.close()
    (record,) = caplog.records
    assert "it answered 500; messages are lost until it takes them again" in record.message
    assert len(server.posts) <= 3 + 5, "one try each, now and then"


def test_a_server_that_comes_back_is_used_again(server: FakeHttp, caplog):
    caplog.set_level("INFO")
    server.pages[f"/hook/{SECRET}"] = [503, 503, 503, OK]
    sink = WebhookSink(raw(server), "dog", "job", FAST)
    until(lambda: len(caplog.records) == 1)
    time.sleep(FAST.rest_s)
    sink.emit(Saved(DONE, "o/checkpoint-20", 1.0))
    until(lambda: len(caplog.records) == 2)
    sink.close()
    assert server.posts[-1].json()["type"] == "training.checkpoint"
    assert "takes messages again" in caplog.records[1].message


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (401, "it answered 401; no more is sent"),
        (404, "it answered 404; no more is sent"),
        (Moody(status=302, to="http://localhost:1/elsewhere"), "has moved: name the new address; no more is sent"),
    ],
)
def test_what_will_not_change_is_not_tried_again(server: FakeHttp, caplog, answer: object, reason: str):
    server.pages[f"/hook/{SECRET}"] = answer
    sink = WebhookSink(raw(server, auth_token="k3y"), "dog", "job", FAST)
    until(lambda: len(caplog.records) == 1)
    sink.emit(Saved(DONE, "o/checkpoint-20", 1.0))
    sink.close()
    assert len(server.posts) == 1 and reason in caplog.records[0].message


def test_a_message_that_is_too_large_costs_only_itself(server: FakeHttp, caplog):
    server.pages[f"/hook/{SECRET}"] = [OK, 413, OK]
    send(raw(server), Noticed(DONE, "large"), Noticed(DONE, "small"))
    assert [post.json()["message"] for post in server.posts[1:]] == ["large", "small"]
    assert sum("it answered 413" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("mood", ["hangs", "absent"])
def test_a_server_that_hangs_or_is_not_there_neither_blocks_nor_stops_anything(mood: str, caplog):
    with FakeHttp({f"/hook/{SECRET}": Moody(b"{}", late_s=30.0)}) as server:
        hook = raw(server, auth_token="k3y")
        if mood == "absent":
            server.stop()
        pace = Pace(connect_s=0.2, read_s=0.2, waits_s=(0.01,), rest_s=60.0, flush_s=1.5)
        begin = time.monotonic()
        took_s = send(hook, START, *(stepped(step) for step in range(1, 101)), Finished(DONE), pace=pace)
        assert took_s < 5 and time.monotonic() - begin < 10
        (record,) = caplog.records
        said = "gave no answer for 0.2 s" if mood == "hangs" else "cannot be reached, or hung up"
        assert said in record.message


def test_the_end_waits_a_short_while_alone():
    with FakeHttp({f"/hook/{SECRET}": Moody(b"{}", late_s=30.0)}) as server:
        begin = time.monotonic()
        send(raw(server), START, pace=Pace(read_s=30.0, flush_s=0.3))
        assert 0.25 < time.monotonic() - begin < 10


@pytest.mark.parametrize("answer", [500, 404, Moody(b"{}", late_s=30.0)])
def test_no_secret_is_told(server: FakeHttp, caplog, answer: object):
    caplog.set_level("DEBUG", "sana_tune")
    server.pages[f"/hook/{SECRET}"] = answer
    hook = raw(server, auth_token=SECRET)
    pace = replace(FAST, read_s=0.2)
    send(hook, START, Finished(DONE), pace=pace)
    server.stop()
    send(hook, START, Finished(DONE), pace=pace)
    assert caplog.records
    said = "\n".join(record.getMessage() + (record.exc_text or "") for record in caplog.records)
    assert SECRET not in said and SECRET not in repr(hook) and "/hook/" not in said
    assert f"raw webhook at {server.host}" in said


@pytest.fixture
def secured(server: FakeHttp, tmp_path: Path) -> FakeHttp:
    """The server behind TLS, with a certificate that it signed itself."""
    import ssl

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    made = made.serial_number(1).not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    file = tmp_path / "server.pem"
    file.write_bytes(private + made.sign(key, hashes.SHA256()).public_bytes(pem))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    server.server.socket = context.wrap_socket(server.server.socket, server_side=True)
    return server


def test_a_certificate_of_ones_own_is_taken_when_asked_for_alone(secured: FakeHttp, caplog):
    address = f"https://127.0.0.1:{secured.server.server_port}/hook/{SECRET}"
    send(Webhook("raw", address), START)
    assert secured.posts == [] and "its certificate does not hold" in caplog.records[0].message
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        send(Webhook("raw", address, ssl_no_verify=True), START)
    assert [post.json()["type"] for post in secured.posts] == ["notification", "training.status"]


def test_several_webhooks_hinder_each_other_neither_on_the_way_nor_at_the_end(server: FakeHttp):
    server.pages["/hang"] = Moody(b"{}", late_s=30.0)
    hanging = Webhook("raw", f"{server.url}/hang")
    pace = Pace(read_s=30.0, flush_s=0.4)
    sinks = Webhooks((hanging, raw(server), hanging, discord(server)), "dog", "job", pace)
    sinks.emit(START)
    begin = time.monotonic()
    sinks.close()
    assert time.monotonic() - begin < 10
    taken = [post for post in server.posts if post.path != "/hang"]
    assert sorted("content" in post.json() for post in taken) == [False, False, True, True]


def test_waits_that_are_asked_for():
    assert asked_wait_s("2.5") == 2.5 and asked_wait_s(None) is None and asked_wait_s("soon") is None
    in_ten_s = format_datetime(datetime.now(UTC) + timedelta(seconds=10), usegmt=True)
    assert 8 < (asked_wait_s(in_ten_s) or 0) <= 10
    assert asked_wait_s("inf") is None and asked_wait_s("-3") == 0.0
    assert asked_wait_s("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
