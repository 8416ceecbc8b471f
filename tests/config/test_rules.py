"""Rules between settings, each alone (their messages in the whole are in test_load)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sana_tune.config.load import load
from sana_tune.config.rules import bf16_needs_kahan, check_rules, downsample_needs_both, needs_instance_prompt
from tests.config.helpers import load_with, problems_of, write_list


def test_rules_pass_on_good_settings(tmp_path: Path) -> None:
    loaded = load_with(tmp_path, {}, {"caption_strategy": "instanceprompt", "instance_prompt": "a zib"})
    notes: list[str] = []
    assert check_rules(loaded.config, loaded.datasets, notes) == [] and notes == []


def test_each_rule_can_fail(tmp_path: Path) -> None:
    loaded = load_with(tmp_path, {"weights_dtype": "bf16"})
    config, dataset = loaded.config, loaded.datasets[0]
    assert needs_instance_prompt(config, dataset.model_copy(update={"prepend_instance_prompt": True}))
    assert downsample_needs_both(config, dataset.model_copy(update={"crop": True, "maximum_image_size": 64.0}))
    assert bf16_needs_kahan(config) is None
    adamw = config.optimizer.model_copy(update={"optimizer": "torch-adamw"})
    assert bf16_needs_kahan(config.model_copy(update={"optimizer": adamw}))


def test_what_a_role_leaves_without_effect_is_said(tmp_path: Path) -> None:
    def said(settings: dict[str, Any], *entries: dict[str, Any]) -> str:
        listed = [{"id": "d", "instance_data_dir": "d"}, *entries]
        return "\n".join(load(write_list(tmp_path, settings, listed), {}, {}).notes)

    held = {"id": "h", "dataset_type": "eval", "instance_data_dir": "h"}
    note = "dataset h: repeats, start_step have no effect: it is never trained on"
    assert note in said({}, {**held, "repeats": 3, "start_step": 7})
    assert "never trained on" not in said({"small_buckets": "merge"}, held), (
        "what config.json says for all is no mistake"
    )
    masks = {"id": "m", "dataset_type": "conditioning", "instance_data_dir": "m", "resolution": 512, "crop": True}
    linked = {"id": "e", "instance_data_dir": "e", "conditioning_data": "m"}
    assert "masks m: no dataset names them" in said({}, masks)
    assert "m: resolution, crop have no effect: masks are resized, cropped and cached as" in said({}, masks, linked)
    share = {"masked_loss_probability": 0.5}
    assert "masked_loss_probability has no effect" in said(share, masks, linked)
    assert "masked_loss_probability" not in said(share, {**masks, "conditioning_type": "segmentation"}, linked)
    base = {"regularisation_target": "base"}
    assert "regularisation_target base has no effect" in said(base)
    assert "has no effect: no dataset has is_reg" not in said(
        base, {**linked, "conditioning_data": None, "is_regularisation_data": True}
    )
    assert "dataset e: its probability is 0: it is left out" in said(
        {}, {**linked, "conditioning_data": "", "probability": 0}
    )


# ---- sizes, crops and aspects ----


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"resolution": 1024, "resolution_type": "area"},
         "dataset pictures: resolution: resolution_type area is in megapixels, and resolution is 1024\n"
         "  → use resolution_type pixel_area for px, or give megapixels (1024x1024 px are 1.05)"),
        ({"resolution": 1.0},
         "dataset pictures: resolution: resolution_type pixel_area is in px, and resolution is 1\n"
         "  → use resolution_type area for megapixels, or give px, such as 1024"),
        ({"resolution": 0.5, "resolution_type": "pixel"}, "resolution_type pixel is in px, and resolution is 0.5"),
        ({"resolution": 1.0, "resolution_type": "area", "minimum_image_size": 512},
         "dataset pictures: minimum_image_size: resolution_type area is in megapixels, and minimum_image_size is 512"),
        ({"resolution": 1.0, "resolution_type": "area", "maximum_image_size": 1024}, "and maximum_image_size is 1024"),
        ({"minimum_image_size": 0.25}, "resolution_type pixel_area is in px, and minimum_image_size is 0.25"),
        ({"crop": True, "maximum_image_size": 4.0, "target_downsample_size": 2.0}, "and maximum_image_size is 4"),
        ({"minimum_image_size": 512, "maximum_image_size": 256},
         "minimum_image_size must not be above maximum_image_size; found 512 and 256"),
        ({"crop": True, "maximum_image_size": 256, "target_downsample_size": 32},
         "target_downsample_size must not be below resolution; found 32 and 64"),
        ({"crop": True, "maximum_image_size": 256, "target_downsample_size": 512},
         "target_downsample_size must not be above maximum_image_size; found 512 and 256"),
        ({"crop": True, "crop_aspect": "closest"}, "crop_aspect closest needs crop_aspect_buckets"),
        ({"crop": True, "crop_aspect": "random", "crop_aspect_buckets": []}, "random needs crop_aspect_buckets"),
        ({"minimum_aspect_ratio": 1.5, "maximum_aspect_ratio": 0.5},
         "minimum_aspect_ratio must not be above maximum_aspect_ratio; found 1.5 and 0.5"),
    ],
)  # fmt: skip
def test_settings_of_a_dataset_that_contradict_each_other(tmp_path: Path, entry: dict[str, Any], message: str) -> None:
    told = problems_of(tmp_path, {}, entry)
    assert message in told and "  → " in told


@pytest.mark.parametrize(
    "entry",
    [
        {"resolution": 0.25, "resolution_type": "area", "minimum_image_size": 0.1, "maximum_image_size": 50},
        {"resolution": 16.8, "resolution_type": "area"},
        {"resolution": 512, "resolution_type": "pixel", "minimum_image_size": 512},
        {"minimum_image_size": 0, "maximum_image_size": 0, "target_downsample_size": 0},
        {"minimum_image_size": 512, "maximum_image_size": 512, "target_downsample_size": 512, "resolution": 512,
         "crop": True, "crop_aspect": "square", "crop_style": "center"},
        {"minimum_image_size": 1024, "maximum_image_size": 1024, "target_downsample_size": 1024, "resolution": 1024},
        {"minimum_aspect_ratio": 0.5, "maximum_aspect_ratio": 0.5},
        {"crop_aspect": "closest"},
    ],
)  # fmt: skip
def test_what_can_be_meant_loads(tmp_path: Path, entry: dict[str, Any]) -> None:
    load_with(tmp_path, {}, entry)


def test_sizes_of_config_json_are_in_the_unit_of_the_dataset(tmp_path: Path) -> None:
    entry = {"resolution": 0.5, "resolution_type": "area"}
    told = problems_of(tmp_path, {"minimum_image_size": 512}, entry)
    assert "dataset pictures: minimum_image_size: resolution_type area is in megapixels" in told
    assert load_with(tmp_path, {"minimum_image_size": 0.25}, entry).datasets[0].minimum_image_size == 0.25


@pytest.mark.parametrize(
    ("entry", "note"),
    [
        ({"crop_aspect_buckets": [1.0]}, "crop_aspect_buckets has no effect with crop: false"),
        ({"crop_aspect": "closest", "crop_aspect_buckets": [1.0]}, "crop_aspect has no effect with crop: false"),
        ({"crop": True, "crop_aspect_buckets": [1.0]}, "crop_aspect_buckets has no effect with crop_aspect square"),
        ({"crop": True, "crop_aspect": "preserve", "crop_aspect_buckets": [1.0]}, "with crop_aspect preserve"),
        ({"crop": True, "crop_aspect": "random", "crop_aspect_buckets": [1.0]}, None),
        ({"crop": True, "crop_aspect": "preserve"}, None),
        ({"crop_aspect": "square"}, None),
    ],
)  # fmt: skip
def test_crop_settings_without_effect_are_noted(tmp_path: Path, entry: dict[str, Any], note: str | None) -> None:
    notes = [line for line in load_with(tmp_path, {}, entry).notes if "crop_aspect" in line]
    assert notes == [] if note is None else len(notes) == 1 and note in notes[0] and "dataset pictures" in notes[0]


# ---- the learning rate ----


def test_the_end_of_the_learning_rate_is_below_its_start(tmp_path: Path) -> None:
    falling = {"lr_scheduler": "polynomial", "learning_rate": 1e-5}
    assert load_with(tmp_path, {**falling, "lr_end": 9e-6, "lr_power": 2}).config.optimizer.lr_end == 9e-6
    told = problems_of(tmp_path, {**falling, "lr_end": 1e-5})
    assert "lr_end: must be below learning_rate 1e-05; found 1e-05" in told
    told = problems_of(tmp_path, {"lr_scheduler": "polynomial", "learning_rate": 4e-7})
    assert "must be below learning_rate 4e-07; found 4e-07 (the default of polynomial)" in told
    assert "must be below" in problems_of(tmp_path, {"lr_scheduler": "cosine", "learning_rate": 1e-5, "lr_end": 1})
    load_with(tmp_path, {"lr_scheduler": "linear", "learning_rate": 1e-7, "lr_end": 1})


def test_settings_of_another_schedule_are_noted(tmp_path: Path) -> None:
    def notes(**config: Any) -> list[str]:
        return [line for line in load_with(tmp_path, config).notes if line.startswith("lr_")]

    assert notes(lr_scheduler="linear", lr_end=1e-7) == [
        "lr_end has no effect with lr_scheduler linear: polynomial and cosine use it"
    ]
    assert notes(lr_scheduler="cosine", lr_power=2) == [
        "lr_power has no effect with lr_scheduler cosine: it is for polynomial"
    ]
    assert notes(lr_scheduler="polynomial", lr_end=1e-7, lr_power=2) == notes(lr_scheduler="cosine", lr_end=1e-7) == []
    assert notes(lr_scheduler="constant") == []


@pytest.mark.parametrize(
    ("name", "messages"),
    [
        ("sine", ("the learning-rate schedule 'sine' cannot be used", "use cosine")),
        ("cosine_with_restarts", ("'cosine_with_restarts' is not built yet", "use cosine")),
        ("inverse_sqrt", ("'inverse_sqrt' is not built yet", "use cosine or polynomial")),
        ("polynominal", ("did you mean 'polynomial'?",)),
    ],
)
def test_schedules_there_are_not(tmp_path: Path, name: str, messages: tuple[str, ...]) -> None:
    told = problems_of(tmp_path, {"lr_scheduler": name})
    assert all(message in told for message in messages)
