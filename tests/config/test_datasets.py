"""Datasets: what they inherit, and that every inherited key is a key of both files."""

from __future__ import annotations

import json
from pathlib import Path

from sana_tune.config.datasets import INHERITED, ImageDataset, inherit
from sana_tune.config.schema import DataConfig
from sana_tune.config.values import AspectBucket
from tests.config.helpers import load_with, problems_of


def test_inherited_keys_exist_on_both_sides() -> None:
    assert len(INHERITED) > 10
    assert set(INHERITED) <= set(ImageDataset.model_fields) & set(DataConfig.model_fields)


def test_the_entry_wins_over_the_config(tmp_path: Path) -> None:
    data = load_with(tmp_path, {"train_batch_size": 3, "missing_caption": "skip"}).config.data
    entry = inherit({"id": "a", "train_batch_size": 5}, data)
    assert (entry["train_batch_size"], entry["missing_caption"]) == (5, "skip")
    assert "minimum_image_size" not in entry, "what nobody set stays unset"


CHOOSING = {"crop": True, "crop_aspect": "random"}


def test_aspect_buckets_are_read_and_written_back(tmp_path: Path) -> None:
    entry = {**CHOOSING, "crop_aspect_buckets": [0.75, {"aspect": 1.5, "weight": 3}]}
    loaded = load_with(tmp_path, {}, entry)
    (dataset,) = loaded.datasets
    assert dataset.crop_aspect_buckets == (AspectBucket(0.75, 1.0), AspectBucket(1.5, 3.0))
    assert not [note for note in loaded.notes if "crop_aspect" in note]
    written = json.loads(dataset.model_dump_json())
    assert written["crop_aspect_buckets"] == [{"aspect": 0.75, "weight": 1.0}, {"aspect": 1.5, "weight": 3.0}]
    assert ImageDataset(**written) == dataset


def test_bad_aspect_buckets_are_told_where_they_stand(tmp_path: Path) -> None:
    told = problems_of(tmp_path, {}, {**CHOOSING, "crop_aspect_buckets": ["4:3"]})
    assert "multidatabackend.json: pictures: crop_aspect_buckets" in told
    assert "an aspect ratio is width / height" in told and "(write 1.333)" in told


def test_aspects_can_be_chosen_in_every_way(tmp_path: Path) -> None:
    for aspect in ("square", "preserve", "closest", "random"):
        for style in ("center", "centre", "corner", "random"):
            entry = {"crop": True, "crop_aspect": aspect, "crop_style": style, "crop_aspect_buckets": [1.0, 1.5]}
            (dataset,) = load_with(tmp_path, {}, entry).datasets
            assert (dataset.crop_aspect, dataset.crop_style) == (aspect, style.replace("re", "er"))
    assert "'face' is not built yet" in problems_of(tmp_path, {}, {"crop": True, "crop_style": "face"})
