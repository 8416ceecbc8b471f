"""The blocks parquet and huggingface: what they take, and all that is wrong with one at once."""

from __future__ import annotations

import json

import pytest

from sana_tune.config.datasets import ImageDataset
from sana_tune.config.sources import CaptionTable, HubOptions, parse_hub, parse_table


def test_a_table_with_everything():
    block = {
        "path": "t.parquet", "filename_column": "name", "caption_column": ["short", "long"],
        "fallback_caption_column": "tags", "width_column": "w", "height_column": "h",
        "identifier_includes_extension": "true", "$comment": "mine",
    }  # fmt: skip
    expected = CaptionTable("t.parquet", "name", ("short", "long"), "tags", "w", "h", True)
    assert parse_table(block) == expected == parse_table(expected) and str(expected) == "t.parquet"
    assert parse_table({"path": "t.csv", "caption_column": "c"}) == CaptionTable("t.csv", caption_columns=("c",))
    assert parse_table(None) is None is parse_table("")


@pytest.mark.parametrize(
    "block, words",
    [
        ([], "parquet is a block such as"),
        ({}, "path must name the table"),
        (
            {"path": 3, "caption_column": [1]},
            "path must be a text; found 3; path must name the table; caption_column must",
        ),
        ({"path": "t", "width_column": "w"}, "width_column and height_column must be given together"),
        ({"path": "t", "identifier_includes_extension": "maybe"}, "must be true or false; found 'maybe'"),
        ({"path": "t", "captoin_column": "c"}, "parquet has no captoin_column; did you mean caption_column?"),
    ],
)
def test_a_table_that_is_wrong(block, words: str):
    with pytest.raises(ValueError) as error:
        parse_table(block)
    assert words in str(error.value)


def test_how_a_hub_dataset_is_loaded():
    block = {"subset": "en", "cache_dir": "c", "num_proc": "4", "filter_func": {"min_width": 512, "min_height": "64"}}
    expected = HubOptions("en", "c", 4, 512, 64)
    assert parse_hub(block) == expected == parse_hub(expected)
    assert str(expected) == "subset en, cache_dir c, num_proc 4, min_width 512, min_height 64"
    assert parse_hub({}) == HubOptions() and str(HubOptions()) == "defaults"
    off = {"streaming": False, "composite_image_config": {"enabled": False}, "auto_load": True, "filter_func": None}
    assert parse_hub(off) == HubOptions()


@pytest.mark.parametrize(
    "block, words",
    [
        ({"streaming": True}, "streaming cannot be used: pictures are counted and hashed before training"),
        (
            {"composite_image_config": {"enabled": True}},
            "composite_image_config cannot be used: cut composite pictures",
        ),
        ({"filter_func": {"collection": ["photo"]}}, "collection cannot be used: select the rows before"),
        (
            {"num_proc": 0, "filter_func": {"min_width": -1}},
            "min_width must be a whole number of 0 or more; found -1; num_proc",
        ),
        ({"filter_func": {"width": 1}}, "filter_func has no width"),
    ],
)
def test_a_hub_block_that_is_wrong(block, words: str):
    with pytest.raises(ValueError) as error:
        parse_hub(block)
    assert words in str(error.value)


def test_blocks_are_written_as_they_are_read():
    blocks = {
        "parquet": {"path": "t.csv", "caption_column": ["a", "b"]},
        "huggingface": {"num_proc": 2, "filter_func": {"min_width": 8}},
    }
    found = ImageDataset(id="a", **blocks)  # type: ignore[arg-type]
    written = json.loads(found.model_dump_json(include=set(blocks)))
    again = ImageDataset(id="a", **written)
    assert (again.parquet, again.huggingface) == (found.parquet, found.huggingface) != (None, None)
