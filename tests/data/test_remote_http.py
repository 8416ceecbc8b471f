"""Downloads, from a server that misbehaves: what is kept is sound, what cannot be had is told, nothing comes twice."""

from __future__ import annotations

import csv
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sana_tune.config.secrets import MASK
from sana_tune.data import remote_http
from sana_tune.data.remote import Patience
from sana_tune.data.remote_http import AddressStore, key_of, shown
from sana_tune.errors import UserError
from sana_tune.store import StoreLost
from tests.data.pictures import encoded, noise
from tests.fake_http import FakeHttp, Moody

HASTY = Patience(tries=3, first_wait_s=0.01, longest_wait_s=0.05, connect_s=2, read_s=2)
PICTURE = encoded(noise(60, 40))
HTML = b"<!DOCTYPE html><title>Sorry</title>"


@pytest.fixture
def web() -> Iterator[FakeHttp]:
    with FakeHttp() as server:
        yield server


def store_of(folder: Path, urls: list[str], captions: list[str] | None = None, patience: Patience = HASTY):
    path = folder / "pictures.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["url", "caption"])
        writer.writerows(zip(urls, captions or ["a cat"] * len(urls), strict=True))
    return AddressStore(str(path), str(folder / "kept"), "url", "caption", patience)


def one(folder: Path, web: FakeHttp, page, path: str = "/a.png", patience: Patience = HASTY) -> bytes:
    """What a page gives."""
    web.pages[path] = page
    store = store_of(folder, [web.url + path], patience=patience)
    ((key, *_),) = store.list()
    return store.read(key)


def refused(folder: Path, web: FakeHttp, page) -> str:
    with pytest.raises(UserError) as error:
        one(folder, web, page)
    assert not isinstance(error.value, StoreLost)
    assert not list((folder / "kept").rglob("*.*")), "nothing is kept of what is no picture"
    return error.value.problems[0].what


def test_each_address_is_downloaded_once_and_kept(tmp_path: Path, web: FakeHttp):
    web.pages = {"/cats/a.png": PICTURE, "/b%20c.png": PICTURE}
    urls = [f"{web.url}/cats/a.png", f"{web.url}/b c.png"]
    store = store_of(tmp_path, urls)
    assert [(entry.key, entry.size_bytes) for entry in store.list()] == [
        ("127.0.0.1/b c.png", -1),
        ("127.0.0.1/cats/a.png", -1),
    ]
    assert not web.requests, "a list asks no server"
    assert store.read("127.0.0.1/b c.png") == store.read("127.0.0.1/cats/a.png") == PICTURE
    with store.open("127.0.0.1/b c.png") as file:
        assert file.read() == PICTURE
    again = store_of(tmp_path, urls)
    assert again.read("127.0.0.1/cats/a.png") == PICTURE and len(web.requests) == 2
    entry = again.entry("127.0.0.1/cats/a.png")
    assert entry.size_bytes == len(PICTURE) and entry == store.entry(entry.key) and again.exists(entry.key)
    assert again.locate(entry.key) == urls[0]
    with pytest.raises(UserError, match="is no address of the table"):
        again.read("127.0.0.1/other.png")


def test_rows_of_one_address_are_one_picture_and_bad_rows_are_told(tmp_path: Path, web: FakeHttp):
    web.pages = {"/a.png": PICTURE}
    urls = [f"{web.url}/a.png", "", f" {web.url}/a.png ", "cat.png", "ftp://x/y.png", "http://[::1/x.png"]
    store = store_of(tmp_path, urls, ["one", "none", "two", "none", "none", "none"])
    assert [entry.key for entry in store.list()] == ["127.0.0.1/a.png", "row 2", "row 4", "row 5", "row 6"]
    assert store.captions().texts == {"127.0.0.1/a.png": ("one", "two")}
    for key, words in (
        ("row 2", "has no address"),
        ("row 4", r"has no address that begins with http:// or https:// \(found 'cat.png'\)"),
    ):
        with pytest.raises(UserError, match=f"pictures.csv: {key}: {words}"):
            store.read(key)
    assert not web.requests


def test_keys_tell_addresses_apart_and_read_well():
    assert key_of("https://x.org/a/my%20cat.jpg") == "x.org/a/my cat.jpg"
    assert key_of("https://x.org/../a//b.jpg") == "x.org/a/b.jpg" and key_of("https://x.org/") == "x.org/picture"
    one, other = key_of("https://x.org/get?id=1"), key_of("https://x.org/get?id=2")
    assert one != other and one.endswith("/get") and one.startswith("x.org/")
    assert key_of("http://x.org/%2e%2e%2fetc%00.png") == "x.org/.._etc_.png"


def test_addresses_with_the_same_key_are_both_kept(tmp_path: Path, web: FakeHttp):
    web.pages = {"/a.png": PICTURE}
    store = store_of(tmp_path, [f"{web.url}/a.png", web.url.replace("http://", "http://me:pw@") + "/a.png"])
    first, second = [entry.key for entry in store.list()]
    assert first != second and first.endswith("/a.png") and second.endswith("/a.png")
    assert {store.read(first), store.read(second)} == {PICTURE}
    assert web.logins == ["Basic bWU6cHc="] and "pw" not in store.locate(first) + store.locate(second)


def test_secrets_of_addresses_are_not_shown():
    url = "https://me:pw@x.org/a.png?X-Amz-Signature=abc&w=5&sig=d&Key-Pair-Id=e&token=f&flag#g"
    assert (
        shown(url) == f"https://x.org/a.png?X-Amz-Signature={MASK}&w=5&sig={MASK}&Key-Pair-Id={MASK}&token={MASK}&flag"
    )


# ---- troubles ----


@pytest.mark.parametrize(
    "page, words",
    [
        (404, r"the server says 404 \(Not Found\)"),
        (403, "the server says 403"),
        (Moody(HTML), "is a web page"),
        (Moody(PICTURE, length=False, status=410), "the server says 410"),
        (Moody(), "the server sent nothing"),
        (b"nothing of the kind", "is not a picture that can be read"),
        (PICTURE[:-30], "what the server sent "),
    ],
)
def test_what_is_no_picture_is_refused_at_once(tmp_path: Path, web: FakeHttp, page, words: str):
    import re

    assert re.search(f"cannot be downloaded: .*{words}", refused(tmp_path, web, page))
    assert len(web.requests) == 1, "it is not asked for again"


@pytest.mark.parametrize(
    "trouble",
    [503, 500, 429, 408, Moody(PICTURE, cut=0), Moody(PICTURE, cut=300), Moody(PICTURE, cut=300, ranges=False),
     Moody(PICTURE[:-50], length=False)],
    ids=["busy", "error", "too many", "timeout", "cut at once", "cut", "cut without ranges", "short of unknown length"],
)  # fmt: skip
def test_a_second_try_helps(tmp_path: Path, web: FakeHttp, trouble):
    assert one(tmp_path, web, [trouble, PICTURE]) == PICTURE
    assert len(web.requests) == 2


def test_a_download_goes_on_where_it_broke_off(tmp_path: Path, web: FakeHttp):
    cut = Moody(PICTURE, cut=300)
    assert one(tmp_path, web, [cut, cut, PICTURE]) == PICTURE
    assert [wanted for _, wanted in web.requests] == ["", "bytes=300-", "bytes=600-"]
    web.requests.clear()
    strange = Moody(PICTURE, wrong_range=True)
    assert one(tmp_path, web, [cut, strange, PICTURE], "/b.png") == PICTURE
    assert [wanted for _, wanted in web.requests] == ["", "bytes=300-", ""], "another part than asked for: anew"
    web.requests.clear()
    weak = Moody(PICTURE, cut=300, headers=(("ETag", 'W/"x"'),), ranges=False)
    assert one(tmp_path, web, [weak, PICTURE], "/c.png") == PICTURE
    assert [wanted for _, wanted in web.requests] == ["", ""], "nothing says that it is the same picture still"


def test_a_server_that_asks_for_patience_gets_it(tmp_path: Path, web: FakeHttp):
    begun = time.monotonic()
    patience = Patience(tries=3, first_wait_s=0.01, longest_wait_s=5)
    assert (
        one(tmp_path, web, [Moody(status=429, headers=(("Retry-After", "1"),)), PICTURE], patience=patience) == PICTURE
    )
    assert time.monotonic() - begun >= 1
    begun = time.monotonic()
    busy = Moody(status=503, headers=(("Retry-After", "900"),))
    assert "and asks for 900 s of patience" in refused(tmp_path / "x", web, busy)
    assert time.monotonic() - begun < 5, "that is more than there is"


def test_slow_answers_are_waited_for_and_then_given_up(tmp_path: Path, web: FakeHttp):
    patience = Patience(tries=2, first_wait_s=0.01, read_s=0.8)
    assert one(tmp_path, web, [Moody(PICTURE, late_s=0.1)], patience=patience) == PICTURE and len(web.requests) == 1
    with pytest.raises(UserError, match=r"no answer in time \(tried 2 times\)"):
        one(tmp_path, web, [Moody(PICTURE, late_s=5)], "/slow.png", patience)


def test_redirects_are_followed_but_not_in_circles_nor_into_files(tmp_path: Path, web: FakeHttp):
    web.pages["/there.png"] = PICTURE
    assert one(tmp_path, web, Moody(to="/there.png")) == PICTURE
    assert "infinite loop" in refused(tmp_path / "x", web, Moody(to="/a.png"))
    (tmp_path / "secret.png").write_bytes(PICTURE)
    assert "file" in refused(tmp_path / "y", web, Moody(to=f"file://{tmp_path}/secret.png"))


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()


def test_few_requests_at_once(tmp_path: Path, web: FakeHttp):
    web.pages = {f"/{number}.png": Moody(PICTURE, late_s=0.05) for number in range(20)}
    store = store_of(tmp_path, [web.url + path for path in web.pages])
    with ThreadPoolExecutor(16) as workers:
        assert set(workers.map(store.read, [entry.key for entry in store.list()])) == {PICTURE}
    assert 2 <= web.most <= remote_http.AT_ONCE


def test_a_dead_server_is_asked_no_more_and_others_go_on(tmp_path: Path, web: FakeHttp):
    web.pages["/a.png"] = PICTURE
    dead = [f"http://127.0.0.1:9/{number}.png" for number in range(9)]
    store = store_of(tmp_path, [*dead, f"{web.url}/a.png"])
    begun = time.monotonic()
    for entry in store.list():
        if entry.key == "127.0.0.1/a.png":
            assert store.read(entry.key) == PICTURE
            continue
        with pytest.raises(UserError, match="cannot be downloaded: no connection") as error:
            store.read(entry.key)
        assert not isinstance(error.value, StoreLost)
    assert time.monotonic() - begun < 5


def test_a_server_that_goes_away_stops_the_run(tmp_path: Path, web: FakeHttp):
    """Not one picture after the other is left out because of a network that is down."""
    web.pages = {f"/{number}.png": PICTURE for number in range(9)}
    urls = [web.url + path for path in web.pages]
    store = store_of(tmp_path, urls)
    keys = [entry.key for entry in store.list()]
    store.read(keys[0])
    web.stop()
    for again in (store, store_of(tmp_path, urls)):  # the second one knows by what is kept
        told = []
        for key in keys[1:4]:
            with pytest.raises(UserError) as error:
                again.read(key)
            told.append(error.value)
        assert [isinstance(each, StoreLost) for each in told] == [False, False, True]
        assert "gave pictures before and does not any more: no connection" in str(told[-1])
        assert again.read(keys[0]) == PICTURE


def test_a_full_or_forbidden_folder_stops_the_run(tmp_path: Path, web: FakeHttp):
    (tmp_path / "kept").write_text("a file in the way")
    with pytest.raises(StoreLost, match="cannot be"):
        one(tmp_path, web, PICTURE)


def test_a_table_without_the_columns_is_told(tmp_path: Path):
    store = store_of(tmp_path, [])
    store.check()
    wrong = AddressStore(str(tmp_path / "pictures.csv"), "kept", "urls", "text")
    with pytest.raises(UserError, match="no column urls; it has url, caption"):
        wrong.check()
    with pytest.raises(UserError, match="no column text"):
        AddressStore(str(tmp_path / "pictures.csv"), "kept", "url", "text").captions()
