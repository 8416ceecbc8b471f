"""Datasets: what they inherit, and that every inherited key is a key of both files."""

from __future__ import annotations

from pathlib import Path

from sana_tune.config.datasets import INHERITED, ImageDataset, inherit
from sana_tune.config.schema import DataConfig
from tests.config.helpers import load_with


def test_inherited_keys_exist_on_both_sides() -> None:
    assert len(INHERITED) > 10
    assert set(INHERITED) <= set(ImageDataset.model_fields) & set(DataConfig.model_fields)


def test_the_entry_wins_over_the_config(tmp_path: Path) -> None:
    data = load_with(tmp_path, {"train_batch_size": 3, "missing_caption": "skip"}).config.data
    entry = inherit({"id": "a", "train_batch_size": 5}, data)
    assert (entry["train_batch_size"], entry["missing_caption"]) == (5, "skip")
    assert "minimum_image_size" not in entry, "what nobody set stays unset"
