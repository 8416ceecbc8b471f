"""The JSON Schemas say what the loader says: they take what it takes, and see what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from sana_tune.config.datasets import DATASET_KINDS
from sana_tune.config.describe import options
from sana_tune.config.json_schema import json_schema
from sana_tune.config.load import load
from sana_tune.config.schema import section_of
from sana_tune.errors import UserError

CONFIG = Draft202012Validator(json_schema("config"))
DATASETS = Draft202012Validator(json_schema("multidatabackend"))
MODEL = {"pretrained_model_name_or_path": "nano", "data_backend_config": "multidatabackend.json"}
PICTURES = {"id": "pictures", "instance_data_dir": "pictures"}

# Values of all kinds, as they stand in files.
VALUES: tuple[Any, ...] = (
    *(None, "", True, 0, 1, 0.5, -1, 3.0, "0", "4", " 2 ", "+3", "1_000", "1e-5", ".5", "False", "YES", "cosine"),
    *("1024x768,512", "{env:THERE}", [], {}, [1024, "512x768"], [0.75, {"aspect": 1.5, "weight": 2}], ["one", "two"]),
)  # fmt: skip


def loads(folder: Path, config: Any, entries: Any) -> bool:
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "multidatabackend.json").write_text(json.dumps(entries), encoding="utf-8")
    try:
        load(folder / "config.json", {}, {"THERE": "1"})
    except UserError:
        return False
    return True


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()


def test_they_are_schemas():
    for validator in (CONFIG, DATASETS):
        Draft202012Validator.check_schema(validator.schema)
    assert CONFIG.schema["$schema"].endswith("2020-12/schema")
    assert set(section_of()) < set(CONFIG.schema["properties"])
    for name, kind in DATASET_KINDS.items():
        assert set(kind.model_fields) < set(DATASETS.schema["$defs"][name]["properties"])
    with pytest.raises(KeyError):
        json_schema("prompts")


def test_an_editor_offers_our_settings_with_help_and_default():
    offered = CONFIG.schema["properties"]
    assert "validation_steps" not in offered and "--seed" not in offered, "known, but not offered"
    assert offered["learning_rate"]["default"] == 1e-5
    assert offered["learning_rate"]["description"] == "peak learning rate [number, above 0; default: 1e-5]"
    for option in options():
        kind = "image" if option.home == "dataset" else option.home
        place = CONFIG.schema if option.home == "config" else DATASETS.schema["$defs"][kind]
        assert place["properties"][option.name]["description"].startswith(option.meaning)


def test_whatever_loads_is_valid(tmp_path):
    """Every key of config.json and of a dataset with every kind of value."""
    loaded = refused = seen = 0
    for key in section_of():
        for value in VALUES:
            config = {**MODEL, key: value}
            valid = CONFIG.is_valid(config)
            if loads(tmp_path, config, [PICTURES]):
                loaded += 1
                assert valid, f"{key}: {value!r} loads"
            else:
                refused += 1
                seen += not valid
    for key in DATASET_KINDS["image"].model_fields:
        for value in VALUES:
            entries = [{**PICTURES, key: value}]
            if loads(tmp_path, MODEL, entries):
                loaded += 1
                assert DATASETS.is_valid(entries), f"{key}: {value!r} loads"
            else:
                refused += 1
                seen += not DATASETS.is_valid(entries)
    assert loaded > 600 and refused > 600
    assert seen / refused > 0.85, "numbers in text out of range, and rules between settings, are the loader's alone"


GOOD: dict[str, dict[str, Any]] = {
    "text for numbers": {"learning_rate": "1e-4", "seed": "20", "max_train_steps": "1000"},
    "dashes": {"--seed": 1, "--learning-rate": 1e-5, "lr-warmup-steps": 3, "--lr_power": "1.0"},
    "marks of a file": {"$schema": "x", "$comment": "mine", "__origins__": {}, "lora_disabled_fields__": 1},
    "a placeholder": {"train_batch_size": "{env:BATCH}", "output_dir": "{env:ROOT}/run"},
    "SimpleTuner's keys": {
        "validation_steps": 10,
        "--push_to_hub": True,
        "trust_remote_code": True,
        "num_processes": 1,
    },
    "off": {"lora_rank": 16, "flow_sigmoid_scale": "1.0", "delete_unwanted_images": "false"},
    "noise levels": {"flow_custom_timesteps": [250, "500", 1000.0]},
    "noise levels as text": {"--flow_custom_timesteps": "0.25, 0.5,1"},
    "one noise level": {"flow_custom_timesteps": 0.5, "flow_distribution": "custom", "loss_type": "mse"},
    "nothing": {"seed": None, "revision": "", "use_ema": ""},
}


@pytest.mark.parametrize("what", GOOD)
def test_spellings_that_load_are_valid(what, tmp_path, monkeypatch):
    monkeypatch.setenv("BATCH", "2")
    config = {**MODEL, **GOOD[what]}
    assert [error.message for error in CONFIG.iter_errors(config)] == []
    (tmp_path / "multidatabackend.json").write_text(json.dumps([PICTURES]))
    (tmp_path / "config.json").write_text(json.dumps(config))
    load(tmp_path / "config.json", {}, {"BATCH": "2", "ROOT": "here"})


BAD: dict[str, Any] = {
    "a typo": {**MODEL, "learning_rat": 1},
    "a setting of a dataset": {**MODEL, "repeats": 3},
    "no model": {"data_backend_config": "x"},
    "no datasets": {"pretrained_model_name_or_path": "nano"},
    "an empty model": {**MODEL, "pretrained_model_name_or_path": ""},
    "a word for a number": {**MODEL, "max_train_steps": "many"},
    "half a step": {**MODEL, "max_train_steps": 1.5},
    "out of range": {**MODEL, "learning_rate": -1},
    "above the range": {**MODEL, "ema_decay": 1},
    "a switch for a number": {**MODEL, "seed": True},
    "a number for a switch": {**MODEL, "use_ema": 2},
    "a list for a number": {**MODEL, "resolution": [512, 1024]},
    "no such choice": {**MODEL, "mixed_precision": "fp8"},
    "no such loss": {**MODEL, "loss_type": "l3"},
    "no noise levels": {**MODEL, "flow_custom_timesteps": [0.5, 0]},
    "a word for noise levels": {**MODEL, "flow_custom_timesteps": "0.5;0.6"},
    "no such optimizer": {**MODEL, "optimizer": "adamw"},
    "a size that is none": {**MODEL, "validation_resolution": "large"},
    "what is not built yet": {**MODEL, "fuse_optimizer": True},
    "what is refused": {**MODEL, "delete_unwanted_images": True},
    "a renamed key with a bad value": {**MODEL, "validation_steps": -5},
    "a list": [],
}  # fmt: skip
BAD_DATASETS: dict[str, Any] = {
    "an object": PICTURES,
    "something beside the datasets": {"datasets": [PICTURES], "mine": 1},
    "no entry": [],
    "a typo": [{**PICTURES, "repeat": 1}],
    "a setting of config.json": [{**PICTURES, "learning_rate": 1}],
    "no id": [{"instance_data_dir": "pictures"}],
    "no folder": [{"id": "a"}],
    "no such aspect": [{**PICTURES, "crop_aspect": "round"}],
    "no such type": [{**PICTURES, "dataset_type": "video"}],
    "an aspect in pixels": [{**PICTURES, "crop_aspect": "closest", "crop_aspect_buckets": [1024]}],
    "a setting of pictures": [PICTURES, {"id": "text", "dataset_type": "text_embeds", "repeats": 1}],
    "half a repeat": [{**PICTURES, "repeats": 0.5}],
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_config_is_seen_by_both(what, tmp_path):
    assert not CONFIG.is_valid(BAD[what]) and not loads(tmp_path, BAD[what], [PICTURES])


@pytest.mark.parametrize("what", BAD_DATASETS)
def test_bad_datasets_are_seen_by_both(what, tmp_path):
    assert not DATASETS.is_valid(BAD_DATASETS[what]) and not loads(tmp_path, MODEL, BAD_DATASETS[what])


@pytest.mark.parametrize(
    "entries",
    [
        [PICTURES],
        {"$schema": "x", "datasets": [PICTURES]},
        [PICTURES, {"id": "text", "dataset_type": "text_embeds", "default": True, "write_batch_size": "64"}],
        [PICTURES, {"id": "old", "disable": True}, {"id": "off", "dataset_type": "text_embeds", "disabled": "true"}],
        [{**PICTURES, "--repeats": 2, "is_regularization_data": "false", "start_epoch": 1}],
        [PICTURES, {"id": "latents", "dataset_type": "image_embeds", "anything": 1}],
        [
            {**PICTURES, "conditioning_data": "m", "small_buckets": "merge", "max_num_samples": 5, "end_step": "9"},
            {**PICTURES, "id": "later", "start_epoch": 2, "probability": 0.5, "is_regularisation_data": True},
            {**PICTURES, "id": "held", "dataset_type": "eval"},
            {
                "id": "m",
                "dataset_type": "conditioning",
                "conditioning_type": "segmentation",
                "instance_data_dir": "masks",
                "crop": True,
                "resolution": 512,
            },
        ],
    ],
)
def test_datasets_that_load_are_valid(entries, tmp_path):
    assert [error.message for error in DATASETS.iter_errors(entries)] == []
    assert loads(tmp_path, MODEL, entries)


def test_what_becomes_of_a_foreign_key_is_said():
    patterns = CONFIG.schema["patternProperties"]
    told = patterns["^(--)?enable[-_]watermark$"]
    assert told["deprecated"] is True and "no effect in this version" in told["description"]
    assert patterns["^(--)?validation[-_]steps$"]["$ref"] == "#/properties/validation_step_interval"
    assert "name the repository" in patterns["^(--)?model[-_]flavour$"]["description"]
    assert len([one for one in patterns.values() if one.get("deprecated")]) >= 110
