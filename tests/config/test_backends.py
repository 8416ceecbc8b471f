"""multidatabackend.json: its two shapes, placeholders, and what must hold between datasets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sana_tune.config.load import Loaded, load
from sana_tune.errors import UserError
from tests.config.helpers import write_files


def loaded(folder: Path, content: Any, environ: dict[str, str] | None = None) -> Loaded:
    path = write_files(folder)
    (folder / "multidatabackend.json").write_text(json.dumps(content), encoding="utf-8")
    return load(path, {}, environ=environ or {})


def entry(**values: Any) -> dict[str, Any]:
    return {"id": "a", "instance_data_dir": "pictures", "resolution": 64, **values}


def test_a_list_beside_its_schema(tmp_path: Path) -> None:
    found = loaded(tmp_path, {"$schema": "x", "datasets": [entry()]})
    assert [dataset.id for dataset in found.datasets] == ["a"]
    with pytest.raises(UserError, match="dataset: does not belong beside datasets"):
        loaded(tmp_path, {"datasets": [entry()], "dataset": []})


def test_it_may_be_yaml(tmp_path: Path) -> None:
    path = write_files(tmp_path, {"data_backend_config": str(tmp_path / "mine.yaml")})
    (tmp_path / "mine.yaml").write_text("- id: a  # ours\n  instance_data_dir: pictures\n  resolution: 64\n")
    assert load(path, {}, environ={}).datasets[0].id == "a"


def test_placeholders_of_a_dataset(tmp_path: Path) -> None:
    values = {"instance_data_dir": "{env:DATA}/{id}", "cache_dir_vae": "{output_dir}/{model_family}/{id}"}
    found = loaded(tmp_path, [entry(**values, instance_prompt="a {curly} one")], {"DATA": "/data"}).datasets[0]
    assert found.instance_data_dir == "/data/a" and found.cache_dir_vae == f"{tmp_path / 'output'}/sana/a"
    assert found.instance_prompt == "a {curly} one"
    with pytest.raises(UserError, match=r"there is no placeholder \{model\}"):
        loaded(tmp_path, [entry(cache_dir_vae="{model}/x")])


def test_an_entry_that_is_not_needed_is_noted(tmp_path: Path) -> None:
    found = loaded(tmp_path, [entry(), {"id": "latents", "dataset_type": "image_embeds"}])
    assert any("latents: latents need no entry" in note for note in found.notes)


def test_an_entry_without_id_is_told_by_its_number(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="entry 2: id: must be set and is not"):
        loaded(tmp_path, [entry(), {"instance_data_dir": "x"}])


def test_two_spellings_in_one_dataset(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="means the same setting as disabled"):
        loaded(tmp_path, [entry(disabled=False, disable=False)])


def test_leading_dashes_are_nothing(tmp_path: Path) -> None:
    assert loaded(tmp_path, [{**entry(), "--repeats": "3"}]).datasets[0].repeats == 3
