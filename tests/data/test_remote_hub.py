"""Datasets of the Hugging Face library: saved to disk, as files in a folder, and on a hub of our own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sana_tune.config.sources import HubOptions
from sana_tune.data.remote_hub import HubStore
from sana_tune.errors import UserError
from sana_tune.store import StoreLost
from tests.data.pictures import encoded, noise
from tests.fake_hub import FakeHub

datasets = pytest.importorskip("datasets")
PICTURES = [encoded(noise(40, 30, number)) for number in range(4)]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_cache")


def rows(**columns: list[Any]) -> Any:
    """A dataset of four pictures."""
    content = {
        "image": [{"bytes": data, "path": f"{number}.png"} for number, data in enumerate(PICTURES)],
        "caption": ["one", "", "three", "four"],
        "tags": [["a", "b"], [], ["c"], ["d"]],
    }
    kinds = {
        "image": datasets.Image(), "caption": datasets.Value("string"),
        "tags": datasets.List(datasets.Value("string")),
    }  # fmt: skip
    return datasets.Dataset.from_dict(content, features=datasets.Features(kinds))


def keys(store: HubStore) -> list[str]:
    return [entry.key for entry in store.list()]


def read_all(store: HubStore) -> list[bytes]:
    return [store.read(key) for key in keys(store)]


def test_a_dataset_saved_to_disk(tmp_path: Path):
    rows().save_to_disk(tmp_path / "saved")
    store = HubStore(str(tmp_path / "saved"))
    store.check()
    assert keys(store) == ["000000000", "000000001", "000000002", "000000003"]
    assert read_all(store) == PICTURES, "bytes as they are, nothing decoded and encoded again"
    assert store.open("000000002").read() == PICTURES[2]
    assert store.exists("000000003") and not store.exists("000000004") and not store.exists("x")
    assert store.captions().texts == {
        "000000000": ("one",), "000000001": (), "000000002": ("three",), "000000003": ("four",)
    }  # fmt: skip
    lists = HubStore(str(tmp_path / "saved"), caption_column="tags").captions()
    assert lists.texts["000000000"] == ("a", "b") and lists.texts["000000001"] == ()
    assert store.locate("000000002") == f"{tmp_path}/saved: train: row 000000002"
    with pytest.raises(UserError, match="is no row: there are 4"):
        store.read("000000009")


def test_splits_of_a_saved_dataset(tmp_path: Path):
    whole = rows()
    datasets.DatasetDict({"train": whole.select([0, 1]), "held": whole.select([3])}).save_to_disk(tmp_path / "saved")
    assert read_all(HubStore(str(tmp_path / "saved"))) == PICTURES[:2]
    assert read_all(HubStore(str(tmp_path / "saved"), "held")) == PICTURES[3:]
    with pytest.raises(UserError, match="has no split test; it has held, train"):
        keys(HubStore(str(tmp_path / "saved"), "test"))
    whole.save_to_disk(tmp_path / "one")
    with pytest.raises(UserError, match="has no split test; it has train"):
        keys(HubStore(str(tmp_path / "one"), "test"))


def test_rows_that_were_selected_or_shuffled(tmp_path: Path):
    rows().select([3, 1]).save_to_disk(tmp_path / "saved")
    store = HubStore(str(tmp_path / "saved"))
    assert read_all(store) == [PICTURES[3], PICTURES[1]] and store.captions().texts["000000000"] == ("four",)


def test_a_folder_of_parquet_files(tmp_path: Path):
    (tmp_path / "files").mkdir()
    rows().to_parquet(tmp_path / "files" / "train.parquet")
    store = HubStore(str(tmp_path / "files"), options=HubOptions(cache_dir=str(tmp_path / "mine")))
    assert read_all(store) == PICTURES and (tmp_path / "mine").is_dir()
    with pytest.raises(StoreLost, match=r'Unknown split "test". Should be one of'):
        keys(HubStore(str(tmp_path / "files"), "test"))


def test_a_folder_of_pictures_with_a_table(tmp_path: Path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, data in enumerate(PICTURES):
        (folder / f"{number}.png").write_bytes(data)
    lines = [{"file_name": f"{number}.png", "text": f"cat {number}"} for number in range(4)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    store = HubStore(str(folder), caption_column="text")
    assert read_all(store) == PICTURES and store.captions().texts["000000001"] == ("cat 1",)
    before = store.entry("000000001")
    assert HubStore(str(folder), caption_column="text").entry("000000001") == before
    (folder / "1.png").write_bytes(encoded(noise(50, 50, 9)))
    changed = HubStore(str(folder), caption_column="text")
    assert changed.entry("000000001") != before and changed.read("000000001") != PICTURES[1]
    os.unlink(folder / "2.png")
    with pytest.raises(UserError, match=r"2\.png cannot be read: No such file"):
        changed.read("000000002")


def test_the_mark_of_a_dataset_follows_its_content(tmp_path: Path):
    rows().save_to_disk(tmp_path / "saved")
    first = HubStore(str(tmp_path / "saved")).entry("000000000")
    assert HubStore(str(tmp_path / "saved")).entry("000000000") == first
    rows().select([1, 0]).save_to_disk(tmp_path / "saved")
    second = HubStore(str(tmp_path / "saved")).entry("000000000")
    assert second.mtime_ns != first.mtime_ns and 0 <= second.mtime_ns < 2**63


def test_pictures_as_plain_bytes_and_rows_without_one(tmp_path: Path):
    plain = datasets.Dataset.from_dict({"image": [*PICTURES[:2], None]})
    plain.save_to_disk(tmp_path / "saved")
    store = HubStore(str(tmp_path / "saved"))
    assert [store.read(key) for key in keys(store)[:2]] == PICTURES[:2]
    with pytest.raises(UserError, match="row 000000002: has no picture") as error:
        store.read("000000002")
    assert not isinstance(error.value, StoreLost)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"image_column": "img"}, "image_column: the dataset has no column img; it has image, caption, tags"),
        ({"image_column": "caption"}, "image_column caption must hold pictures; it holds string"),
        ({"image_column": "tags"}, "image_column tags must hold pictures; it holds List"),
        ({"caption_column": "captions"}, "did you mean caption?"),
    ],
)
def test_columns_that_do_not_fit(tmp_path: Path, settings: dict, words: str):
    rows().save_to_disk(tmp_path / "saved")
    store = HubStore(str(tmp_path / "saved"), **settings)
    with pytest.raises(UserError) as error:
        store.captions()
    assert words in str(error.value)


def test_a_folder_that_is_not_there_or_is_none(tmp_path: Path):
    with pytest.raises(UserError, match="the folder of the dataset does not exist"):
        HubStore(str(tmp_path / "nowhere")).check()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="the dataset cannot be read"):
        keys(HubStore(str(tmp_path / "empty")))
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "train.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"the dataset cannot be read: .*arquet"):
        keys(HubStore(str(tmp_path / "torn")))


ASKED = """
import json, sys
from sana_tune.data.remote_hub import HubStore
from sana_tune.errors import UserError
for name, options in json.loads(sys.argv[1]):
    try:
        store = HubStore(name, **options)
        print(len(list(store.list())), len(store.read("000000000")), store.captions().texts["000000002"][0])
    except UserError as error:
        print(type(error).__name__, str(error).replace(chr(10), " "))
print("torch" in sys.modules)
"""


def asked(calls: list[tuple[str, dict]], home: Path, **environ: str) -> list[str]:
    """What the real client of the library says, in a process of its own."""
    env = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_TOKEN": "", **environ}
    ran = subprocess.run([sys.executable, "-c", ASKED, json.dumps(calls)], capture_output=True, text=True, env=env)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == "", "no noise of the library"
    return ran.stdout.splitlines()


def test_a_dataset_of_the_hub_is_downloaded_once(tmp_path: Path):
    (tmp_path / "repository").mkdir()
    rows().to_parquet(tmp_path / "repository" / "train.parquet")
    with FakeHub({"owner/cats": tmp_path / "repository"}, gated={"owner/closed"}) as hub:
        hub.models["owner/closed"] = hub.models["owner/cats"]
        calls = [("owner/cats", {}), ("owner/cats", {}), ("owner/cats", {"revision": hub.commit("owner/cats")}),
                 ("owner/dogs", {}), ("owner/cats", {"revision": "v9"})]  # fmt: skip
        first, again, pinned, none, other, torch = asked(calls, tmp_path / "home", HF_ENDPOINT=hub.url)
        assert first == again == pinned == f"4 {len(PICTURES[0])} three"
        assert hub.sent["train.parquet"] == (tmp_path / "repository" / "train.parquet").stat().st_size
        assert none.startswith("StoreLost owner/dogs: there is no such dataset, or it is private or gated")
        assert other.startswith("StoreLost owner/cats: there is no such dataset") and "revision" in other
        assert torch == "False"
    offline, unknown, _ = asked([("owner/cats", {}), ("owner/dogs", {})], tmp_path / "home", HF_HUB_OFFLINE="1")
    assert offline == first, "what was downloaded is there without a network"
    assert unknown.startswith("StoreLost owner/dogs: ")


def test_without_the_library_the_extra_is_named():
    code = (
        "import sys; sys.modules['datasets'] = None\n"
        "from sana_tune.data.remote_hub import HubStore\n"
        "from sana_tune.errors import UserError\n"
        "try: HubStore('owner/cats').check()\n"
        "except UserError as error: print(error)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "type huggingface needs the datasets library" in ran.stdout and "pip install '.[datasets]'" in ran.stdout
