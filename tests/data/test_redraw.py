"""Crops and aspects drawn anew for each epoch: always of the sizes that the plan counted on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from sana_tune.data.memory import FileMemory
from sana_tune.data.records import Record, chance_of
from sana_tune.data.redraw import Redraw
from sana_tune.data.survey import rules_of, survey
from tests.data.pictures import dataset, put

SEED = 5
SQUARES = {"crop": True, "crop_style": "random", "crop_aspect": "square"}
ASPECTS = {**SQUARES, "crop_aspect": "random", "crop_aspect_buckets": [0.5, 1.0, 2.0]}


def redraw_of(folder: Path, count: int = 12, seed: int = SEED, **settings) -> tuple[Redraw, tuple[Record, ...]]:
    for number in range(count):
        put(folder, f"{number:02}.png", 120 + 7 * number, 90 + 3 * number, seed=number)
    one = dataset(folder, resolution=32, **settings)
    found = survey([one], alignment=8, rounding=2, prompt_case="lower", memory=FileMemory(), seed=seed)
    return Redraw(found.records, {"cats": rules_of(one, 8, 2)}, seed), found.records


def inside(record: Record) -> bool:
    box, resize = record.placement.crop_box, record.placement.resize
    return 0 <= box.left and 0 <= box.top and box.right <= resize.width and box.bottom <= resize.height


@pytest.mark.parametrize("settings", [SQUARES, ASPECTS], ids=["squares", "aspects"])
def test_places_keep_their_sizes_and_every_picture_comes_once(tmp_path: Path, settings):
    redraw, records = redraw_of(tmp_path, **settings)
    assert redraw.datasets == {"cats"} and redraw.records(0) is records
    for epoch in range(1, 8):
        drawn = redraw.records(epoch)
        assert [one.placement.target for one in drawn] == [one.placement.target for one in records]
        assert Counter(one.key for one in drawn) == Counter(one.key for one in records)
        assert all(inside(one) for one in drawn)


def test_crops_differ_from_epoch_to_epoch_and_are_the_same_again(tmp_path: Path):
    redraw, _ = redraw_of(tmp_path, **SQUARES)
    boxes = {epoch: [one.placement.crop_box for one in redraw.records(epoch)] for epoch in range(4)}
    assert len({tuple(found) for found in boxes.values()}) == 4
    again, _ = redraw_of(tmp_path, **SQUARES)
    assert {epoch: [one.placement.crop_box for one in again.records(epoch)] for epoch in (3, 0, 2, 1)} == boxes
    other, _ = redraw_of(tmp_path, seed=SEED + 1, **SQUARES)
    assert [one.placement.crop_box for one in other.records(1)] != boxes[1]


def test_with_random_aspects_pictures_change_buckets(tmp_path: Path):
    redraw, records = redraw_of(tmp_path, count=24, **ASPECTS)
    assert len({one.placement.target for one in records}) == 3
    shown = {one.key: {one.placement.target} for one in records}
    for epoch in range(1, 12):
        for one in redraw.records(epoch):
            shown[one.key].add(one.placement.target)
    assert sum(len(sizes) > 1 for sizes in shown.values()) >= 20


@pytest.mark.parametrize(
    "settings", [{"crop": False}, {"crop": True, "crop_style": "center"}, {"crop": True, "crop_style": "corner"}]
)
def test_where_nothing_is_drawn_nothing_changes(tmp_path: Path, settings):
    redraw, records = redraw_of(tmp_path, count=3, **settings)
    assert redraw.datasets == frozenset() and redraw.records(7) is records


def test_a_dataset_that_is_not_named_stays_as_it_is(tmp_path: Path):
    _, records = redraw_of(tmp_path, count=3, **SQUARES)
    redraw = Redraw(records, {}, SEED)
    assert redraw.records(3) is records


def test_the_first_epoch_is_the_surveys(tmp_path: Path):
    assert chance_of(SEED, "cats", "a.png", 0) == chance_of(SEED, "cats", "a.png")
    assert chance_of(SEED, "cats", "a.png", 1) != chance_of(SEED, "cats", "a.png")
