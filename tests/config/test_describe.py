"""Every setting described as a user reads it: none forgotten, none without help, words instead of types."""

from __future__ import annotations

from collections import Counter

import pytest

from sana_tune.config import legacy
from sana_tune.config.choices import OPTIMIZERS
from sana_tune.config.datasets import DATASET_KINDS, INHERITED
from sana_tune.config.describe import FILES, Option, foreign_keys, groups, options, plain, schema_path, told
from sana_tune.config.schema import SECTIONS, section_of


def named(name: str, home: str = "config") -> Option:
    (found,) = (option for option in options() if (option.name, option.home) == (name, home))
    return found


def test_every_key_is_there_once_and_has_a_help_line():
    found = options()
    homes = Counter(option.home for option in found)
    dataset_only = set(DATASET_KINDS["image"].model_fields) - set(INHERITED)
    assert [option.name for option in found if option.home == "config"] == list(section_of())
    assert {option.name for option in found if option.home == "dataset"} == dataset_only
    entries = {name: len(DATASET_KINDS[name].model_fields) for name in ("text_embeds", "conditioning")}
    assert homes == {"config": len(section_of()), "dataset": len(dataset_only), **entries}
    assert len(found) >= 97 and len({(option.name, option.home) for option in found}) == len(found)
    assert [option.name for option in found if len(option.help.split()) < 2] == []
    assert {option.home for option in found} == set(FILES)


def test_groups_are_the_sections_and_the_entries():
    assert list(groups()) == [*SECTIONS, "dataset", "conditioning", "text_embeds"]
    assert all(title[0].isupper() for title in groups().values())


@pytest.mark.parametrize(
    "name, type_words, default_words",
    [
        ("learning_rate", "number, above 0", "1e-5"),
        ("train_batch_size", "whole number of pictures, 1 or more", "1"),
        ("aspect_bucket_rounding", "whole number, 1 to 9", "2"),
        ("ema_decay", "number, 0 to below 1", "0.995"),
        ("num_train_epochs", "number (epochs), 0 or more", "unset"),
        ("use_ema", "true/false", "false"),
        ("mixed_precision", "bf16, fp16, no", "bf16"),
        ("instance_prompt", "text or list of texts", "unset"),
        ("pretrained_model_name_or_path", "text", "required"),
        ("validation_negative_prompt", "text", '""'),
        ("validation_resolution", "size or list of sizes (px)", "the model's size"),
        ("aspect_bucket_alignment", "whole number of px, 1 or more", "the VAE's factor (32 for Sana)"),
        ("sana_complex_human_instruction", "text or list of lines", "diffusers' own"),
        ("cache_dir_text", "text", "<cache_dir>/text"),
    ],
)
def test_types_and_defaults_in_words(name, type_words, default_words):
    option = named(name)
    assert (option.type_words, option.default_words) == (type_words, default_words)


def test_ranges_units_and_choices():
    option = named("train_batch_size")
    assert (option.type, option.unit, option.range, option.default) == ("whole number", "pictures", "1 or more", 1)
    assert option.shared and not named("learning_rate").shared
    optimizer = named("optimizer")
    assert optimizer.type == "one of" and optimizer.choices == OPTIMIZERS and optimizer.range is None
    assert list(named("crop_style", "dataset").choices) == ["center", "corner", "random"]
    assert named("crop_aspect_buckets", "dataset").type.startswith("list of numbers")
    assert named("id", "dataset").required and named("id", "text_embeds").required
    assert all(option.choices for option in options() if option.type == "one of")


def test_what_stands_for_unset_is_told_once():
    option = named("validation_seed")
    assert option.help == "seed of the pictures; unset = seed"
    assert (option.meaning, option.default_words) == ("seed of the pictures", "seed")
    assert not any("; unset" in option.meaning for option in options())


def test_aliases_are_the_renamed_keys():
    assert named("validation_step_interval").aliases == ("validation_steps",)
    assert named("disabled", "dataset").aliases == ("disable",)
    assert {alias for option in options() for alias in option.aliases} == set(legacy.RENAMED)


def test_every_foreign_key_has_a_fate():
    found = {foreign.name: foreign for foreign in foreign_keys()}
    assert set(found) == legacy.known_foreign_keys() and len(found) >= 110
    assert found["enable_watermark"].fate == "later output" and found["mixflow_enabled"].fate == "later"
    assert told(found["save_total_limit"]) == "renamed: read as checkpoints_total_limit"
    assert told(found["model_flavour"]).startswith("refused unless it is off: name the repository")
    assert told(found["trust_remote_code"]).startswith("no effect here: ")
    assert found["gradient_precision"].off == ("unmodified",)
    assert all(told(foreign) for foreign in found.values())


@pytest.mark.parametrize(
    "value, text", [(True, "true"), (1e-5, "1e-5"), (1.0, "1"), ("", '""'), ("a b", "a b"), (0, "0"), (None, "unset")]
)
def test_values_as_in_a_file(value, text):
    assert plain(value) == text


def test_the_schemas_have_a_place():
    for name in ("config", "multidatabackend"):
        assert schema_path(name).is_file() and schema_path(name).parent.name == "schemas"
    with pytest.raises(ValueError, match="config and multidatabackend"):
        schema_path("prompts")
