"""The prompts of validation pictures: the library's, then the main one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sana_tune.config.schema import ValidationConfig
from sana_tune.errors import UserError
from sana_tune.prompts import MAIN, prompts_of


def library(folder: Path, content: object) -> str:
    path = folder / "library.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


def test_the_library_comes_first_and_every_text_is_cleaned(tmp_path):
    path = library(tmp_path, {"b": " A Star ", "a": "A Circle"})
    settings = ValidationConfig(validation_prompt="  A Cat ", user_prompt_library=path)
    found = prompts_of(settings, lambda text: text.strip().lower())
    assert list(found.items()) == [("b", "a star"), ("a", "a circle"), (MAIN, "a cat")]


@pytest.mark.parametrize("prompt", [None, ""])
def test_no_prompt_is_none(prompt):
    assert prompts_of(ValidationConfig(validation_prompt=prompt), str.strip) == {}


def test_a_library_of_a_packaged_example_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = ValidationConfig(user_prompt_library="config/examples/nano/user_prompt_library.json")
    assert len(prompts_of(settings, str.strip)) >= 2


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (["a star"], ["put { } around"]),
        (
            {"a": "", "b": ["x"], "c": "fine"},
            ["library.json: a: the prompt must be a text", "library.json: b: the prompt"],
        ),
        ({MAIN: "a star"}, ["this nickname is the main prompt's"]),
    ],
)
def test_a_wrong_library_is_told_whole(content, expected, tmp_path):
    with pytest.raises(UserError) as caught:
        prompts_of(ValidationConfig(user_prompt_library=library(tmp_path, content)), str.strip)
    assert len(caught.value.problems) == len(expected)
    assert all(part in str(caught.value) for part in expected)


def test_a_library_that_is_not_there_is_told():
    with pytest.raises(UserError, match=r"user_prompt_library\) must exist"):
        prompts_of(ValidationConfig(user_prompt_library="nowhere.json"), str.strip)
