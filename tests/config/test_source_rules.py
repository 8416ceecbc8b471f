"""What a `type` needs and leaves unused, as a user would write it in multidatabackend.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sana_tune.config.secrets import MASK
from sana_tune.config.source_rules import NEEDED, SIGNS, STRATEGIES
from tests.config.helpers import load_with, problems_of

AWS = {"type": "aws", "instance_data_dir": None, "aws_bucket_name": "b"}
CSV = {"type": "csv", "instance_data_dir": None, "csv_file": "p.csv", "csv_cache_dir": "kept"}
HUB = {"type": "huggingface", "instance_data_dir": None, "dataset_name": "owner/name"}
TABLE = {"parquet": {"path": "t.parquet"}}


@pytest.mark.parametrize("entry, source, strategy", [
    (AWS | {"aws_data_prefix": "cats"}, "s3://b/cats", "filename"),
    (AWS | {"instance_data_dir": "cats"}, "s3://b/cats", "filename"),
    (CSV, "p.csv", "csv"),
    (HUB, "owner/name (train)", "huggingface"),
    (HUB | {"caption_strategy": "instanceprompt", "instance_prompt": "x"}, "owner/name (train)", "instanceprompt"),
])  # fmt: skip
def test_a_dataset_of_each_type(tmp_path: Path, entry: dict[str, Any], source: str, strategy: str):
    (found,) = load_with(tmp_path, {}, entry).datasets
    assert (found.source, found.caption_strategy, found.type) == (source, strategy, entry["type"])


def test_a_table_of_types_without_one_that_is_told():
    assert set(NEEDED) == set(STRATEGIES) == {"local", "aws", "csv", "huggingface"} and set(SIGNS) < set(NEEDED)


@pytest.mark.parametrize("entry, words", [
    (AWS | {"aws_bucket_name": None}, "type aws needs aws_bucket_name, which is not set"),
    (CSV | {"csv_file": None}, "type csv needs csv_file"),
    (CSV | {"csv_cache_dir": None}, "type csv needs csv_cache_dir"),
    (HUB | {"dataset_name": None}, "type huggingface needs dataset_name"),
    ({"instance_data_dir": None}, "type local needs instance_data_dir"),
    (AWS | {"type": "local"}, 'did you mean "type": "aws"?'),
    (AWS | {"aws_access_key_id": "AKIA"}, "must be given together; found only aws_access_key_id"),
    (AWS | {"aws_session_token": "t"}, "aws_session_token needs the two keys"),
    (AWS | {"aws_access_key_id": MASK, "aws_secret_access_key": "x"}, "the mask that stands in the place of a secret"),
    (AWS | {"aws_endpoint_url": "s3.example.com"}, "must be an address such as https://s3.example.com"),
    (AWS | {"aws_data_prefix": "a", "instance_data_dir": "b"}, "name the same folder; found 'a' and 'b'"),
    (AWS | {"caption_strategy": "csv"}, "type aws takes filename, textfile, instanceprompt, parquet; found csv"),
    ({"caption_strategy": "csv"}, 'use "type": "csv"'),
    (CSV | {"caption_strategy": "textfile"}, "type csv takes csv, filename, instanceprompt; found textfile"),
    (HUB | {"caption_strategy": "filename"}, "type huggingface takes huggingface, instanceprompt; found filename"),
    ({"caption_strategy": "parquet"}, "parquet needs the block parquet"),
    ({"metadata_backend": "parquet"}, "parquet needs the block parquet"),
    ({"metadata_backend": "huggingface"}, "huggingface is for type huggingface; found type local"),
    (CSV | TABLE | {"metadata_backend": "parquet"}, "parquet is for types local and aws; found type csv"),
    ({"cache_dir_vae": "s3://b/latents"}, "must be a folder of this machine; found the address s3://b/latents"),
    (CSV | {"csv_cache_dir": "s3://b/kept"}, "must be a folder of this machine"),
    ({"type": "webshart"}, "unpack them into a folder"),
    ({"type": "memory"}, "it holds nothing that could be read"),
    ({"type": "s3"}, "must be local or aws or csv or huggingface"),
])  # fmt: skip
def test_what_is_missing_or_does_not_fit(tmp_path: Path, entry: dict[str, Any], words: str):
    assert words in problems_of(tmp_path, {}, entry)


def test_an_address_for_all_caches(tmp_path: Path):
    assert "cache_dir: must be a folder of this machine" in problems_of(tmp_path, {"cache_dir": "s3://b/c"})


@pytest.mark.parametrize("entry, words", [
    (AWS | {"csv_file": "x.csv"}, "csv_file has no effect: type aws does not use what belongs to type csv"),
    ({"aws_bucket_name": "b", "aws_region_name": "r"}, "aws_bucket_name, aws_region_name have no effect"),
    (CSV | {"instance_data_dir": "x"}, "instance_data_dir has no effect with type csv"),
    (TABLE, "the block parquet has no effect"),
    (HUB | {"dataset_name": ".", "revision": "main"}, "revision has no effect: . is a folder here"),
])  # fmt: skip
def test_what_is_not_used_is_said(tmp_path: Path, entry: dict[str, Any], words: str):
    assert any(words in note for note in load_with(tmp_path, {}, entry).notes)


def test_only_an_instance_prompt_asks_for_no_table(tmp_path: Path):
    entry = HUB | {"caption_strategy": "filename", "only_instance_prompt": True, "instance_prompt": "a zib"}
    assert load_with(tmp_path, {}, entry).datasets[0].only_instance_prompt
