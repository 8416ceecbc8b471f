"""Whose mask is which: by name, folders included; what is missing or broken is one list."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sana_tune.config.datasets import ConditioningDataset, EvalDataset, ImageDataset
from sana_tune.data.masks import with_masks
from sana_tune.data.memory import FileMemory
from sana_tune.data.records import Role, content_hash
from sana_tune.data.survey import Survey, survey
from tests.data.pictures import dataset, encoded, put


def masks(folder: Path, **settings: Any) -> ConditioningDataset:
    return ConditioningDataset(id="m", instance_data_dir=str(folder), **settings)


def surveyed(
    pictures: ImageDataset, mine: ConditioningDataset | None, memory: FileMemory | None = None, **settings: Any
) -> Survey:
    memory = memory or FileMemory()
    found = survey([pictures], alignment=8, rounding=2, prompt_case="lower", memory=memory)
    return with_masks(found, [pictures], [mine] if mine else [], memory, **settings)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for number, name in enumerate(("a.png", "b.png", "in/a.png")):
        put(tmp_path / "pictures", name, seed=number)
        put(tmp_path / "masks", name, seed=10 + number)
    return tmp_path


def linked(place: Path, **settings: Any) -> ImageDataset:
    return dataset(place / "pictures", conditioning_data="m", **settings)


def test_every_picture_gets_the_mask_of_its_name(place: Path):
    (place / "masks" / "b.png").rename(place / "masks" / "b.webp")
    found = surveyed(linked(place), masks(place / "masks", conditioning_type="segmentation"))
    assert found.problems == ()
    assert [(record.key, record.mask_key) for record in found.records] == [
        ("a.png", "a.png"), ("b.png", "b.webp"), ("in/a.png", "in/a.png"),
    ]  # fmt: skip
    assert {record.mask_kind for record in found.records} == {"segmentation"}
    for record in found.records:
        assert record.mask_hash == content_hash((place / "masks" / str(record.mask_key)).read_bytes())
    (ledger,) = found.ledger.datasets
    assert (ledger.masks, ledger.masks_resized) == (3, 0)


def test_the_pictures_own_ending_comes_first_and_two_others_are_one_too_many(place: Path):
    put(place / "masks", "a.bmp", seed=5)
    assert surveyed(linked(place), masks(place / "masks")).problems == ()
    (place / "masks" / "a.png").rename(place / "masks" / "a.webp")
    (problem,) = surveyed(linked(place), masks(place / "masks")).problems
    assert "1 of 3 have none that can be used: a.png: several: a.bmp, a.webp" in problem.what


def test_missing_and_broken_masks_are_one_problem_with_their_names(place: Path):
    (place / "masks" / "b.png").unlink()
    (place / "masks" / "in" / "a.png").write_bytes(b"no picture")
    (problem,) = surveyed(linked(place), masks(place / "masks")).problems
    assert problem.where == f"dataset cats: {place / 'masks'}" and "conditioning_data m" in problem.what
    assert "2 of 3" in problem.what and "b.png: no b with any picture's ending" in problem.what
    assert "in/a.png is not a picture" in problem.what and "white = counts" in problem.fix


def test_many_missing_masks_are_counted(place: Path):
    for number in range(9):
        put(place / "pictures", f"n{number}.png", seed=20 + number)
    (problem,) = surveyed(linked(place), masks(place / "masks")).problems
    assert "9 of 12" in problem.what and "and 4 more" in problem.what


def test_a_folder_of_masks_that_is_not_there(place: Path):
    (problem,) = surveyed(linked(place), masks(place / "none")).problems
    assert problem.where.startswith("masks m: ") and "does not exist" in problem.what


def test_masks_of_another_size_are_counted(place: Path):
    put(place / "masks", "b.png", 10, 10)
    (ledger,) = surveyed(linked(place), masks(place / "masks")).ledger.datasets
    assert (ledger.masks, ledger.masks_resized) == (3, 1)


def test_headers_alone_and_what_is_remembered(place: Path):
    memory = FileMemory(place / "files.jsonl")
    found = surveyed(linked(place), masks(place / "masks"), memory, headers_only=True)
    assert [record.mask_hash for record in found.records] == [None] * 3 and found.problems == ()
    whole = surveyed(linked(place), masks(place / "masks"), memory)
    assert all(record.mask_hash for record in whole.records)
    again = surveyed(linked(place), masks(place / "masks"), FileMemory(place / "files.jsonl"), headers_only=True)
    assert [record.mask_hash for record in again.records] == [record.mask_hash for record in whole.records]
    (place / "masks" / "a.png").write_bytes(encoded(np.zeros((30, 40, 3), np.uint8)))
    changed = surveyed(linked(place), masks(place / "masks"), FileMemory(place / "files.jsonl"))
    assert changed.records[0].mask_hash != whole.records[0].mask_hash, "a changed mask is another one"


def test_without_a_link_there_are_no_masks(place: Path):
    plain = surveyed(dataset(place / "pictures"), masks(place / "masks"))
    assert [record.mask_key for record in plain.records] == [None] * 3
    assert plain.ledger.datasets[0].masks == 0


def test_held_out_pictures_have_masks_too(place: Path):
    held = EvalDataset(id="cats", instance_data_dir=str(place / "pictures"), resolution=64, conditioning_data="m")
    found = surveyed(held, masks(place / "masks"))
    assert {record.role for record in found.records} == {Role.EVAL}
    assert None not in [record.mask_key for record in found.records] and found.ledger.datasets[0].masks == 3
