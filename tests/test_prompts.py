"""The prompts of validation pictures: the library's, then the main one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sana_tune.config.built_in_prompts import BUILT_IN
from sana_tune.config.schema import Config, EmaConfig, ValidationConfig
from sana_tune.prompts import MAIN, UNCONDITIONAL, Prompt, drawing_lines, preview_steps, prompts_of, slug, slugs


def library(folder: Path, content: object) -> str:
    path = folder / "library.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


def test_the_library_comes_first_and_every_text_is_cleaned(tmp_path):
    path = library(tmp_path, {"b": " A Star ", "a": "A Circle"})
    settings = ValidationConfig(
        validation_prompt="  A Cat ", user_prompt_library=path, validation_negative_prompt=" Blurry"
    )
    found = prompts_of(settings, lambda text: text.strip().lower())
    assert [(name, prompt.text) for name, prompt in found.items()] == [
        ("b", "a star"), ("a", "a circle"), (MAIN, "a cat"), (UNCONDITIONAL, ""),
    ]  # fmt: skip
    assert {prompt.negative for prompt in found.values()} == {"blurry"}


@pytest.mark.parametrize("prompt", [None, ""])
def test_no_prompt_is_none(prompt):
    assert prompts_of(ValidationConfig(validation_prompt=prompt), str.strip) == {}


def test_the_empty_prompt_can_be_left_out_and_named():
    settings = ValidationConfig(validation_prompt="a", validation_disable_unconditional=True)
    assert list(prompts_of(settings, str.strip)) == [MAIN]


def test_the_built_in_library_comes_after_ones_own(tmp_path):
    path = library(tmp_path, {"fox_snow": "my fox"})
    settings = ValidationConfig(
        validation_prompt="a", user_prompt_library=path, validation_prompt_library=True,
        validation_disable_unconditional=True,
    )  # fmt: skip
    found = prompts_of(settings, str.strip)
    assert list(found)[:2] == ["fox_snow", MAIN] and found["fox_snow"].text == "my fox"
    assert len(found) == len(BUILT_IN) + 1


def test_a_prompts_own_settings_win(tmp_path):
    entry = {
        "prompt": " Ring", "negative_prompt": " Bad", "seed": 5, "validation_guidance": 2, "guidance_rescale": 0.5,
        "num_inference_steps": 8, "resolution": "64x96,32", "images": 3, "noise_scheduler": "euler",
    }  # fmt: skip
    path = library(tmp_path, {"ring": entry, "plain": {"prompt": "a plain one"}})
    settings = ValidationConfig(user_prompt_library=path, validation_num_inference_steps=30, num_validation_images=2)
    found = prompts_of(settings, lambda text: text.strip().lower())
    sizes = ((64, 96), (32, 32))
    assert found["ring"] == Prompt("ring", "ring", "bad", sizes, 8, 2.0, 0.5, "euler", 3, 5)
    assert found["plain"] == Prompt("plain", "a plain one", steps=30, images=2)


def test_a_library_of_a_packaged_example_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = ValidationConfig(user_prompt_library="config/examples/nano/user_prompt_library.json")
    assert len(prompts_of(settings, str.strip)) >= 2


# ---- in words ----


def lines(validation: dict, ema: dict | None = None, **prompts: Prompt) -> tuple[str, ...]:
    config = Config.model_construct(validation=ValidationConfig(**validation), ema=EmaConfig(**(ema or {})))
    return drawing_lines(config, prompts, [(64, 64)])


def test_what_is_drawn_and_when_is_said():
    told = lines(
        {"validation_epoch_interval": 0.5, "validate_after_step": 10, "validation_preview": True,
         "validation_on_startup": True},
        {"use_ema": True}, a=Prompt("a", "x", images=2), b=Prompt("b", "y", sizes=((32, 64),), steps=8),
    )  # fmt: skip
    assert told == (
        "2 prompts (a, b): 3 pictures of 64x64, 32x64 by dpm++ in 20, 8 steps, guidance 4.5",
        "drawn of the base model first, whenever the run starts, every 500 steps and at the end of every 0.5 epochs "
        "from step 10 on, and at the end; with the raw weights and the averaged ones",
        "previews after sampler steps 5, 10, 15, 20",
    )
    assert (
        lines({"disable_benchmark": True, "validation_step_interval": 0}, a=Prompt("a", "x"))[1] == "drawn at the end"
    )
    assert lines({}) == ()
    script = {"validation_method": "external-script", "validation_external_script": "draw"}
    assert lines(script, a=Prompt("a", "x"))[0].startswith("drawn by validation_external_script")


@pytest.mark.parametrize(
    ("steps", "every", "expected"), [(20, 5, (5, 10, 15, 20)), (8, 5, (5, 8)), (4, 5, (4,)), (3, 1, (1, 2, 3))]
)
def test_previews_come_at_each_nth_step_and_the_last(steps, every, expected):
    assert preview_steps(steps, every) == expected


# ---- names of files ----


@pytest.mark.parametrize(
    ("name", "expected"),
    [("zib", "zib"), ("zib_on_hill", "zib-on-hill"), ("two words", "two-words"), ("a2-b", "a2-b")],
)
def test_plain_names_stay_readable(name: str, expected: str):
    assert slug(name) == expected


def test_other_names_are_safe_and_apart():
    names = [
        "Zib",
        "ZIB",
        "é",
        "ü",
        "星",
        "a/b",
        "a\\b",
        "../x",
        "con",
        "",
        "a" * 300,
        "a" * 299 + "b",
        "a?b",
        ".",
        "a__b",
    ]
    made = [slug(name) for name in names]
    assert len({each.lower() for each in made}) == len(made)
    for each in made:
        assert each and len(each) <= 60 and set(each) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
        assert not each.startswith("-") and not each.endswith("-")


def test_two_names_never_share_a_slug():
    made = slugs(["a b", "a_b", "a-b"])
    assert list(made.values()) == ["a-b", "a-b-2", "a-b-3"]
