"""A prompt library that is wrong is told whole; each prompt's settings are read by any of their names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sana_tune.config.prompt_library import PromptEntry, read_library
from sana_tune.errors import UserError


def library(folder: Path, content: object) -> str:
    path = folder / "library.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


def test_texts_and_objects(tmp_path):
    entry = {"prompt": "b", "validation_guidance": 3, "validation_num_inference_steps": "9", "resolution": "64x32"}
    found = read_library(library(tmp_path, {"a": "a star", "b": entry, "c": {"prompt": "c", "seed": None}}), "main")
    assert found["a"] == PromptEntry(prompt="a star") and found["c"] == PromptEntry(prompt="c")
    assert (found["b"].guidance, found["b"].steps, str(found["b"].resolution[0])) == (3.0, 9, "64x32")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (["a star"], ["put { } around"]),
        (
            {"a": "", "b": ["x"], "c": "fine", "d": {"prompt": "  "}},
            ["library.json: a: the prompt must be a text", "library.json: b: the prompt", "d: prompt: the prompt must"],
        ),
        ({"validation": "a star"}, ["this nickname is the main prompt's"]),
        ({"a": {"seed": 3}}, ["library.json: a: prompt: must be set"]),
        ({"a": {"prompt": "x", "seeds": 3}}, ["a: seeds: a prompt has no such setting", "did you mean seed?"]),
        ({"a": {"prompt": "x", "lora": 3}}, ["a prompt has: prompt, negative_prompt, seed"]),
        ({"a": {"prompt": "x", "steps": 3, "num_inference_steps": 4}}, ["means the same as another of its settings"]),
        (
            {"a": {"prompt": "x", "steps": 0, "guidance": "much"}, "b": {"prompt": "y", "noise_scheduler": "ddim"}},
            ["a: steps: must be greater", "a: guidance: must be a valid number", "'ddim' cannot be used"],
        ),
        ({"a": {"prompt": "x", "resolution": "large"}}, ["a size is N or WxH"]),
    ],
)
def test_a_wrong_library_is_told_whole(content, expected, tmp_path):
    with pytest.raises(UserError) as caught:
        read_library(library(tmp_path, content), "validation")
    assert [part for part in expected if part not in str(caught.value)] == []


def test_a_library_that_is_not_there_is_told():
    with pytest.raises(UserError, match=r"user_prompt_library\) must exist"):
        read_library("nowhere.json", "validation")
