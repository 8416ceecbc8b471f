"""What a run is called outside, and the id that it keeps."""

from __future__ import annotations

from pathlib import Path

import pytest

from sana_tune.config.watching import parse_hub_id
from sana_tune.watch.names import ID_FILE, as_hub_name, hub_name, logging_folder, run_id, run_name
from tests.config.helpers import load_with


def test_names_follow_from_the_folder_unless_they_are_given(tmp_path: Path):
    config = load_with(tmp_path, {"output_dir": "output/my dog!"}).config
    assert run_name(config) == "my dog!" and hub_name(config) == "my-dog"
    assert logging_folder(config) == Path("output/my dog!/logs")
    config = load_with(tmp_path, {"tracker_run_name": "second", "logging_dir": "logs"}).config
    assert run_name(config) == hub_name(config) == "second" and logging_folder(config) == Path("logs")
    assert hub_name(load_with(tmp_path, {"tracker_project_name": "dogs"}).config) == "dogs"
    assert hub_name(load_with(tmp_path, {"tracker_project_name": "dogs", "hub_model_id": "me/rex"}).config) == "me/rex"


@pytest.mark.parametrize("text", ["a--b", "../x", "ä ö", "x.git", "-.-", "n" * 200, "run_1.5", "a..b"])
def test_a_name_for_the_hub_is_one_that_it_takes(text: str):
    assert parse_hub_id(as_hub_name(text)) == as_hub_name(text)


def test_a_resumed_run_keeps_its_id_and_a_new_one_gets_another(tmp_path: Path):
    first = run_id(tmp_path, resumed=False)
    assert run_id(tmp_path, resumed=True) == first
    second = run_id(tmp_path, resumed=False)
    assert second != first and run_id(tmp_path, resumed=True) == second
    (tmp_path / ID_FILE).write_text('{"id": "../../x"}')
    assert run_id(tmp_path, resumed=True) not in ("../../x", second)
    assert run_id(tmp_path / "absent" / "folder", resumed=True), "also where nothing can be kept"
