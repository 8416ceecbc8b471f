from __future__ import annotations

import json
import os
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import current_thread

import pytest

from sana_tune.config.datasets import ImageDataset
from sana_tune.config.values import AspectBucket
from sana_tune.data import survey as module
from sana_tune.data.geometry import Placement, Rules, Size, place
from sana_tune.data.memory import FileMemory
from sana_tune.data.records import Keys, Role
from sana_tune.data.survey import Survey, rules_of, survey
from sana_tune.store import FolderStore
from tests.data.pictures import dataset, encoded, noise, put


def look(*datasets: ImageDataset, memory: FileMemory | None = None, **settings) -> Survey:
    settings = {"alignment": 8, "rounding": 2, "prompt_case": "lower", **settings}
    return survey(datasets, memory=memory or FileMemory(), **settings)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file is read, by name."""
    counted: Counter[str] = Counter()
    read = FolderStore.read

    def counting(store: FolderStore, key: str) -> bytes:
        counted[key] += 1
        return read(store, key)

    monkeypatch.setattr(FolderStore, "read", counting)
    return counted


def left_out(found: Survey, number: int = 0) -> dict[str, str]:
    return dict(found.ledger.datasets[number].left_out)


def test_pictures_become_records(tmp_path: Path):
    put(tmp_path, "a/Red_Cat.png", 80, 60)
    put(tmp_path, "b.png", 60, 80, seed=1)
    found = look(dataset(tmp_path))
    assert not found.problems and found.ledger.balances()
    first, second = found.records
    assert (first.dataset, first.key, first.captions, first.role) == ("cats", "a/Red_Cat.png", ("red cat",), Role.TRAIN)
    assert (first.width_px, first.height_px) == (80, 60) and first.placement.target == (72, 56)
    assert first.placement == place(Size(80, 60), rules_of(dataset(tmp_path), 8, 2))
    assert second.placement.target == (56, 72) and second.content_hash != first.content_hash


def test_one_picture_is_enough(tmp_path: Path):
    put(tmp_path, "a.png")
    found = look(dataset(tmp_path))
    assert len(found.records) == 1 and not found.problems


def test_datasets_may_share_a_folder_which_is_read_once(tmp_path: Path, reads: Counter[str]):
    put(tmp_path, "a.png")
    put(tmp_path, "b.png", seed=1)
    found = look(dataset(tmp_path, "big", resolution=128), dataset(tmp_path, "small", is_regularisation_data=True))
    assert [record.id for record in found.records] == ["big/a.png", "big/b.png", "small/a.png", "small/b.png"]
    assert found.records[0].placement != found.records[2].placement
    assert [record.role for record in found.records] == [Role.TRAIN] * 2 + [Role.REGULARISE] * 2
    assert reads == {"a.png": 1, "b.png": 1}


def test_captions_come_from_files_and_keep_their_case_if_asked(tmp_path: Path):
    put(tmp_path, "a.png", caption="A Cat\nTwo")
    entry = dataset(tmp_path, caption_strategy="textfile")
    assert look(entry).records[0].captions == ("a cat", "two")
    assert look(entry, prompt_case="keep").records[0].captions == ("A Cat", "Two")
    entry = dataset(tmp_path, caption_strategy="instanceprompt", instance_prompt=("x", "y"))
    assert look(entry).records[0].captions == ("x", "y")


def test_report_counts_up(tmp_path: Path):
    for number in range(3):
        put(tmp_path, f"{number}.png")
    told: list[tuple[str, int, int]] = []
    look(dataset(tmp_path), report=lambda *event: told.append(event))
    assert told == [("cats", 1, 3), ("cats", 2, 3), ("cats", 3, 3)]


# ---- places ----


WIDE = {"crop": True, "crop_aspect": "random", "crop_aspect_buckets": [0.5, 1.0, 2.0]}


def test_every_setting_of_a_picture_reaches_the_geometry(tmp_path: Path):
    entry = dataset(
        tmp_path,
        resolution=0.5,
        resolution_type="area",
        crop=True,
        crop_style="corner",
        crop_aspect="closest",
        crop_aspect_buckets=[1.0, {"aspect": 1.5, "weight": 2}],
        minimum_image_size=0.1,
        maximum_image_size=0.9,
        target_downsample_size=0.7,
        minimum_aspect_ratio=0.25,
        maximum_aspect_ratio=4,
        max_upscale_threshold=0.2,
    )
    assert rules_of(entry, 8, 3) == Rules(
        resolution=0.5,
        resolution_type="area",
        crop=True,
        crop_style="corner",
        crop_aspect="closest",
        crop_aspect_buckets=(AspectBucket(1.0, 1.0), AspectBucket(1.5, 2.0)),
        alignment=8,
        rounding=3,
        minimum_image_size=0.1,
        maximum_image_size=0.9,
        target_downsample_size=0.7,
        minimum_aspect_ratio=0.25,
        maximum_aspect_ratio=4,
        max_upscale_threshold=0.2,
    )


def test_a_crop_is_random_and_no_crop_is_at_the_center_unless_told_otherwise(tmp_path: Path):
    assert rules_of(dataset(tmp_path), 8, 2).crop_style == "center"
    assert rules_of(dataset(tmp_path, crop=True), 8, 2).crop_style == "random"
    assert rules_of(dataset(tmp_path, crop=True, crop_style="center"), 8, 2).crop_style == "center"
    assert rules_of(dataset(tmp_path, crop_style="random"), 8, 2).crop_style == "random"


def test_random_crops_depend_on_seed_dataset_and_key(tmp_path: Path):
    for number in range(30):
        put(tmp_path, f"{number}.png", 90, 70)

    def places(id: str = "cats", **settings) -> list[Placement]:
        return [record.placement for record in look(dataset(tmp_path, id, **WIDE), **settings).records]

    first = places()
    assert len({place.target for place in first}) == 3 and len(set(first)) > 20
    assert first == places(seed=0) and first != places(seed=1) and first != places("dogs")
    keys = {record.key for record in look(dataset(tmp_path, **WIDE)).records}
    (tmp_path / "0.png").unlink()
    rest = look(dataset(tmp_path, **WIDE)).records
    gone = sorted(keys).index("0.png")
    assert [record.placement for record in rest] == first[:gone] + first[gone + 1 :], "no picture moves another's crop"


def test_pictures_of_the_wrong_shape_or_blown_up_are_left_out(tmp_path: Path):
    put(tmp_path, "fine.png", 60, 60)
    put(tmp_path, "small.png", 40, 40)
    put(tmp_path, "tall.png", 40, 400)
    put(tmp_path, "wide.png", 400, 40)
    limits = {"minimum_aspect_ratio": 0.5, "maximum_aspect_ratio": 2, "max_upscale_threshold": 0.5}
    found = look(dataset(tmp_path, **limits))
    assert [record.key for record in found.records] == ["fine.png"] and found.ledger.balances()
    assert left_out(found) == {
        "small.png": "is 40x40 px and would be enlarged by 60 %, to 64x64 px; max_upscale_threshold 0.5 allows 50 %",
        "tall.png": "is 40x400 px, an aspect ratio (width / height) of 0.1, below minimum_aspect_ratio 0.5",
        "wide.png": "is 400x40 px, an aspect ratio (width / height) of 10, above maximum_aspect_ratio 2",
    }


# ---- the ledger ----


def test_the_ledger_balances_and_gives_reasons(tmp_path: Path):
    put(tmp_path, "good.png", 64, 64)
    put(tmp_path, "small.png", 20, 20)
    put(tmp_path, "new.heic").write_bytes(b"\0\0\0\x18ftypheic")
    put(tmp_path, "torn.png").write_bytes(encoded(noise(64, 64))[:20])
    (tmp_path / "good.txt").write_text("x")
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / ".hidden.png").write_text("x")
    found = look(dataset(tmp_path, minimum_image_size=32))
    (ledger,) = found.ledger.datasets
    assert ledger.balances() and not found.problems
    assert (ledger.found, ledger.trained, ledger.not_pictures, ledger.caption_files) == (4, 1, 2, 1)
    assert left_out(found) == {
        "new.heic": "is a HEIC picture, which is not read; save it as JPEG or PNG",
        "small.png": "is 20x20 px, smaller in area than minimum_image_size 32 (32x32 px)",
        "torn.png": left_out(found)["torn.png"],
    }
    assert json.loads(json.dumps(found.ledger.to_json()))["datasets"][0]["found"] == 4


def test_a_name_that_is_no_utf8_is_left_out(tmp_path: Path):
    put(tmp_path, "a.png")
    try:
        os.rename(tmp_path / "a.png", os.fsencode(tmp_path) + b"/\xff.png")
    except OSError:
        pytest.skip("this file system takes UTF-8 names alone")
    put(tmp_path, "b.png")
    found = look(dataset(tmp_path))
    assert left_out(found) == {"\\udcff.png": "has a name that is not UTF-8; rename it"}
    assert found.ledger.balances()


def test_pictures_that_break_later_are_moved_to_the_ledger(tmp_path: Path):
    for name in "abc":
        put(tmp_path, f"{name}.png")
    found = look(dataset(tmp_path, "one"), dataset(tmp_path, "two"))
    corrected = found.without({"one/b.png": "is damaged"})
    assert [record.id for record in corrected.records] == ["one/a.png", "one/c.png"] + [f"two/{n}.png" for n in "abc"]
    assert left_out(corrected) == {"b.png": "is damaged"} and left_out(corrected, 1) == {}
    assert corrected.ledger.balances() and found.ledger.balances()
    assert found.without({}) == found


def test_a_ledger_that_does_not_balance_says_so(tmp_path: Path):
    put(tmp_path, "a.png")
    (ledger,) = look(dataset(tmp_path)).ledger.datasets
    assert not replace(ledger, trained=0).balances()


# ---- mistakes ----


def test_a_missing_folder_and_an_empty_one_are_told_together(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.md").touch()
    found = look(dataset(tmp_path / "none", "one"), dataset(tmp_path / "empty", "two"))
    first, second = found.problems
    assert "one" in first.where and "does not exist" in first.what and str(tmp_path / "none") in str(first)
    assert "two" in second.where and "holds no pictures (1 other files)" in second.what
    assert found.ledger.balances() and not found.records


def test_missing_captions_are_one_problem_with_five_names(tmp_path: Path):
    for number in range(7):
        put(tmp_path, f"{number}.png", seed=number)
    put(tmp_path, "fine.png", caption="x")
    (found,) = look(dataset(tmp_path, caption_strategy="textfile")).problems
    assert "7 pictures have none" in found.what and "4.png: there is no caption file 4.txt; and 2 more" in found.what
    assert "missing_caption" in found.fix


def test_a_picture_left_out_for_its_size_needs_no_caption(tmp_path: Path):
    put(tmp_path, "small.png", 8, 8)
    put(tmp_path, "fine.png", 80, 80, caption="x")
    found = look(dataset(tmp_path, caption_strategy="textfile", minimum_image_size=32))
    assert not found.problems and list(left_out(found)) == ["small.png"]


def test_missing_captions_can_be_skipped_or_empty(tmp_path: Path):
    put(tmp_path, "a.png")
    put(tmp_path, "b.png", caption="x")
    skipped = look(dataset(tmp_path, caption_strategy="textfile", missing_caption="skip"))
    assert [record.key for record in skipped.records] == ["b.png"] and not skipped.problems
    assert left_out(skipped) == {"a.png": "there is no caption file a.txt"}
    empty = look(dataset(tmp_path, caption_strategy="textfile", missing_caption="empty"))
    assert [record.captions for record in empty.records] == [("",), ("x",)] and not empty.problems
    assert skipped.ledger.balances() and empty.ledger.balances()


def test_a_dataset_of_which_nothing_is_left_is_a_problem(tmp_path: Path):
    put(tmp_path, "a.png", 8, 8)
    (problem,) = look(dataset(tmp_path, minimum_image_size=1024)).problems
    assert "all 1 pictures are left out: a.png: is 8x8 px" in problem.what


def test_repeated_ids_and_no_dataset_at_all(tmp_path: Path):
    put(tmp_path, "a.png")
    found = look(dataset(tmp_path), dataset(tmp_path), dataset(tmp_path, disabled=True))
    assert [problem.where for problem in found.problems] == ["dataset cats"] and len(found.records) == 1
    (problem,) = look(dataset(tmp_path, disabled=True)).problems
    assert "no picture dataset" in problem.what


# ---- the memory ----


def test_a_second_run_reads_nothing(tmp_path: Path, reads: Counter[str]):
    data, path = tmp_path / "data", tmp_path / "cache" / "files.ndjson"
    for number in range(5):
        put(data, f"{number}.png", seed=number, caption=f"\ufeffcat {number}")
    entry = dataset(data, caption_strategy="textfile")
    first = look(entry, memory=FileMemory(path))
    assert sum(reads.values()) == 10
    written = path.stat().st_mtime_ns
    assert look(entry, memory=FileMemory(path)) == first
    assert sum(reads.values()) == 10 and path.stat().st_mtime_ns == written


def test_an_edited_picture_or_caption_changes_its_own_key_alone(tmp_path: Path, reads: Counter[str]):
    data, path = tmp_path / "data", tmp_path / "files.ndjson"
    for number in range(4):
        put(data, f"{number}.png", seed=number, caption=f"cat {number}")
    entry, keys = dataset(data, caption_strategy="textfile"), Keys("vae", "text")

    def all_keys() -> list[tuple[str, str]]:
        found = look(entry, memory=FileMemory(path))
        return [(keys.latent(record), keys.text(record.captions[0])) for record in found.records]

    before = all_keys()
    reads.clear()
    put(data, "1.png", seed=99)
    (data / "2.txt").write_text("dog 2")
    after = all_keys()
    assert reads == {"1.png": 1, "2.txt": 1}
    changed = [(a[0] != b[0], a[1] != b[1]) for a, b in zip(before, after, strict=True)]
    assert changed == [(False, False), (True, False), (False, True), (False, False)]
    os.utime(data / "3.png")
    assert all_keys() == after and reads["3.png"] == 1  # touched, read again, the same


def test_headers_alone_are_read_where_no_more_is_asked_for(tmp_path: Path, reads: Counter[str]):
    data, path = tmp_path / "data", tmp_path / "files.ndjson"
    for number in range(5):
        put(data, f"{number}.png", seed=number, caption=f"cat {number}")
    put(data, "torn.png", caption="x").write_bytes(b"torn")
    entry = dataset(data, caption_strategy="textfile")
    measured = look(entry, memory=FileMemory(path), headers_only=True)
    assert [key for key in reads if key.endswith(".png")] == []
    assert {record.content_hash for record in measured.records} == {None} and len(measured.records) == 5
    assert look(entry, memory=FileMemory(path), headers_only=True) == measured
    assert "not a picture" in left_out(measured)["torn.png"]

    whole = look(entry, memory=FileMemory(path))
    assert {reads[f"{number}.png"] for number in range(5)} == {1}, "a memory without hashes is completed"
    assert all(record.content_hash for record in whole.records)
    assert [replace(record, content_hash=None) for record in whole.records] == list(measured.records)
    assert whole.ledger == measured.ledger

    reads.clear()
    put(data, "1.png", 30, 44, seed=9)
    again = look(entry, memory=FileMemory(path), headers_only=True).records
    assert [record.content_hash is None for record in again] == [False, True, False, False, False]
    assert (again[1].width_px, again[1].height_px) == (30, 44) and not reads
    assert look(entry, memory=FileMemory(path)) == look(entry), "what a header told is completed after a change too"
    assert again[2].content_hash == whole.records[2].content_hash


@pytest.mark.parametrize("headers_only", [True, False])
def test_what_is_remembered_needs_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, headers_only: bool):
    """Handing 10,000 known pictures to threads and back takes longer than everything else."""
    put(tmp_path / "data", "a.png", caption="x")
    path = tmp_path / "files.ndjson"
    entry = dataset(tmp_path / "data", caption_strategy="textfile")
    look(entry, memory=FileMemory(path))
    monkeypatch.setattr(ThreadPoolExecutor, "map", lambda *_: pytest.fail("threads were asked"))
    assert len(look(entry, memory=FileMemory(path), headers_only=headers_only).records) == 1


def test_a_broken_picture_is_looked_at_again(tmp_path: Path, reads: Counter[str]):
    put(tmp_path, "a.png").write_bytes(b"torn")
    path = tmp_path / "files.ndjson"
    for _ in range(2):
        look(dataset(tmp_path), memory=FileMemory(path))
    assert reads["a.png"] == 2


def test_what_was_read_is_remembered_when_the_survey_is_stopped(tmp_path: Path, reads: Counter[str], monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 2)
    data, path = tmp_path / "data", tmp_path / "files.ndjson"
    for number in range(6):
        put(data, f"{number}.png", seed=number)

    def stop(_: str, done: int, __: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        look(dataset(data), memory=FileMemory(path), report=stop)
    look(dataset(data), memory=FileMemory(path))
    assert set(reads.values()) == {1}


def test_the_data_folder_is_left_as_it_was(tmp_path: Path):
    data = tmp_path / "data"
    put(data, "a.png", caption="x")
    put(data, "b.png").write_bytes(b"torn")
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in data.rglob("*")}
    look(dataset(data), memory=FileMemory(tmp_path / "cache" / "files.ndjson"))
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in data.rglob("*")} == before


def test_headers_are_read_one_by_one_until_the_disk_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In the system's cache a header is some Python, in which threads only hinder each other; a slow disk is not."""
    for number in range(60):
        put(tmp_path, f"{number:02}.png", seed=number)
    names: list[str] = []
    pause_s = 0.0

    def opened(store: FolderStore, key: str):
        names.append(current_thread().name)
        time.sleep(pause_s)
        return folder_open(store, key)

    folder_open = FolderStore.open
    monkeypatch.setattr(FolderStore, "open", opened)
    monkeypatch.setattr(module, "_PATIENCE_S", 10.0)  # the machine of a test may have others to attend to
    assert len(look(dataset(tmp_path), headers_only=True).records) == 60
    assert set(names) == {current_thread().name}
    monkeypatch.setattr(module, "_PATIENCE_S", 0.03)
    names.clear()
    pause_s = 0.01
    found = look(dataset(tmp_path), headers_only=True)
    assert [record.key for record in found.records] == [f"{number:02}.png" for number in range(60)]
    assert names[0] == current_thread().name and any(name.startswith("survey") for name in names[:20])
