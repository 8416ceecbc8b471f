"""Which store a dataset has, and the survey over each: the same pictures give the same records wherever they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sana_tune.config.datasets import ImageDataset
from sana_tune.config.sources import CaptionTable, HubOptions
from sana_tune.data.geometry import Size
from sana_tune.data.memory import FileMemory
from sana_tune.data.remote_http import AddressStore
from sana_tune.data.remote_hub import HubStore
from sana_tune.data.remote_s3 import Place, S3Store
from sana_tune.data.stores import listing_of, open_store, open_stores, table_of
from sana_tune.data.survey import Survey, survey
from sana_tune.store import FolderStore
from tests.data.pictures import encoded, noise, put
from tests.fake_http import FakeHttp


def entry(kind: str = "local", **settings: Any) -> ImageDataset:
    return ImageDataset(id="d", type=kind, resolution=64, **settings)  # type: ignore[arg-type]


def look(dataset: ImageDataset, memory: FileMemory | None = None, **options: Any) -> Survey:
    return survey([dataset], alignment=32, rounding=2, prompt_case="lower", memory=memory or FileMemory(), **options)


def test_each_type_has_its_store(tmp_path: Path):
    assert isinstance(open_store(entry(instance_data_dir=str(tmp_path))), FolderStore)
    s3 = open_store(
        entry(
            "aws", aws_bucket_name="b", aws_data_prefix="p", aws_endpoint_url="http://x", aws_region_name="r",
            aws_access_key_id="k", aws_secret_access_key="s", aws_session_token="t", aws_max_pool_connections=3,
        )
    )  # fmt: skip
    assert isinstance(s3, S3Store) and s3.place == Place("b", "p", "http://x", "r", "k", "s", "t", 3)
    prefix = open_store(entry("aws", aws_bucket_name="b", instance_data_dir="cats"))
    assert isinstance(prefix, S3Store) and prefix.place.prefix == "cats"
    stores = open_stores([entry("csv", csv_file="a.csv", csv_cache_dir="kept")])
    assert isinstance(stores["d"], AddressStore) and stores["d"].folder == Path("kept")
    hub = open_store(entry("huggingface", dataset_name="o/n", split="s", huggingface={"subset": "x"}))
    assert isinstance(hub, HubStore) and (hub.name, hub.split) == ("o/n", "s")


def test_what_a_store_holds_is_judged_by_endings_unless_a_table_says_it(tmp_path: Path):
    (tmp_path / "p.csv").write_text("url\nhttp://127.0.0.1:9/get?id=1\nhttp://127.0.0.1:9/a.txt\n")
    store = open_store(entry("csv", csv_file=str(tmp_path / "p.csv"), csv_cache_dir="kept"))
    assert len(listing_of(store).pictures) == 2
    put(tmp_path / "f", "a.png", caption="x")
    found = listing_of(FolderStore(tmp_path / "f"))
    assert (len(found.pictures), len(found.captions)) == (1, 1)


# ---- tables beside pictures ----


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(3):
        put(tmp_path / "pictures", f"sub/p{number}.png", 64, 64, seed=number)
    return tmp_path / "pictures"


def write_table(folder: Path, *rows: dict[str, Any]) -> CaptionTable:
    path = folder.parent / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return CaptionTable(str(path), width_column="w", height_column="h")


def captions(found: Survey) -> dict[str, tuple[str, ...]]:
    return {record.key: record.captions for record in found.records}


def test_captions_of_a_table_are_variants_and_go_the_way_of_all_captions(folder: Path, caplog):
    table = write_table(
        folder, {"filename": "p0", "caption": ["One", "Two"], "w": 1, "h": 1},
        {"filename": "sub/p1.png", "caption": "x"},
        {"filename": "p2", "caption": "third"}, {"filename": "p9", "caption": "nobody"},
    )  # fmt: skip
    dataset = entry(instance_data_dir=str(folder), caption_strategy="parquet", parquet=table,
                    prepend_instance_prompt=True, instance_prompt="Zib,")  # fmt: skip
    assert captions(look(dataset)) == {
        "sub/p0.png": ("zib, one", "zib, two"), "sub/p1.png": ("zib, x",), "sub/p2.png": ("zib, third",)
    }  # fmt: skip
    assert "dataset d: 1 rows of t.jsonl belong to no picture: p9" in caplog.text


@pytest.mark.parametrize("missing, trained, problems", [("error", 1, 1), ("skip", 1, 0), ("empty", 3, 0)])
def test_pictures_without_a_caption_in_the_table(folder: Path, missing: Any, trained: int, problems: int):
    table = write_table(folder, {"filename": "p0", "caption": "x", "w": 1, "h": 1}, {"filename": "p1", "caption": " "})
    found = look(
        entry(instance_data_dir=str(folder), caption_strategy="parquet", parquet=table, missing_caption=missing)
    )
    assert len(found.records) == trained and len(found.problems) == problems and found.ledger.balances()
    if missing != "empty":
        assert dict(found.ledger.datasets[0].left_out) == {
            "sub/p1.png": "its row in t.jsonl has no caption", "sub/p2.png": "t.jsonl has no row for it"
        }  # fmt: skip
    if problems:
        assert "2 pictures have none" in found.problems[0].what


def test_a_table_that_cannot_be_read_is_a_problem_of_the_dataset(folder: Path):
    found = look(entry(instance_data_dir=str(folder), caption_strategy="parquet", parquet={"path": "nothing.csv"}))
    assert "dataset d: nothing.csv: the table must exist" in str(found.problems[0])


def test_sizes_of_a_table_spare_a_check_the_pictures(folder: Path, monkeypatch: pytest.MonkeyPatch):
    sizes = [{"filename": f"p{number}", "w": 64 + 64 * number, "h": 64} for number in range(2)]
    settings = {"instance_data_dir": str(folder), "parquet": write_table(folder, *sizes), "metadata_backend": "parquet"}
    opened: list[str] = []
    plain = FolderStore.open
    monkeypatch.setattr(FolderStore, "open", lambda store, key: opened.append(key) or plain(store, key))
    memory = FileMemory()
    found = look(entry(**settings), memory, headers_only=True)
    assert [Size(record.width_px, record.height_px) for record in found.records] == [(64, 64), (128, 64), (64, 64)]
    assert opened == ["sub/p2.png"], "the one that the table does not know"
    whole = look(entry(**settings), memory)
    assert [record.width_px for record in whole.records] == [64, 64, 64], "training goes by the pictures themselves"
    assert not look(entry(**{**settings, "metadata_backend": "discovery"}), headers_only=True).problems


def test_no_table_is_read_for_what_needs_none(folder: Path):
    keys = ["a.png"]
    nothing = {"path": "nothing.csv"}
    for settings in (
        {"parquet": nothing},
        {"parquet": nothing, "caption_strategy": "parquet", "only_instance_prompt": True, "instance_prompt": "x"},
    ):
        dataset = entry(instance_data_dir=str(folder), **settings)
        assert table_of(dataset, open_store(dataset), keys) is None


# ---- the same pictures elsewhere ----


def test_downloads_are_remembered_like_files(tmp_path: Path):
    with FakeHttp({f"/{number}.png": encoded(noise(64, 64, number)) for number in range(3)}) as web:
        web.pages["/gone.png"] = 404
        (tmp_path / "p.csv").write_text("url,caption\n" + "".join(f"{web.url}{path},a cat\n" for path in web.pages))
        dataset = entry("csv", csv_file=str(tmp_path / "p.csv"), csv_cache_dir=str(tmp_path / "kept"),
                        caption_strategy="csv")  # fmt: skip
        memory = FileMemory()
        first = look(dataset, memory)
        assert len(first.records) == 3 and first.ledger.balances() and not first.problems
        assert dict(first.ledger.datasets[0].left_out)["127.0.0.1/gone.png"].endswith("404 (Not Found)")
        web.requests.clear()
        kept = list((tmp_path / "kept").rglob("*.png"))
        assert len(kept) == 3 and look(dataset, memory).records == first.records
        assert web.asked() == ["/gone.png"], "only what is not there yet is asked for"
        for path in kept:  # who wants them anew deletes them
            path.unlink()
        web.pages["/0.png"] = encoded(noise(64, 64, 9))
        again = {record.key: record.content_hash for record in look(dataset, memory).records}
        changed = [record.key for record in first.records if again[record.key] != record.content_hash]
        assert changed == ["127.0.0.1/0.png"]


def test_small_pictures_of_a_hub_dataset_are_left_out(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    pictures = [{"bytes": encoded(noise(side, 64, side)), "path": None} for side in (32, 64)]
    kinds = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"image": pictures, "caption": ["a", "b"]}, features=kinds).save_to_disk(tmp_path / "s")
    dataset = entry("huggingface", dataset_name=str(tmp_path / "s"), caption_strategy="huggingface",
                    huggingface=HubOptions(min_width=40))  # fmt: skip
    found = look(dataset)
    assert captions(found) == {"000000001": ("b",)}
    assert found.ledger.datasets[0].left_out == (("000000000", "is 32x64 px, smaller than filter_func's 40x0"),)
