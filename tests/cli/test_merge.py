"""Changing files that are there: what is not asked stays as it was written, names and places included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sana_tune.cli.merge import Existing, canonical, changes, merge_datasets, merge_settings
from sana_tune.cli.recipe import Length
from tests.cli.script import answers, model, scan_of

REGULARISATION = {"id": "camera", "instance_data_dir": "camera", "resolution": 512, "is_regularisation_data": True}
AT_1024 = {
    "id": "dog", "instance_data_dir": "photos", "resolution": 1024, "minimum_image_size": 1024, "repeats": 1000,
    "caption_strategy": "instanceprompt", "instance_prompt": "rex", "cache_dir_vae": "cache/dog", "x_unknown": 1,
}  # fmt: skip
AT_512 = {**AT_1024, "id": "dog-512", "resolution": "512", "cache_dir_vae": "cache/dog-512"}
TEXTS = {"id": "texts", "dataset_type": "text_embeds", "default": True}


def existing(*entries: dict[str, Any], **config: Any) -> Existing:
    return Existing(Path("config.json"), config, list(entries or (REGULARISATION, AT_1024, AT_512, TEXTS)))


def test_names_and_their_old_spellings():
    assert canonical("--validation_steps") == "validation_step_interval" and canonical("seed") == "seed"


def test_a_setting_is_found_under_any_name():
    files = existing(**{"--validation-steps": 7, "output_dir": "", "report_to": "wandb"})
    assert files.get("validation_step_interval") == 7 and files.get("report_to") == "wandb"
    assert files.get("output_dir") == "output"  # "" is not set: the default
    assert files.get("validation_prompt") is None and files.get("pretrained_model_name_or_path") is None


def test_the_group_is_the_subjects_folder_at_all_its_sizes():
    files = existing()
    assert files.group == [AT_1024, AT_512] and files.resolutions() == (1024, 512)
    assert files.of_dataset("instance_prompt") == "rex" and files.of_dataset("crop") is False
    assert existing(REGULARISATION, TEXTS).group == [REGULARISATION]
    assert existing({**AT_1024, "disabled": "true"}, AT_512).group == [AT_512]
    assert existing(TEXTS).group == [] and existing(TEXTS).resolutions() == ()
    assert Existing(Path("c"), {}, {"datasets": [AT_512]}).group == [AT_512]
    assert Existing(Path("c"), {}, "nonsense").group == []


def test_what_a_dataset_inherits():
    files = existing({"id": "a", "instance_data_dir": "x"}, resolution="768", caption_strategy="textfile")
    assert files.resolutions() == (768,) and files.of_dataset("caption_strategy") == "textfile"
    assert existing({"id": "a", "instance_data_dir": "x"}).resolutions() == (1024,)  # the default
    area = existing({"id": "a", "instance_data_dir": "x", "resolution": 1.048576, "resolution_type": "area"})
    assert area.resolutions() == (1024,)
    assert existing({"id": "a", "instance_data_dir": "x", "resolution": "big"}).resolutions() == ()


@pytest.mark.parametrize(
    "config, length",
    [
        ({}, Length(epochs=1)),
        ({"max_train_steps": "500"}, Length(steps=500)),
        ({"max_train_steps": 0, "num_train_epochs": 3}, Length(epochs=3)),
        ({"max_train_steps": 500, "num_train_epochs": 3}, Length(steps=500)),
        ({"max_train_steps": "many"}, Length(epochs=1)),
    ],
)
def test_the_length_of_a_file(config, length):
    assert existing(**config).length() == length


def test_what_was_answered_otherwise():
    same = answers(
        model=model("nano"), pictures=scan_of(), captions="instanceprompt", subject="rex", resolutions=(1024, 512),
        length=Length(epochs=1), prompt="p", output="output",
    )  # fmt: skip
    files = existing(pretrained_model_name_or_path="nano", validation_prompt="p")
    assert files.changed(same) == frozenset()
    assert files.changed(answers()) == {"model", "captions", "resolutions", "length", "prompt", "output"}
    assert existing(TEXTS).changed(same) >= {"pictures"}
    listed = existing({**AT_1024, "instance_prompt": ["rex", "max"]})
    assert "subject" not in listed.changed(answers(captions="instanceprompt", subject=("rex", "max")))
    assert "subject" in listed.changed(answers(captions="instanceprompt", subject="rex"))


def test_settings_keep_place_and_spelling():
    old = {"$schema": "s", "--validation_steps": 5, "odd": [1], "seed": 1, "max_train_steps": 9}
    new = {"validation_step_interval": 7, "output_dir": "out", "max_train_steps": None, "report_to": None}
    assert list(merge_settings(old, new).items()) == [
        ("$schema", "s"), ("--validation_steps", 7), ("odd", [1]), ("seed", 1), ("output_dir", "out"),
    ]  # fmt: skip


def merged(changed: set[str], *entries: dict[str, Any], **given: Any) -> Any:
    return merge_datasets(existing(*entries), answers(**given), frozenset(changed))


def test_another_folder():
    found = merged({"pictures"}, pictures=scan_of(folder="new"))
    assert found == [
        REGULARISATION, {**AT_1024, "instance_data_dir": "new"}, {**AT_512, "instance_data_dir": "new"}, TEXTS,
    ]  # fmt: skip


def test_other_captions():
    _, first, second, _ = merged({"captions"}, captions="textfile", pictures=scan_of(20, with_text=20))
    assert first["caption_strategy"] == second["caption_strategy"] == "textfile"
    assert "instance_prompt" not in first and first["repeats"] == 1000 and first["x_unknown"] == 1
    _, first, *_ = merged({"subject"}, captions="instanceprompt", subject="max")
    assert first["instance_prompt"] == "max"


def test_a_resolution_less_is_an_entry_less():
    assert merged({"resolutions"}, resolutions=(512,)) == [REGULARISATION, AT_512, TEXTS]


def test_a_resolution_more_is_a_copy_with_limits_that_follow():
    found = merged({"resolutions"}, AT_1024, TEXTS, resolutions=(1024, 768))
    assert found[0] == AT_1024 and found[2] == TEXTS
    new = found[1]
    assert (new["id"], new["resolution"], new["minimum_image_size"]) == ("dog-768", 768, 768)
    assert "cache_dir_vae" not in new and new["repeats"] == 1000


def test_another_resolution_keeps_the_name():
    (only,) = merged({"resolutions"}, {**AT_1024, "resolution_type": "area", "resolution": 1.0}, resolutions=(768,))
    assert (only["id"], only["resolution"], only["resolution_type"]) == ("dog", 768, "pixel_area")
    (only,) = merged({"resolutions"}, {**AT_1024, "resolution_type": "pixel"}, resolutions=(768,))
    assert only["resolution_type"] == "pixel"


def test_new_ids_are_unique():
    taken = {"id": "dog-768", "instance_data_dir": "other"}
    found = merged({"resolutions"}, AT_1024, taken, resolutions=(1024, 768))
    assert [entry["id"] for entry in found] == ["dog", "dog-768-2", "dog-768"]


def test_a_list_without_pictures_gets_some():
    found = merged({"pictures"}, TEXTS)
    assert [entry["id"] for entry in found] == ["photos", "texts"]
    found = merge_datasets(Existing(Path("c"), {}, {"$schema": "s", "datasets": []}), answers(), frozenset())
    assert found["$schema"] == "s" and [entry["id"] for entry in found["datasets"]] == ["photos", "text-embeds"]


def test_changes_in_words():
    old = {"a": 1, "b": {"c": "x"}, "gone": True, "list": [{"id": "one", "n": 1}, {"id": "two"}], "same": 1}
    new = {"a": 2, "b": {"c": "犬"}, "list": [{"id": "one", "n": 5}, {"id": "three"}], "same": 1, "more": "y" * 80}
    assert changes(old, new) == [
        "a: 1 → 2",
        'b: c: "x" → "犬"',
        "gone: true is taken out",
        "list: one: n: 1 → 5",
        'list: two: {"id": "two"} is taken out',
        'list: three: {"id": "three"} is added',
        f'more: "{"y" * 56}… is added',
    ]
    assert changes([1, 2], [1, 2]) == [] and changes(1, 2) == ["1 → 2"]
