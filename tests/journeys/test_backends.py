"""Whole runs over pictures that are far away, from the command line: the same latents wherever the pictures are, little
asked of the network, and nothing lost when it fails.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from sana_tune.cli.main import exit_code
from sana_tune.config.load import Loaded
from sana_tune.data import remote, remote_http, remote_s3
from sana_tune.data.remote import Patience
from tests.data.pictures import encoded, noise, put
from tests.fake_http import FakeHttp
from tests.fake_s3 import SECRET, Answer, FakeS3, times
from tests.journeys.kit import cache_of, metrics_of, small_run

PICTURES = {f"cat {number}": encoded(noise(32, 32, number)) for number in range(5)}
HASTY = Patience(tries=2, first_wait_s=0.01, longest_wait_s=0.05, connect_s=2, read_s=2)


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_s3.S3Store.__init__, "__defaults__", (HASTY,))
    monkeypatch.setattr(remote_http.AddressStore.__init__, "__defaults__", (HASTY,))


@pytest.fixture(scope="module")
def running() -> Iterator[FakeS3]:
    with FakeS3() as store:
        yield store


@pytest.fixture
def s3(running: FakeS3) -> Iterator[FakeS3]:
    """A bucket with the pictures, their captions beside them."""
    running._reset()
    running.client.create_bucket(Bucket=running.bucket)
    for name, data in PICTURES.items():
        running.put(f"data/{name}.png", data)
        running.put(f"data/{name}.txt", name.encode())
    running.requests.clear()
    yield running
    running.troubles.clear()


@pytest.fixture
def web() -> Iterator[FakeHttp]:
    with FakeHttp({f"/{name.replace(' ', '_')}.png": data for name, data in PICTURES.items()}) as server:
        yield server


def local(folder: Path) -> dict[str, Any]:
    for number, name in enumerate(PICTURES):
        put(folder / "pictures", f"{name}.png", 32, 32, seed=number, caption=name)
    return {"instance_data_dir": str(folder / "pictures")}


def bucket(s3: FakeS3) -> dict[str, Any]:
    return {**s3.settings(), "aws_data_prefix": "data"}


def addresses(folder: Path, web: FakeHttp) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "pictures.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["url", "caption"])
        rows.writerows([web.url + path, path[1:-4].replace("_", " ")] for path in web.pages)
    kept = {"csv_file": str(folder / "pictures.csv"), "csv_cache_dir": str(folder / "kept")}
    return {"type": "csv", "caption_strategy": "csv", **kept}


def library(folder: Path) -> dict[str, Any]:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    kinds = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    rows = {"image": [{"bytes": data, "path": None} for data in PICTURES.values()], "caption": list(PICTURES)}
    datasets.Dataset.from_dict(rows, features=kinds).save_to_disk(folder / "saved")
    return {"type": "huggingface", "caption_strategy": "huggingface", "dataset_name": str(folder / "saved")}


def command(name: str, loaded: Loaded, *flags: str) -> int:
    return exit_code([name, "--config", str(loaded.path), *flags])


def warm(loaded: Loaded) -> int:
    """The pictures are read and encoded, and nothing is trained."""
    return exit_code(["cache", "warm", "--config", str(loaded.path)])


def ledger_of(folder: Path) -> Mapping[str, Any]:
    return json.loads((folder / "output" / "ledger.json").read_text(encoding="utf-8"))["datasets"][0]


def test_the_same_pictures_give_the_same_caches_wherever_they_are(tmp_path: Path, s3: FakeS3, web: FakeHttp):
    entries = {
        "local": local(tmp_path), "aws": bucket(s3), "csv": addresses(tmp_path, web), "hub": library(tmp_path)
    }  # fmt: skip
    caches = {}
    for name, entry in entries.items():
        loaded = small_run(tmp_path / name, entry, max_train_steps=1)
        assert command("check", loaded) == 0
        assert (command("train", loaded) if name == "hub" else warm(loaded)) == 0
        caches[name] = cache_of(tmp_path / name / "output" / "cache")
    assert len(metrics_of(tmp_path / "hub" / "output")) == 1 and ledger_of(tmp_path / "hub")["trained"] == 5
    assert len([key for key in caches["local"] if key.startswith("vae/")]) == 5
    assert all(each == caches["local"] for each in caches.values())


def test_a_second_run_reads_no_picture_of_a_bucket(tmp_path: Path, s3: FakeS3):
    loaded = small_run(tmp_path, bucket(s3), max_train_steps=1)
    assert warm(loaded) == 0
    s3.requests.clear()
    assert command("train", loaded) == 0
    assert s3.got() == [] and 0 < len(s3.requests) <= 3, "the listing says that nothing changed"
    s3.put("data/cat 1.png", encoded(noise(32, 32, 77)))
    assert warm(loaded) == 0
    assert set(s3.got()) == {"data/cat 1.png"}


def test_where_the_latents_of_a_bucket_go_is_the_users_choice(tmp_path: Path, s3: FakeS3):
    before = {entry["Key"] for entry in s3.client.list_objects_v2(Bucket=s3.bucket)["Contents"]}
    small = small_run(tmp_path, bucket(s3) | {"cache_dir_vae": str(tmp_path / "my latents")}, max_train_steps=1)
    assert command("train", small) == 0
    assert len(cache_of(tmp_path / "my latents")) == 5 and not (tmp_path / "output/cache/vae").exists()
    after = {entry["Key"] for entry in s3.client.list_objects_v2(Bucket=s3.bucket)["Contents"]}
    assert after == before and {method for method, *_ in s3.requests} <= {"GET", "HEAD"}, "nothing is written there"


def test_a_check_of_a_bucket_reads_headers_alone_and_shows_no_secret(tmp_path: Path, s3: FakeS3, capsys):
    s3.put("data/large.jpg", encoded(noise(900, 900), "JPEG", quality=100))
    loaded = small_run(tmp_path, bucket(s3) | {"missing_caption": "skip"})
    assert command("check", loaded) == 0
    said = capsys.readouterr()
    large = [wanted for _, path, wanted in s3.requests if path.endswith("large.jpg")]
    assert large == [f"bytes=0-{remote_s3.FIRST_BLOCK - 1}"]
    assert "Dataset d0  s3://pictures/data" in said.out and "6 pictures found = 5 trained + 1 left out" in said.out
    assert command("train", loaded, "--max_train_steps", "1") == 0
    written = "".join(path.read_text(errors="replace") for path in (tmp_path / "output").rglob("*.json*"))
    assert SECRET not in said.out + said.err + capsys.readouterr().err + written
    assert SECRET not in (tmp_path / "output" / "log.txt").read_text()


def test_left_out_pictures_of_a_bucket_are_listed_by_their_addresses(tmp_path: Path, s3: FakeS3, capsys):
    s3.put("data/torn.png", PICTURES["cat 0"][:-60])
    s3.put("data/none.png", b"")
    loaded = small_run(tmp_path, bucket(s3) | {"caption_strategy": "filename"})
    assert command("check", loaded, "--left-out", "--images") == 0
    assert capsys.readouterr().out.splitlines() == ["s3://pictures/data/none.png", "s3://pictures/data/torn.png"]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"aws_access_key_id": "AKIANOBODY"}, "the store does not know the access key"),
        ({"aws_bucket_name": "no-such-bucket"}, "the bucket no-such-bucket does not exist"),
        ({"aws_endpoint_url": "http://127.0.0.1:9"}, "does not answer as it should: no connection"),
        ({"aws_data_prefix": "dogs"}, "the bucket's folder holds no pictures"),
    ],
)
def test_a_bucket_that_cannot_be_read_is_told(tmp_path: Path, s3: FakeS3, changes: dict, words: str, capsys):
    loaded = small_run(tmp_path, bucket(s3) | changes)
    for name in ("check", "train"):
        assert command(name, loaded) == 1
        said = capsys.readouterr()
        text = " ".join((said.out + said.err).split())
        assert words in text and SECRET not in text and "Traceback" not in text


def test_a_store_that_stumbles_stops_nothing(tmp_path: Path, s3: FakeS3):
    s3.troubles.append(times(1, Answer(503, "SlowDown", "Please reduce your request rate.")))
    s3.troubles.append(times(1, Answer(cut=True), "cat%203.png"))
    s3.troubles.append(times(1, Answer(cut=True), "cat 3.png"))
    assert warm(small_run(tmp_path, bucket(s3))) == 0
    assert len(cache_of(tmp_path / "output" / "cache" / "vae")) == 5


def test_a_bucket_that_vanishes_while_caching_keeps_what_was_made(tmp_path: Path, s3: FakeS3, capsys):
    """No picture is left out for it, and the next start goes on."""
    loaded = small_run(tmp_path, bucket(s3) | {"vae_batch_size": 1, "write_batch_size": 1}, max_train_steps=1)
    read: list[str] = []

    def vanish(method: str, path: str) -> Answer | None:
        if path.endswith(".png"):
            read.append(path)
        return Answer(404, "NoSuchBucket", "The specified bucket does not exist") if len(read) > 8 else None

    s3.troubles.append(vanish)
    assert command("train", loaded) == 1
    assert "the bucket pictures was there and is gone now" in capsys.readouterr().err
    assert not (tmp_path / "output" / "metrics.jsonl").exists()
    kept = cache_of(tmp_path / "output" / "cache")
    s3.troubles.clear()
    assert warm(loaded) == 0
    whole = cache_of(tmp_path / "output" / "cache")
    assert len([key for key in whole if key.startswith("vae/")]) == 5 and kept.items() <= whole.items() and kept


def test_downloads_are_kept_when_a_server_goes_away(tmp_path: Path, web: FakeHttp, capsys):
    loaded = small_run(tmp_path, addresses(tmp_path, web), max_train_steps=1)
    for path in list(web.pages)[1:]:
        web.pages[path] = 503
    web.pages |= {f"/more_{number}.png": 503 for number in range(4)}
    addresses(tmp_path, web)
    assert command("train", loaded) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "gave pictures before and does not any more: the server says 503" in said and "next start goes on" in said
    for number, path in enumerate(web.pages):
        web.pages[path] = encoded(noise(32, 32, number))
    web.requests.clear()
    assert command("train", loaded) == 0
    assert len(web.asked()) == len(set(web.asked())) == 8, "the one that was there is not asked for again"
    assert ledger_of(tmp_path)["trained"] == 9


def test_a_table_of_captions_beside_a_bucket(tmp_path: Path, s3: FakeS3):
    rows = [{"id": name, "text": f"A {name}!", "w": 32, "h": 32} for name in PICTURES]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = {"path": str(tmp_path / "captions.jsonl"), "filename_column": "id", "caption_column": "text",
             "width_column": "w", "height_column": "h"}  # fmt: skip
    entry = bucket(s3) | {"caption_strategy": "parquet", "metadata_backend": "parquet", "parquet": table}
    loaded = small_run(tmp_path, entry, max_train_steps=1)
    assert command("check", loaded) == 0
    assert s3.got() == [], "sizes and captions are in the table: a check fetches no picture"
    assert warm(loaded) == 0 and len(cache_of(tmp_path / "output" / "cache" / "text")) == 6


def test_the_patience_of_these_tests_is_not_the_users():
    assert remote.PATIENCE.tries == 5 and HASTY.tries == 2
