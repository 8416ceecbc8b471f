"""Buckets, against a server that speaks S3's protocol, and that is slow, full, forbidding or gone."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
from collections.abc import Iterator

import pytest

from sana_tune.data import remote_s3
from sana_tune.data.images import measure
from sana_tune.data.remote import Patience
from sana_tune.data.remote_s3 import Place, S3Store
from sana_tune.errors import UserError
from sana_tune.store import StoreLost
from tests.data.pictures import encoded, noise
from tests.fake_s3 import KEY, SECRET, SLOW_DOWN, Answer, FakeS3, times

HASTY = Patience(tries=3, first_wait_s=0.01, longest_wait_s=0.05, connect_s=2, read_s=2)


@pytest.fixture(scope="module")
def running() -> Iterator[FakeS3]:
    with FakeS3() as store:
        yield store


@pytest.fixture
def s3(running: FakeS3) -> Iterator[FakeS3]:
    """The server with an empty bucket and without troubles."""
    running._reset()
    running.client.create_bucket(Bucket=running.bucket)
    running.requests.clear()
    yield running
    running.troubles.clear()


def store_of(s3: FakeS3, prefix: str = "", patience: Patience = HASTY, **changes) -> S3Store:
    place = Place(s3.bucket, prefix, s3.url, "us-east-1", KEY, SECRET)
    return S3Store(place._replace(**changes), patience)


def keys(store: S3Store) -> list[str]:
    return [entry.key for entry in store.list()]


def told(error: pytest.ExceptionInfo[UserError]) -> str:
    assert SECRET not in str(error.value) and KEY not in str(error.value)
    return str(error.value)


def test_lists_what_is_below_the_prefix_sorted_without_what_is_hidden(s3: FakeS3):
    for key in ("data/b.png", "data/a/c.txt", "data/.hidden/x.png", "data/._y.png", "data/sub/", "database/z.png"):
        s3.put(key, b"12345")
    store = store_of(s3, "/data/")
    assert keys(store) == ["a/c.txt", "b.png"]
    assert [entry.size_bytes for entry in store.list()] == [5, 5]
    assert store.locate("b.png") == "s3://pictures/data/b.png"
    assert keys(store_of(s3)) == ["data/a/c.txt", "data/b.png", "database/z.png"]


def test_a_listing_of_several_pages_is_whole(s3: FakeS3):
    for number in range(23):
        s3.put(f"{number:03}.png", b"x")
    found = [entry.key for page in store_of(s3)._pages(5) for entry in page]
    assert found == [f"{number:03}.png" for number in range(23)]
    assert len([path for _, path, _ in s3.requests if "list-type=2" in path]) == 5


def test_reads_and_opens_by_key_and_tells_what_is_not_there(s3: FakeS3):
    s3.put("häßlich & 100%/a b+c.png", b"bytes")
    store = store_of(s3)
    (key,) = keys(store)
    assert store.read(key) == b"bytes" and store.open(key).read() == b"bytes"
    assert store.exists(key) and not store.exists("nothing.png")
    assert store.entry(key) == next(iter(store.list()))
    with pytest.raises(UserError, match=r"s3://pictures/nothing\.png: is not there any more") as error:
        store.read("nothing.png")
    assert not isinstance(error.value, StoreLost)


def test_objects_of_several_parts_are_read_whole(s3: FakeS3):
    parts = [bytes([number]) * (5 << 20) for number in range(2)] + [b"end"]
    s3.put_in_parts("big.png", parts)
    store = store_of(s3)
    (entry,) = store.list()
    assert entry.size_bytes == (10 << 20) + 3
    assert hashlib.sha256(store.read("big.png")).digest() == hashlib.sha256(b"".join(parts)).digest()


def test_the_mark_of_an_entry_follows_the_content(s3: FakeS3):
    s3.put("a.png", b"one")
    store = store_of(s3)
    first = store.entry("a.png")
    s3.put("a.png", b"one")
    assert store.entry("a.png") == first, "written again as it was"
    s3.put("a.png", b"two")
    changed = store.entry("a.png")
    assert changed.size_bytes == first.size_bytes and changed.mtime_ns != first.mtime_ns
    assert 0 <= changed.mtime_ns < 2**63


def test_a_header_costs_one_small_request(s3: FakeS3):
    picture = noise(800, 600)
    for key, format in (("a.jpg", "JPEG"), ("b.bmp", "BMP"), ("c.webp", "WEBP")):
        s3.put(key, encoded(picture, format, quality=100))
    store = store_of(s3)
    list(store.list())
    s3.requests.clear()
    for key in ("a.jpg", "b.bmp"):
        with store.open(key) as file:
            assert measure(file) == (800, 600)
    assert [wanted for _, _, wanted in s3.requests] == [f"bytes=0-{remote_s3.FIRST_BLOCK - 1}"] * 2


def test_reading_on_takes_few_requests_and_each_byte_once(s3: FakeS3):
    data = bytes(range(256)) * 4000
    s3.put("a.bin", data)
    file = store_of(s3).open("a.bin")
    s3.requests.clear()
    for place in range(0, len(data), 1000):
        file.seek(place)
        assert file.read(8) == data[place : place + 8]
    assert len(s3.requests) <= 6
    file.seek(-5, io.SEEK_END)
    assert file.tell() == len(data) - 5 and file.read() == data[-5:] and file.read() == b""
    assert file.seek(10) == 10 and io.BufferedReader(file).read(3) == data[10:13]  # type: ignore[arg-type]


# ---- troubles ----


@pytest.mark.parametrize(
    "trouble",
    [Answer(*SLOW_DOWN), Answer(500, "InternalError", "We encountered an internal error."), Answer(cut=True),
     Answer(502, "", "")],
    ids=["slow down", "internal error", "cut", "no body"],
)  # fmt: skip
def test_a_second_try_helps(s3: FakeS3, trouble: Answer):
    data = b"x" * 5000
    s3.put("a.png", data)
    store = store_of(s3)
    s3.troubles.append(times(2, trouble, "a.png"))
    assert store.read("a.png") == data
    assert len(s3.requests) == 3


def test_a_listing_that_stumbles_is_tried_again(s3: FakeS3):
    s3.put("a.png", b"x")
    s3.troubles.append(times(1, Answer(*SLOW_DOWN)))
    assert keys(store_of(s3)) == ["a.png"]


def test_one_object_that_cannot_be_had_is_told_and_the_rest_goes_on(s3: FakeS3):
    s3.put("a.png", b"x")
    store = store_of(s3)
    s3.troubles.append(times(99, Answer(500, "InternalError", "broken"), "a.png"))
    with pytest.raises(UserError, match=r"a\.png: cannot be read: it says InternalError: broken \(tried 3") as error:
        store.read("a.png")
    assert not isinstance(error.value, StoreLost)


def test_slow_answers_are_waited_for_and_then_given_up(s3: FakeS3):
    s3.put("a.png", b"x")
    store = store_of(s3, patience=Patience(tries=2, first_wait_s=0.01, connect_s=2, read_s=0.8))
    s3.troubles.append(times(1, Answer(late_s=0.1)))
    assert store.read("a.png") == b"x" and len(s3.requests) == 1, "slow is no failure"
    s3.troubles[:] = [times(1, Answer(late_s=1.6))]
    assert store.read("a.png") == b"x" and len(s3.requests) == 3
    s3.troubles[:] = [times(9, Answer(late_s=1.6))]
    with pytest.raises(StoreLost, match=r"does not answer as it should: no answer in time \(tried 2 times\)"):
        store.read("a.png")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"key": "AKIANOBODY", "secret": "x"}, "the store does not know the access key (InvalidAccessKeyId)"),
        ({"bucket": "no-such-bucket"}, "the bucket no-such-bucket does not exist at http://127.0.0.1"),
        ({"endpoint": "http://127.0.0.1:9"}, "does not answer as it should: no connection (tried 3 times)"),
    ],
)
def test_a_store_that_cannot_be_used_is_told(s3: FakeS3, changes: dict, words: str):
    for ask in (lambda store: store.check(), lambda store: list(store.list()), lambda store: store.read("a.png")):
        with pytest.raises(StoreLost) as error:
            ask(store_of(s3, **changes))
        assert words in told(error)


def test_a_secret_key_that_does_not_fit_and_a_bucket_that_is_closed(s3: FakeS3):
    s3.troubles.append(times(1, Answer(403, "SignatureDoesNotMatch", "The request signature …")))
    with pytest.raises(StoreLost, match="the secret key does not fit the access key"):
        store_of(s3).check()
    s3.troubles[:] = [times(1, Answer(403, "AccessDenied", "Access Denied"))]
    with pytest.raises(StoreLost, match="these keys may not read the bucket"):
        store_of(s3).check()


def test_one_object_that_may_not_be_read_stops_nothing(s3: FakeS3):
    s3.put("a.png", b"x")
    store = store_of(s3)
    list(store.list())
    s3.troubles.append(times(1, Answer(403, "AccessDenied", "Access Denied"), "a.png"))
    with pytest.raises(UserError, match="may not be read with these keys") as error:
        store.read("a.png")
    assert not isinstance(error.value, StoreLost)


def test_without_keys_the_environments_are_taken_and_without_any_none(s3: FakeS3, monkeypatch, tmp_path):
    s3.put("a.png", b"x")
    for name in ("AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / name))
    with pytest.raises(StoreLost, match="no keys are set, none were found in the environment"):
        store_of(s3, key=None, secret=None).check()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    assert keys(store_of(s3, key=None, secret=None)) == ["a.png"]
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(UserError, match=r"the environment's credentials cannot be used: .*nobody"):
        store_of(s3, key=None, secret=None).check()


def test_a_bucket_that_vanishes_is_told_as_such(s3: FakeS3):
    s3.put("a.png", b"x")
    store = store_of(s3)
    assert keys(store) == ["a.png"]
    s3.client.delete_object(Bucket=s3.bucket, Key="a.png")
    s3.client.delete_bucket(Bucket=s3.bucket)
    with pytest.raises(StoreLost, match="the bucket pictures was there and is gone now"):
        store.read("a.png")


def test_without_s3fs_the_extra_is_named():
    code = (
        "import sys; sys.modules['s3fs'] = None\n"
        "from sana_tune.data.remote_s3 import Place, S3Store\n"
        "from sana_tune.errors import UserError\n"
        "try: S3Store(Place('b')).check()\n"
        "except UserError as error: print(error)\n"
        "print('torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "type aws needs s3fs" in ran.stdout and "pip install '.[s3]'" in ran.stdout, ran.stderr
    assert ran.stdout.endswith("False\n")
